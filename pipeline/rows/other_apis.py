"""Convert content parts and tools from the form of the Gemini and Bedrock APIs.

In these APIs a part is an object whose only key names its kind: {functionCall: {...}}. It is
converted to the form of the Anthropic API, {type: tool_use, ...}, which messages.py reads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.rows.values import has_value

# Key of a part -> the type of the converted part.
_PARTS = {
    "functionCall": "tool_use",
    "function_call": "tool_use",
    "toolUse": "tool_use",
    "functionResponse": "tool_result",
    "function_response": "tool_result",
    "toolResult": "tool_result",
    "reasoningContent": "reasoning",
}
# Keys within a part -> their names in the converted part.
_KEYS = {"toolUseId": "tool_use_id", "response": "content"}
_SIGNATURES = ("thoughtSignature", "thought_signature")  # encrypted for the API; not read
_TOOL_LISTS = ("functionDeclarations", "function_declarations", "toolSpec")
# Types of items of OpenAI's Responses API that are not messages.
RESPONSES_ITEMS = ("function_call", "function_call_output", "reasoning")


def with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with Gemini's column `contents` renamed to `messages` if it holds {role, parts}."""
    contents = row.get("contents")
    if row.get("messages") is not None or not isinstance(contents, list) or not contents:
        return row
    if not all(isinstance(item, dict) and "parts" in item for item in contents):
        return row
    others = {key: value for key, value in row.items() if key != "contents"}
    return {**others, "messages": contents}


def typed_part(part: Any, *, has_text: bool) -> Any:
    """The part in the form {type: ..., ...}; unchanged if it has a type or an unknown form.

    `has_text`: whether {text: ...} is a text part. In a tool's result it may be an ordinary object.
    """
    if not isinstance(part, dict) or has_value(part.get("type")):
        return part
    filled = {key: value for key, value in part.items() if has_value(value)}
    for signature in _SIGNATURES:
        filled.pop(signature, None)
    is_thought = filled.pop("thought") if isinstance(filled.get("thought"), bool) else False
    if has_text and "text" in part and not filled.keys() - {"text"}:
        return {**part, "type": "thinking" if is_thought else "text", "thought": None}
    kind, value = next(iter(filled.items()), ("", None))
    if len(filled) != 1 or kind not in _PARTS or not isinstance(value, dict):
        return part
    if kind == "reasoningContent" and isinstance(value.get("reasoningText"), dict):
        value = value["reasoningText"]
    names = _KEYS | ({"id": "tool_use_id"} if _PARTS[kind] == "tool_result" else {})
    converted: dict[str, Any] = {}
    for key, item in value.items():
        name = names.get(key, key)
        if has_value(item) and has_value(converted.get(name)):
            return part  # one of two values would be lost; messages.py rejects parts without type
        if has_value(item) or name not in converted:
            converted[name] = item
    if kind == "toolResult" and isinstance(converted.get("content"), list):
        converted["content"] = [_result_part(item) for item in converted["content"]]
    return {**converted, "type": _PARTS[kind]}


def _result_part(part: Any) -> Any:
    """The text part for a part {text} or {json} of a tool result; other parts are unchanged."""
    filled = [key for key in part if has_value(part[key])] if isinstance(part, dict) else []
    if filled == ["json"]:
        return {"type": "text", "text": json.dumps(part["json"], ensure_ascii=False)}
    return {"type": "text", "text": part["text"]} if filled == ["text"] else part


def list_tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The tools, unwrapped from objects {functionDeclarations: [...]} and {toolSpec: {...}}."""
    for tool in tools:
        key = next(iter(tool), "")
        if len(tool) != 1 or key not in _TOOL_LISTS:
            yield tool
        elif isinstance(tool[key], list):
            yield from tool[key]
        else:
            yield tool[key]
