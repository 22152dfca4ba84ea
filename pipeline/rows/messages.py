"""Convert the messages or ShareGPT turns of a row to Message objects.

Each key with a value is read, or its name is added to `unread`, or the row is rejected. If a key
were ignored silently, the training data could differ from the meaning of the row.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from pipeline.rows.examples import ROLES, Message, Role, RowError
from pipeline.rows.other_apis import RESPONSES_ITEMS, typed_part
from pipeline.rows.values import (
    drop_nulls,
    has_value,
    json_type,
    parse_json,
    parse_list,
    require_json,
    require_text,
)

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",  # Llama 3 and 4
    "environment": "tool",  # Olmo 3
}
_CONTENT = {role: f"content of a message ({role})" for role in ROLES}  # its name in reasons
_CALL_ROLES = ("function_call", "tool_call")  # roles of assistant turns that consist of tool calls
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
_COMMON_KEYS = ("weight", "name", "tool_call_id", *_CALL_KEYS, *_REASONING_KEYS)
_MESSAGE_KEYS = ("role", "content", "parts", *_COMMON_KEYS)
_TURN_KEYS = ("from", "value", *_COMMON_KEYS)
_PLAIN_KEYS = {"role", "content"}  # the keys of most messages
# Keys that are not part of the conversation; the audit counts them as unread.
_METADATA_KEYS = ("id", "uuid", "timestamp", "created_at", "date", "model", "is_error", "status")
# Keys by which other programs exclude a message from the loss.
_TRAINING_MARK = re.compile(
    r"(is_)?train(able|ed|ing|_detail)?|(loss_?|train_?)?mask(ed)?|loss(_weight)?"
)
_ARGUMENT_KEYS = ("arguments", "args", "parameters", "input")
_CALL_ID_KEYS = ("id", "call_id", "tool_call_id", "tool_use_id")
# Keys of a call or a part that hold no text.
_STRUCTURAL_KEYS = ("type", "index", "cache_control", "thoughtSignature", "thought_signature")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")
_EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})
_PART_TYPES = {*_TEXT_PARTS, *_REASONING_PARTS, "tool_use", "tool_result"}
_REASONING_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_MEDIA_PARTS = re.compile(r"(input_)?(image|audio|video)(_url)?|input_file")


def read_message(value: Any, unread: set[str]) -> list[Message]:
    """Convert a message {role, content}.

    The result is several Messages if the content has parts with tool results. The names of keys
    that have a value and are not read are added to `unread`.
    """
    if not isinstance(value, dict):
        raise RowError(f"a message is {json_type(value)}; expected {{role, content}}")
    name, content = value.get("role"), value.get("content")
    if has_value(value.get("parts")):
        if has_value(content):
            raise RowError("a message has both content and parts")
        content = value["parts"]
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role == "tool" and has_value(value.get("parts")):
        role = "user"  # Gemini's `function`, whose parts are results of tools
    if (
        role is not None
        and value.keys() == _PLAIN_KEYS
        and isinstance(content, str)
        and content.strip()
    ):
        return [Message(role, require_text(content, _CONTENT[role]))]  # fast path for most messages
    if name is None and value.get("type") in RESPONSES_ITEMS:
        raise RowError(
            f"an item of type {value['type']}, as in OpenAI's Responses API, is not read; expected "
            "messages with reasoning_content and tool_calls"
        )
    known = (*_MESSAGE_KEYS, "type") if value.get("type") == "message" else _MESSAGE_KEYS
    _check_keys(value, known, "message", unread)
    if name in _CALL_ROLES:
        return _call_turn(content, value, unread)
    if role is None:
        raise RowError(
            f"a message has the role {_quoted(name)}; expected one of {', '.join(_ROLES)}"
        )
    return _build_messages(role, content, value, unread)


def read_turn(value: Any, unread: set[str]) -> list[Message]:
    """Convert a ShareGPT turn {from, value}, or a message {role, content}."""
    if not isinstance(value, dict):
        raise RowError(f"a turn of `conversations` is {json_type(value)}; expected {{from, value}}")
    if "from" not in value and "role" in value:
        return read_message(value, unread)
    name, content = value.get("from"), value.get("value")
    _check_keys(value, _TURN_KEYS, "turn", unread)
    if name in _CALL_ROLES:
        return _call_turn(content, value, unread)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        expected = ", ".join((*_ROLES, *_CALL_ROLES))
        raise RowError(f"a turn is from {_quoted(name)}; expected one of {expected}")
    return _build_messages(role, content, value, unread)


def _check_keys(
    value: Mapping[str, Any], known: Sequence[str], owner: str, unread: set[str]
) -> None:
    """Raise RowError for unknown keys that have a value, and add metadata keys to `unread`.

    `owner`: kind of the object that has the keys, such as `message`, for messages and for `unread`.
    """
    unknown = [key for key in value if key not in known and has_value(value[key])]
    refused = [key for key in unknown if key not in _METADATA_KEYS]
    if refused:
        names = ", ".join(f"`{key}`" for key in sorted(refused)[:5])
        hint = ""
        if any(map(_TRAINING_MARK.fullmatch, refused)):
            hint = "; to exclude a message from the loss, give it `weight: 0`"
        raise RowError(f"a {owner} has unknown keys: {names}; known: {', '.join(known)}{hint}")
    unread.update(f"{owner}.{key}" for key in unknown if value[key] is not False)


def _call_turn(content: Any, value: Mapping[str, Any], unread: set[str]) -> list[Message]:
    """The assistant message for a turn whose content consists of tool calls (objects or JSON)."""
    calls = parse_json(content, "a tool call") if isinstance(content, str) else content
    if has_value(value.get("tool_calls")) or has_value(value.get("function_call")):
        raise RowError("a turn has tool calls both in its content and under another key")
    calls = calls if isinstance(calls, list) else [calls]
    return _build_messages("assistant", None, {**value, "tool_calls": calls}, unread)


def _build_messages(
    role: Role, content: Any, value: Mapping[str, Any], unread: set[str]
) -> list[Message]:
    """The Messages for a role, a content, and the other keys of the message `value`."""
    others: dict[str, Any] = {
        key: require_text(value[key], f"{key} of a message")
        for key in ("name", "tool_call_id")
        if has_value(value.get(key))
    }
    is_trained = _is_trained(role, value.get("weight"))
    parts = _parts(role, content, _CONTENT[role])
    if role == "assistant":
        content, optional = _assistant_content(parts, value, unread)
        return [Message(role, content, is_trained, others | optional)]
    for key in (*_CALL_KEYS, *_REASONING_KEYS):
        if has_value(value.get(key)):
            raise RowError(
                f"a message of the role {role} has {key}; only the role assistant can have it"
            )
    if isinstance(parts, str):
        return [Message(role, parts, is_trained, others)]
    return _split_at_results(parts, Message(role, "", is_trained, others), unread)


def _is_trained(role: Role, weight: Any) -> bool:
    """Whether a message counts in the loss. Raises RowError if the weight is invalid."""
    if weight is None:
        return True
    if not isinstance(weight, int | float | Decimal):  # Parquet has decimals
        raise RowError(f"the weight of a message is {json_type(weight)}; expected 0 or 1")
    if weight not in (0, 1):
        raise RowError("the weight of a message is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise RowError(
            f"a message of the role {role} has weight 1; only the role assistant can be trained on"
        )
    return bool(weight == 1)


def _parts(role: Role, content: Any, name: str) -> str | list[Mapping[str, Any]]:
    """The content as text, or as a list of parts {type: ..., ...}.

    `name`: name of the content in reasons. For the role tool, any other value becomes JSON text;
    for other roles it raises RowError.
    """
    if isinstance(content, str):
        return require_text(content, name)
    if content is None and role == "assistant":
        return ""
    items = content
    if isinstance(content, dict) and isinstance(content.get("type"), list):
        items = parse_list(content, name)  # the parts are given as a struct of lists
    if isinstance(items, list):
        items = [typed_part(part, has_text=role != "tool") for part in items]
    if isinstance(items, list) and (role != "tool" or _are_parts(items)):
        for part in items:
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind not in _PART_TYPES:
                raise RowError(
                    f"{name} has a part {_part_description(part)}; expected text parts only"
                )
        return items
    return _json_text(content, name) if role == "tool" else require_text(content, name)


def _part_description(part: Any) -> str:
    """The type of a part, or its keys if it has no type, for error messages."""
    if not isinstance(part, dict):
        return f"that is {json_type(part)}"
    if has_value(kind := part.get("type")):
        return f"of type {_quoted(kind)}"
    keys = sorted(key for key in part if has_value(part[key]))
    return f"with the keys {', '.join(keys[:5])}" if keys else "without a value"


def _are_parts(items: list[Any]) -> bool:
    """Whether a tool result is a list of content parts rather than the tool's own JSON list."""
    kinds = [item.get("type") if isinstance(item, dict) else None for item in items]
    return bool(kinds) and all(
        isinstance(kind, str) and (kind in _PART_TYPES or _MEDIA_PARTS.fullmatch(kind))
        for kind in kinds
    )


