"""Rows of turns -> Conversation: messages, sharegpt, alpaca, and lists as prompt and completion.

A key of a message is used or the row is refused: what is left out unsaid would not be trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pipeline.rows.examples import ROLES, Completion, Conversation, Message, Role, RowError
from pipeline.rows.lines import json_name

_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXTS = ("name", "tool_call_id", *_REASONING)
_MESSAGE_KEYS = ("role", "content", "weight", "tool_calls", "function_call", *_TEXTS)
_PLAIN = {"role", "content"}
_TURN_KEYS = ("from", "value", "weight")
_NOTHING: tuple[Any, ...] = (None, "", [], {})


def messages(row: Mapping[str, Any]) -> Conversation:
    """A row of `messages` as OpenAI has them, with `tools` or, as they once were, `functions`."""
    return _conversation(row, _messages(row["messages"], "`messages`"))


def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """A row of `conversations`: turns {from, value}."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError(f"`conversations` is {json_name(turns)}; expected a list")
    return _conversation(row, [_turn(turn) for turn in turns])


def alpaca(row: Mapping[str, Any]) -> Conversation:
    """`instruction`, a blank line and `input` are what the user says, `output` is the answer."""
    if row.get("history"):
        raise RowError("`history` beside `instruction`; expected the turns as `messages`")
    asked = [text_of(row["instruction"], "`instruction`")]
    if row.get("input") is not None:
        asked.append(text_of(row["input"], "`input`"))
    said = "\n\n".join(part for part in asked if part.strip())
    if not said:
        raise RowError("`instruction` is empty")
    output = text_of(row["output"], "`output`")
    if not output.strip():
        raise RowError("`output` is empty")
    return _conversation(row, [Message("user", said), Message("assistant", output)])


def prompt_and_completion(row: Mapping[str, Any]) -> Completion | Conversation:
    """Two texts; or two lists of messages, where answers within the prompt are not trained on."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        if lost := [column for column in ("system", "tools", "functions") if row.get(column)]:
            raise RowError(
                f"`{lost[0]}` beside texts as `prompt` and `completion`; no template renders "
                "them: expected two lists of messages, or the column empty"
            )
        asked, said = text_of(prompt, "`prompt`"), text_of(completion, "`completion`")
        if not said.strip():
            raise RowError("`completion` is empty")
        return Completion(asked, said)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        found = f"`prompt` is {json_name(prompt)} and `completion` {json_name(completion)}"
        raise RowError(f"{found}; expected two texts or two lists of messages")
    before = [_as_asked(message) for message in _messages(prompt, "`prompt`")]
    after = _messages(completion, "`completion`")
    if not any(message.role == "assistant" for message in after):
        raise RowError("`completion` has no assistant message, so nothing to train on")
    return _conversation(row, [*before, *after])


def _as_asked(message: Message) -> Message:
    return replace(message, is_trained=False) if message.role == "assistant" else message


def text_of(value: Any, name: str) -> str:
    """The value where it is text; RowError else."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {json_name(value)}; expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" is valid JSON and no character
            raise RowError(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def _conversation(row: Mapping[str, Any], turns: list[Message]) -> Conversation:
    """The turns, with what the row's other columns say of them."""
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("the conversation has no assistant message, so nothing to train on")
    if row.get("chat_template_kwargs"):
        raise RowError("`chat_template_kwargs` for a row: every row is rendered alike")
    if row.get("system"):
        system = text_of(row["system"], "`system`")
        if turns[0].role != "system":
            turns = [Message("system", system), *turns]
        elif turns[0].content != system:
            raise RowError("`system` beside another system message")
    return Conversation(tuple(turns), _tools(row))


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(f"{column} is {json_name(value)}; expected a list")
    return [_message(item) for item in value]


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"a message is {json_name(value)}; expected {{role, content}}")
    said = value.get("role")
    role = "tool" if said == "function" else said
    if role not in ROLES:
        found = repr(role)[:40] if isinstance(role, str) else json_name(role)
        raise RowError(f"a message has the role {found}; expected one of {', '.join(ROLES)}")
    others = {} if value.keys() == _PLAIN else _others_of(value, role)
    return _checked(cast("Role", role), value.get("content"), value.get("weight"), others)


