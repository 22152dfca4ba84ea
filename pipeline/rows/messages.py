"""A message or ShareGPT turn of a row -> Message objects, with content parts and tool calls.

Every key with a value is read, counted as unread, or refused by name: ignoring one silently would
train on something else than the row says.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.rows.examples import ROLES, Message, Role, RowError
from pipeline.rows.values import (
    has_value,
    json_name,
    json_of,
    list_of,
    require_json,
    text_of,
    without_nulls,
)

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
}
_SHAREGPT_ROLES: dict[str, Role] = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CONTENT = {role: f"content of a message ({role})" for role in ROLES}
_CALL_ROLES = ("function_call", "tool_call")  # an assistant's turn whose content is its calls
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_OTHER_KEYS = ("weight", "name", "tool_call_id", *_CALLS, *_REASONING)
_MESSAGE_KEYS, _TURN_KEYS = ("role", "content", *_OTHER_KEYS), ("from", "value", *_OTHER_KEYS)
_PLAIN = {"role", "content"}
# Metadata of a message, not part of the conversation: counted as unread.
_METADATA = ("id", "uuid", "timestamp", "created_at", "date", "model", "is_error")
_ARGUMENTS = ("arguments", "args", "parameters", "input")
_CALL_IDS = ("id", "call_id", "tool_call_id", "tool_use_id")
_STRUCTURAL = ("type", "index", "cache_control")  # keys of a call or part that carry no text
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_PART_TYPES = {*_TEXT_PARTS, *_REASONING_PARTS, "tool_use", "tool_result"}
_MEDIA_PARTS = re.compile(r"(input_)?(image|audio|video)(_url)?|input_file")


def read_message(value: Any, unread: set[str]) -> list[Message]:
    """The Message of {role, content}; several if tool results are among its content parts.

    Adds to `unread` the names of keys that have a value and are not read.
    """
    if not isinstance(value, dict):
        raise RowError(f"a message is {json_name(value)}; expected {{role, content}}")
    name, content = value.get("role"), value.get("content")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is not None and value.keys() == _PLAIN and isinstance(content, str) and content.strip():
        return [Message(role, text_of(content, _CONTENT[role]))]  # fast path for most messages
    _check_keys(value, _MESSAGE_KEYS, "message", unread)
    if name in _CALL_ROLES:
        return _call_turn(content, value, unread)
    if role is None:
        raise RowError(
            f"a message has the role {_shown(name)}; expected one of {', '.join(_ROLES)}"
        )
    return _messages(role, content, value, unread)


def read_turn(value: Any, unread: set[str]) -> list[Message]:
    """The Messages of a ShareGPT turn {from, value}; {role, content} is read as well."""
    if not isinstance(value, dict):
        raise RowError(f"a turn of `conversations` is {json_name(value)}; expected {{from, value}}")
    if "from" not in value and "role" in value:
        return read_message(value, unread)
    name, content = value.get("from"), value.get("value")
    _check_keys(value, _TURN_KEYS, "turn", unread)
    if name in _CALL_ROLES:
        return _call_turn(content, value, unread)
    role = _SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        expected = ", ".join((*_SHAREGPT_ROLES, *_CALL_ROLES))
        raise RowError(f"a turn is from {_shown(name)}; expected one of {expected}")
    return _messages(role, content, value, unread)


def _check_keys(value: Mapping[str, Any], known: Sequence[str], of: str, unread: set[str]) -> None:
    """Raise RowError for keys that have a value and are neither known nor metadata."""
    unknown = [key for key in value if key not in known and has_value(value[key])]
    refused = [key for key in unknown if key not in _METADATA]
    if refused:
        names = ", ".join(f"`{key}`" for key in sorted(refused)[:5])
        raise RowError(f"a {of} has {names}, which is not read; known: {', '.join(known)}")
    unread.update(f"{of}.{key}" for key in unknown if value[key] is not False)


def _call_turn(content: Any, value: Mapping[str, Any], unread: set[str]) -> list[Message]:
    """The assistant message of a turn whose content is its tool calls, as JSON text or objects."""
    calls = json_of(content, "a tool call") if isinstance(content, str) else content
    if has_value(value.get("tool_calls")) or has_value(value.get("function_call")):
        raise RowError("a turn of tool calls has calls in its content and under another key")
    calls = calls if isinstance(calls, list) else [calls]
    return _messages("assistant", None, {**value, "tool_calls": calls}, unread)


def _messages(
    role: Role, content: Any, value: Mapping[str, Any], unread: set[str]
) -> list[Message]:
    """The Messages for a role and content; the keys of `value` have been checked."""
    others: dict[str, Any] = {
        key: text_of(value[key], f"{key} of a message")
        for key in ("name", "tool_call_id")
        if has_value(value.get(key))
    }
    is_trained = _is_trained(role, value.get("weight"))
    parts = _parts(role, content, _CONTENT[role])
    if role == "assistant":
        content, more = _assistant(parts, value, unread)
        return [Message(role, content, is_trained, others | more)]
    if wrong := [key for key in (*_CALLS, *_REASONING) if has_value(value.get(key))]:
        raise RowError(f"a message of the role {role} has {wrong[0]}; expected an assistant's")
    if isinstance(parts, str):
        return [Message(role, parts, is_trained, others)]
    return _split_at_results(parts, Message(role, "", is_trained, others), unread)


def _is_trained(role: Role, weight: Any) -> bool:
    if weight is None:
        return True
    if weight not in (0, 1):
        raise RowError("the weight of a message is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"a message of the role {role} has weight 1; expected an assistant's")
    return bool(weight == 1)


def _parts(role: Role, content: Any, name: str) -> str | list[Mapping[str, Any]]:
    """The content as text or as a list of typed parts; other values of a tool as JSON text."""
    if isinstance(content, str):
        return text_of(content, name)
    if content is None and role == "assistant":
        return ""
    items = content
    if isinstance(content, dict) and isinstance(content.get("type"), list):
        items = list_of(content, name)  # parts as a struct of lists
    if isinstance(items, list) and (role != "tool" or _are_parts(items)):
        items = [_typed(part) for part in items]
        for part in items:
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind not in _PART_TYPES:
                type_name = _shown(kind) if isinstance(kind, str) else json_name(part)
                raise RowError(f"{name} has a part of type {type_name}; expected text parts only")
        return items
    return _json_text(content, name) if role == "tool" else text_of(content, name)


def _typed(part: Any) -> Any:
    """A part; one with a text and nothing else needs no type."""
    if not isinstance(part, dict) or has_value(part.get("type")) or "text" not in part:
        return part
    is_text = not any(has_value(value) for key, value in part.items() if key != "text")
    return {**part, "type": "text"} if is_text else part


def _are_parts(items: list[Any]) -> bool:
    """Whether a tool's result is a list of content parts, not a JSON list from the tool itself."""
    kinds = [item.get("type") if isinstance(item, dict) else None for item in items]
    return bool(kinds) and all(
        isinstance(kind, str) and (kind in _PART_TYPES or _MEDIA_PARTS.fullmatch(kind))
        for kind in kinds
    )