def _json_text(value: Any, name: str) -> str:
    """The value as JSON text. Raises RowError if it is null or not serialisable."""
    if value is None:
        raise RowError(f"{name} is null; expected text or a JSON value")
    require_json(value, name)
    return json.dumps(drop_nulls(value), ensure_ascii=False)


def _assistant_content(
    parts: str | list[Mapping[str, Any]], value: Mapping[str, Any], unread: set[str]
) -> tuple[str, dict[str, Any]]:
    """The text of an assistant message, and a dict with its reasoning and tool calls.

    Raises RowError for parts in another order than the one in which chat templates render them:
    reasoning, text, tool calls.
    """
    reasoning = _read_reasoning(value)
    texts = [parts] if isinstance(parts, str) else []
    reasoning_texts: list[str] = []
    calls: list[Mapping[str, Any]] = []
    for part in parts if isinstance(parts, list) else []:
        kind = part["type"]
        if kind in _REASONING_PARTS and not texts and not calls:
            reasoning_texts.append(_part_text(part, (*_REASONING_PARTS, "text"), unread))
        elif kind in _TEXT_PARTS and not calls:
            texts.append(_part_text(part, ("text",), unread))
        elif kind == "tool_use":
            calls.append(_tool_call(part, unread))
        else:
            raise RowError(
                f"an assistant message has a {kind} part after {'a tool call' if calls else 'text'}"
                "; expected reasoning, then text, then tool calls"
            )
    if reasoning_texts and reasoning:
        raise RowError(f"an assistant message has both a thinking part and {next(iter(reasoning))}")
    if reasoning_texts:
        reasoning = {"reasoning_content": "\n\n".join(reasoning_texts)}
    listed = _listed_calls(value, unread)
    if listed and calls:
        raise RowError("an assistant message has both tool_use parts and tool_calls")
    calls = listed or calls
    text = "".join(texts)
    if not text.strip() and not calls:
        raise RowError("an assistant message is empty")
    text = _without_repeated_reasoning(text, reasoning)
    return text, {**reasoning, **({"tool_calls": calls} if calls else {})}