def _others_of(message: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What a message has for the template beside role and content."""
    _refuse_what_would_be_lost(message, _MESSAGE_KEYS)
    others: dict[str, Any] = {
        key: text_of(message[key], f"{key} of a message")
        for key in _TEXTS
        if message.get(key) is not None
    }
    if role != "assistant" and (wrong := [key for key in _REASONING if key in others]):
        raise RowError(f"a message of the role {role} has {wrong[0]}; expected an assistant's")
    if calls := _calls_of(message):
        others["tool_calls"] = calls
    return others


def _turn(value: Any) -> Message:
    """A turn of ShareGPT."""
    if not isinstance(value, dict):
        raise RowError(f"a turn of `conversations` is {json_name(value)}; expected {{from, value}}")
    if "from" not in value and "role" in value:
        raise RowError(
            "`conversations` of {role, content}; set columns to {messages: conversations}"
        )
    _refuse_what_would_be_lost(value, _TURN_KEYS)
    said = value.get("from")
    role = _SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        found = repr(said)[:40] if isinstance(said, str) else json_name(said)
        raise RowError(f"a turn is from {found}; expected one of {', '.join(_SHAREGPT_ROLES)}")
    if said != "function_call":
        return _checked(role, value.get("value"), value.get("weight"), {})
    called = _from_json(text_of(value.get("value"), "value of a function_call"))
    calls = _tool_calls(called if isinstance(called, list) else [called])
    return _checked(role, None, value.get("weight"), {"tool_calls": calls})


def _checked(role: Role, content: Any, weight: Any, others: Mapping[str, Any]) -> Message:
    """The message; RowError where what it says or weighs is not what its role may."""
    calls = others.get("tool_calls")
    if calls and role != "assistant":
        raise RowError(f"a message of the role {role} has tool_calls; expected an assistant's")
    text = "" if content is None and calls else _content(content, f"content of a message ({role})")
    if role == "assistant" and not text.strip() and not calls:
        raise RowError("an assistant message is empty")
    if weight is None:
        return Message(role, text, True, others)
    if weight not in (0, 1):
        raise RowError("the weight of a message is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"a message of the role {role} has weight 1; expected an assistant's")
    return Message(role, text, weight == 1, others)


def _content(value: Any, name: str) -> str:
    """Text, or the texts of a list of parts joined."""
    if not isinstance(value, list):
        return text_of(value, name)
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            found = repr(kind)[:40] if isinstance(kind, str) else json_name(part)
            raise RowError(f"{name} has a part of type {found}; expected text parts only")
    return "".join(text_of(part.get("text"), f"text of a part in {name}") for part in value)


def _refuse_what_would_be_lost(message: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refusals, audio and the like change what should be trained: never drop them unsaid."""
    unread = [key for key in message if key not in known and message[key] not in _NOTHING]
    if unread:
        found = ", ".join(sorted(unread)[:5])
        raise RowError(f"a message has {found}, which is not read; known: {', '.join(known)}")


def _calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls, once = message.get("tool_calls"), message.get("function_call")
    if calls and once:
        raise RowError("a message has both tool_calls and function_call")
    return _tool_calls([once] if once else calls) if calls or once else []


def _tool_calls(calls: Any) -> list[Mapping[str, Any]]:
    """Calls as templates take them: {type, function: {name, arguments}}, arguments as an object."""
    if not isinstance(calls, list):
        raise RowError(f"tool_calls of a message is {json_name(calls)}; expected a list")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call names no function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # as OpenAI has it; a template would write it as one text
        arguments = _from_json(arguments)
    if not isinstance(arguments, dict):
        raise RowError(f"arguments of a tool call: {json_name(arguments)}; expected an object")
    around = call if function is not call else {}
    made = {**around, "type": "function", "function": {**function, "arguments": arguments}}
    return _writable(made, "a tool call")


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The row's tools as {type, function}; as text where a table could not hold them otherwise."""
    tools, once = row.get("tools"), row.get("functions")
    if tools and once:
        raise RowError("both `tools` and `functions`")
    found = tools or once or []
    found = _from_json(found) if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowError("`tools` is not a list of objects")
    wrapped = (t if "function" in t else {"type": "function", "function": t} for t in found)
    return tuple(_writable(tool, "`tools`") for tool in wrapped)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("a tool, or a call of one, is not valid JSON") from None


def _writable(value: dict[str, Any], name: str) -> dict[str, Any]:
    """The value, if a template can write it as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):  # a date from a table; half a surrogate pair
        raise RowError(f"{name} holds what is no JSON") from None
    return value