def _json_text(value: Any, name: str) -> str:
    if value is None:
        raise RowError(f"{name} is null; expected text or a JSON value")
    require_json(value, name)
    return json.dumps(value, ensure_ascii=False)


def _assistant(
    parts: str | list[Mapping[str, Any]], value: Mapping[str, Any], unread: set[str]
) -> tuple[str, dict[str, Any]]:
    """The content of an assistant message, and a dict of its reasoning and tool calls.

    Parts must be in the order in which chat templates render them: reasoning, text, calls.
    """
    reasoning = _reasoning(value)
    texts = [parts] if isinstance(parts, str) else []
    thoughts: list[str] = []
    calls: list[Mapping[str, Any]] = []
    for part in parts if isinstance(parts, list) else []:
        kind = part["type"]
        if kind in _REASONING_PARTS and not texts and not calls:
            thoughts.append(_part_text(part, (*_REASONING_PARTS, "text"), unread))
        elif kind in _TEXT_PARTS and not calls:
            texts.append(_part_text(part, ("text",), unread))
        elif kind == "tool_use":
            calls.append(_tool_call(part, unread))
        else:
            raise RowError(
                f"an assistant message has a {kind} part after {'a call' if calls else 'text'}; "
                "expected reasoning, then text, then tool calls"
            )
    if thoughts and reasoning:
        raise RowError(f"an assistant message has a thinking part and {next(iter(reasoning))}")
    if thoughts:
        reasoning = {"reasoning_content": "\n\n".join(thoughts)}
    listed = _listed_calls(value, unread)
    if listed and calls:
        raise RowError("an assistant message has tool_use parts and tool_calls")
    calls = listed or calls
    text = "".join(texts)
    if not text.strip() and not calls:
        raise RowError("an assistant message is empty")
    return text, {**reasoning, **({"tool_calls": calls} if calls else {})}


def _reasoning(value: Mapping[str, Any]) -> dict[str, str]:
    """The reasoning under the first of _REASONING that has a value; values must be equal."""
    texts = {
        key: text_of(value[key], f"{key} of a message")
        for key in _REASONING
        if key in value and has_value(value[key])
    }
    if len(set(texts.values())) > 1:
        raise RowError(f"an assistant message has different texts in {' and '.join(texts)}")
    return dict([*texts.items()][:1])