def _read_reasoning(value: Mapping[str, Any]) -> dict[str, str]:
    """The reasoning under the first of _REASONING_KEYS that has a value, or an empty dict.

    Raises RowError if the texts under several of the keys differ.
    """
    texts = {
        key: require_text(value[key], f"{key} of a message")
        for key in _REASONING_KEYS
        if key in value and has_value(value[key])
    }
    if len(set(texts.values())) > 1:
        raise RowError(f"an assistant message has different texts in {' and '.join(texts)}")
    return dict([*texts.items()][:1])


def _without_repeated_reasoning(text: str, reasoning: Mapping[str, str]) -> str:
    """The text without a <think> block that repeats the reasoning of the message.

    Raises RowError if the block differs from the reasoning.
    """
    block = _REASONING_BLOCK.match(text) if reasoning else None
    if block is None:
        return text
    key, reasoning_text = next(iter(reasoning.items()))
    if block[1].strip() != reasoning_text.strip():
        raise RowError(f"an assistant message has different reasoning in its content and in {key}")
    return text[block.end() :]


def _part_text(part: Mapping[str, Any], keys: Sequence[str], unread: set[str]) -> str:
    """The text of a part, under one of `keys`. The value there may also be a list of text parts."""
    _check_keys(part, (*keys, *_STRUCTURAL_KEYS, "signature"), "part", unread)
    filled = [key for key in keys if has_value(part.get(key))]
    if len(filled) > 1:
        raise RowError(f"a part has both {filled[0]} and {filled[1]}")
    key = filled[0] if filled else keys[-1]
    value = part.get(key, "" if key in part else None)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "".join(_part_text(item, ("text",), unread) for item in value)
    return require_text(value, f"{key} of a part")


