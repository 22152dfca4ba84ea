"""Rows -> Conversation, for the formats messages, sharegpt, alpaca and prompt-completion."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pipeline.rows.examples import Completion, Conversation, Message, RowError
from pipeline.rows.messages import read_message, read_turn
from pipeline.rows.values import has_value, json_type, parse_list, require_json, require_text

_SYSTEM = ("system", "system_prompt", "system_message")
_SCHEMAS = ("input_schema", "inputSchema", "parametersJsonSchema")  # Anthropic, MCP, Gemini
# Optional columns of a conversation, the same in every format.
CONTEXT_COLUMNS = (*_SYSTEM, "tools", "functions", "chat_template_kwargs")


def messages(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation in the column `messages`: a list of {role, content}."""
    return _conversation(row, list(_read_messages(row["messages"], "`messages`", unread)), unread)


def sharegpt(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation in the column `conversations`: a list of {from, value}."""
    turns = parse_list(row["conversations"], "`conversations`")
    read = [message for turn in turns for message in read_turn(turn, unread)]
    return _conversation(row, read, unread)


def alpaca(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation of an Alpaca row, which has two messages.

    The user's message is `instruction` and `input`, separated by a blank line. The assistant's
    message is `output`.
    """
    if has_value(row.get("history")):
        raise RowError("both `history` and `instruction`; expected all turns as `messages`")
    parts = [require_text(row["instruction"], "`instruction`")]
    if row.get("input") is not None:
        parts.append(require_text(row["input"], "`input`"))
    user = "\n\n".join(part for part in parts if part.strip())
    if not user:
        raise RowError("`instruction` is empty")
    output = require_text(row["output"], "`output`")
    if not output.strip():
        raise RowError("`output` is empty")
    return _conversation(row, [Message("user", user), Message("assistant", output)], unread)


def prompt_and_completion(row: Mapping[str, Any], unread: set[str]) -> Completion | Conversation:
    """The example of the columns `prompt` and `completion`: two texts, or two lists of messages.

    Assistant messages in the prompt are not trained on.
    """
    prompt, completion = row["prompt"], row["completion"]
    are_lists = [not isinstance(value, str) for value in (prompt, completion)]
    if not any(isinstance(value, list | dict) for value in (prompt, completion)):
        if unused := [column for column in CONTEXT_COLUMNS if has_value(row.get(column))]:
            raise RowError(
                f"`{unused[0]}` needs a chat template, which is not applied if `prompt` and "
                "`completion` are texts; expected two lists of messages, or the column empty"
            )
        before, after = require_text(prompt, "`prompt`"), require_text(completion, "`completion`")
        if not after.strip():
            raise RowError("`completion` is empty")
        return Completion(before, after)
    if not all(are_lists):
        kinds = f"`prompt` is {json_type(prompt)} and `completion` {json_type(completion)}"
        raise RowError(f"{kinds}; expected two texts or two lists of messages")
    context = [
        replace(message, is_trained=False) if message.role == "assistant" else message
        for message in _read_messages(prompt, "`prompt`", unread)
    ]
    answer = list(_read_messages(completion, "`completion`", unread))
    if not any(message.role == "assistant" for message in answer):
        raise RowError("`completion` has no assistant message, so nothing to train on")
    return _conversation(row, [*context, *answer], unread)


def _read_messages(value: Any, column: str, unread: set[str]) -> Iterator[Message]:
    return (m for item in parse_list(value, column) for m in read_message(item, unread))


def _conversation(row: Mapping[str, Any], turns: list[Message], unread: set[str]) -> Conversation:
    """A conversation of these turns, with system prompt and tools from other columns of the row."""
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("the conversation has no assistant message, so nothing to train on")
    if has_value(row.get("chat_template_kwargs")):
        raise RowError(
            "`chat_template_kwargs` in a row is not supported: set it in the run file, for all rows"
        )
    for column in _SYSTEM:
        if not has_value(row.get(column)):
            continue
        if isinstance(row[column], list):  # content parts
            (message,) = read_message({"role": "system", "content": row[column]}, unread)
            system = message.content
        else:
            system = require_text(row[column], f"`{column}`")
        if turns[0].role != "system":
            turns = [Message("system", system), *turns]
        elif turns[0].content != system:
            raise RowError(f"`{column}` and the first message are different system prompts")
    return Conversation(tuple(turns), _tools(row))


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, each in the form {type, function}."""
    named = [column for column in ("tools", "functions") if has_value(row.get(column))]
    if len(named) > 1:
        raise RowError("both `tools` and `functions`")
    if not named:
        return ()
    tools = parse_list(row[named[0]], "`tools`", strips_nulls=True)
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects")
    require_json(tools, "`tools`")
    wrapped = tuple(tool if "function" in tool else _as_function_tool(tool) for tool in tools)
    for tool in wrapped:
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("a tool names no function; expected {name, description, parameters}")
    return wrapped


def _as_function_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a tool {name, description, parameters} to the form {type, function}.

    OpenAI's Responses API adds the key `type`; others have other names for `parameters`.
    """
    names = {} if "parameters" in tool else dict.fromkeys(_SCHEMAS, "parameters")
    function = {
        names.get(key, key): value
        for key, value in tool.items()
        if key != "type" or value not in ("function", "custom")
    }
    return {"type": "function", "function": function}