def _part_text(part: Mapping[str, Any], keys: Sequence[str], unread: set[str]) -> str:
    """The text of a part, under one of `keys`, given as text or as a list of text parts."""
    _check_keys(part, (*keys, *_STRUCTURAL, "signature"), "part", unread)
    filled = [key for key in keys if has_value(part.get(key))]
    if len(filled) > 1:
        raise RowError(f"a part has both {filled[0]} and {filled[1]}")
    key = filled[0] if filled else keys[-1]
    value = part.get(key, "" if key in part else None)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "".join(_part_text(item, ("text",), unread) for item in value)
    return text_of(value, f"{key} of a part")


def _split_at_results(
    parts: list[Mapping[str, Any]], message: Message, unread: set[str]
) -> list[Message]:
    """The text of a message, split where a tool result becomes a separate tool message."""
    messages: list[Message] = []
    texts: list[str] = []
    for part in parts:
        kind = part["type"]
        if kind in _TEXT_PARTS:
            texts.append(_part_text(part, ("text",), unread))
        elif kind == "tool_result" and message.role == "user":
            if texts:
                messages.append(replace(message, content="".join(texts)))
                texts = []
            messages.append(_tool_result(part, unread))
        else:
            raise RowError(f"a message of the role {message.role} has a part of type {kind}")
    if texts or not messages:
        messages.append(replace(message, content="".join(texts)))
    elif message.others and all(result.role == "tool" for result in messages):
        raise RowError(f"a message with only tool results has {', '.join(message.others)}")
    return messages


def _tool_result(part: Mapping[str, Any], unread: set[str]) -> Message:
    """A tool_result part {tool_use_id, content} as a tool message."""
    ids = ("tool_use_id", "tool_call_id")
    _check_keys(part, ("content", "name", *ids, *_STRUCTURAL), "tool_result", unread)
    content = part.get("content")
    value = {"name": part.get("name"), "tool_call_id": _one_of(part, ids, "a tool_result")}
    (message,) = _messages("tool", "" if content is None else content, value, unread)
    return message


def _listed_calls(value: Mapping[str, Any], unread: set[str]) -> list[Mapping[str, Any]]:
    """The calls under `tool_calls`, or the one under the older `function_call`."""
    several, single = value.get("tool_calls"), value.get("function_call")
    if has_value(several) and has_value(single):
        raise RowError("a message has both tool_calls and function_call")
    if has_value(single):
        return [_tool_call(single, unread)]
    if not has_value(several):
        return []
    return [_tool_call(call, unread) for call in list_of(several, "tool_calls of a message")]


def _tool_call(call: Any, unread: set[str]) -> Mapping[str, Any]:
    """A tool call in the form of chat templates: {id, type, function: {name, arguments}}."""
    if isinstance(call, str):
        call = json_of(call, "a tool call")
    if not isinstance(call, dict):
        raise RowError(f"a tool call is {json_name(call)}; expected {{name, arguments}}")
    inner = call.get("function")
    if inner is not None and not isinstance(inner, dict):
        raise RowError(
            f"function of a tool call is {json_name(inner)}; expected {{name, arguments}}"
        )
    values = {key: item for key, item in call.items() if key != "function"}
    for key, item in (inner or {}).items():
        differs = has_value(values.get(key)) and has_value(item) and values[key] != item
        if differs and key not in _STRUCTURAL:
            raise RowError(f"a tool call has {key} twice, with different values")
        values[key] = item if has_value(item) else values.get(key, item)
    _check_keys(values, ("name", *_ARGUMENTS, *_CALL_IDS, *_STRUCTURAL), "tool call", unread)
    name = values.get("name")
    if not isinstance(name, str):
        raise RowError("a tool call names no function")
    identity = _one_of(values, _CALL_IDS, "a tool call")
    arguments = _arguments(_one_of(values, _ARGUMENTS, "a tool call"))
    tool_call = {
        **({} if identity is None else {"id": str(identity)}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    require_json(tool_call, "a tool call")
    return tool_call


def _one_of(values: Mapping[str, Any], keys: Sequence[str], of: str) -> Any:
    """The value of the first of these keys that is not empty; None if all are empty."""
    filled = {key: values[key] for key in keys if values.get(key) not in _EMPTY}
    first, *others = filled.values() or [None]
    if any(other != first for other in others):
        raise RowError(f"{of} has different values in {' and '.join(filled)}")
    return first


def _arguments(value: Any) -> dict[str, Any]:
    """Arguments as an object. Nulls are kept in JSON text and removed from an object.

    In an object of a table a null only means that other rows have this key.
    """
    if isinstance(value, str):
        value = json_of(value, "arguments of a tool call") if value.strip() else None
    else:
        value = without_nulls(value)
    if not isinstance(value, dict | None):
        raise RowError(f"arguments of a tool call: {json_name(value)}; expected an object")
    return value or {}


def _shown(name: Any) -> str:
    return repr(name)[:40] if isinstance(name, str) else json_name(name)