def _split_at_results(
    parts: list[Mapping[str, Any]], message: Message, unread: set[str]
) -> list[Message]:
    """Split a message into a Message for each tool result, and for the text between the results.

    `parts`: content of the message. `message`: its role and other keys, without content.
    """
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
        raise RowError(
            f"a message that consists of tool results has the keys {', '.join(message.others)}"
        )
    return messages


def _tool_result(part: Mapping[str, Any], unread: set[str]) -> Message:
    """Convert a tool_result part {tool_use_id, content} to a tool message."""
    ids = ("tool_use_id", "tool_call_id")
    _check_keys(part, ("content", "name", *ids, *_STRUCTURAL_KEYS), "tool_result", unread)
    content = part.get("content")
    value = {"name": part.get("name"), "tool_call_id": _first_value(part, ids, "a tool_result")}
    (message,) = _build_messages("tool", "" if content is None else content, value, unread)
    return message


def _listed_calls(value: Mapping[str, Any], unread: set[str]) -> list[Mapping[str, Any]]:
    """The calls under the key `tool_calls`, or the single call under the older `function_call`."""
    calls, single_call = value.get("tool_calls"), value.get("function_call")
    if has_value(calls) and has_value(single_call):
        raise RowError("a message has both tool_calls and function_call")
    if has_value(single_call):
        return [_tool_call(single_call, unread)]
    if not has_value(calls):
        return []
    return [_tool_call(call, unread) for call in parse_list(calls, "tool_calls of a message")]


def _tool_call(call: Any, unread: set[str]) -> Mapping[str, Any]:
    """Convert a tool call to {id, type, function: {name, arguments}}, as chat templates read it."""
    if isinstance(call, str):
        call = parse_json(call, "a tool call")
    if not isinstance(call, dict):
        raise RowError(f"a tool call is {json_type(call)}; expected {{name, arguments}}")
    function = call.get("function")
    if function is not None and not isinstance(function, dict):
        raise RowError(
            f"function of a tool call is {json_type(function)}; expected {{name, arguments}}"
        )
    # The keys of the call and of `function` together; an empty value does not replace another.
    values = {key: item for key, item in call.items() if key != "function"}
    for key, item in (function or {}).items():
        differs = has_value(values.get(key)) and has_value(item) and values[key] != item
        if differs and key not in _STRUCTURAL_KEYS:
            raise RowError(f"a tool call has {key} twice, with different values")
        values[key] = item if has_value(item) else values.get(key, item)
    _check_keys(
        values, ("name", *_ARGUMENT_KEYS, *_CALL_ID_KEYS, *_STRUCTURAL_KEYS), "tool call", unread
    )
    name = values.get("name")
    if not isinstance(name, str) or not has_value(name):
        raise RowError("a tool call names no function")
    call_id = _first_value(values, _CALL_ID_KEYS, "a tool call")
    arguments = _arguments(_first_value(values, _ARGUMENT_KEYS, "a tool call"))
    tool_call = {
        **({} if call_id is None else {"id": str(call_id)}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    require_json(tool_call, "a tool call")
    return tool_call


def _first_value(values: Mapping[str, Any], keys: Sequence[str], owner: str) -> Any:
    """The first value that is not empty among synonymous keys; RowError if two values differ."""
    filled = {key: values[key] for key in keys if values.get(key) not in _EMPTY_VALUES}
    first, *others = filled.values() or [None]
    if any(other != first for other in others):
        raise RowError(f"{owner} has different values in {' and '.join(filled)}")
    return first


def _arguments(value: Any) -> dict[str, Any]:
    """The arguments of a call as an object.

    Arguments given as JSON text keep their nulls. From an object nulls are removed, because in a
    table they only mean that other rows have the key.
    """
    if isinstance(value, str):
        value = parse_json(value, "arguments of a tool call") if value.strip() else None
    else:
        value = drop_nulls(value)
    if isinstance(value, list):
        raise RowError(
            'arguments of a tool call: a list; expected an object such as {"city": "Paris"}; make '
            "one from a list of keys and values, such as a map of Arrow or Spark"
        )
    if not isinstance(value, dict | None):
        raise RowError(f"arguments of a tool call: {json_type(value)}; expected an object")
    return value or {}


def _quoted(name: Any) -> str:
    """A text in quotes, at most 40 characters, or the JSON type of another value."""
    return repr(name)[:40] if isinstance(name, str) else json_type(name)
