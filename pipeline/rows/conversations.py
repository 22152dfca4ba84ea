"""Rows -> Conversation: messages, ShareGPT, Alpaca, and prompt and completion as message lists."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pipeline.rows.examples import Completion, Conversation, Message, RowError
from pipeline.rows.messages import read_message, read_turn
from pipeline.rows.values import has_value, json_name, list_of, require_json, text_of

_SYSTEM = ("system", "system_prompt", "system_message")
# Further columns of a conversation, in any format.
CONTEXT_COLUMNS = (*_SYSTEM, "tools", "functions", "chat_template_kwargs")


def messages(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation in the column `messages`: a list of {role, content}."""
    return _conversation(row, list(_read_messages(row["messages"], "`messages`", unread)), unread)


def sharegpt(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation in the column `conversations`: a list of {from, value}."""
    turns = list_of(row["conversations"], "`conversations`")
    read = [message for turn in turns for message in read_turn(turn, unread)]
    return _conversation(row, read, unread)


def alpaca(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """One user message, `instruction` and `input` with a blank line between; then `output`."""
    if has_value(row.get("history")):
        raise RowError("both `history` and `instruction`; expected all turns as `messages`")
    parts = [text_of(row["instruction"], "`instruction`")]
    if row.get("input") is not None:
        parts.append(text_of(row["input"], "`input`"))
    user = "\n\n".join(part for part in parts if part.strip())
    if not user:
        raise RowError("`instruction` is empty")
    output = text_of(row["output"], "`output`")
    if not output.strip():
        raise RowError("`output` is empty")
    return _conversation(row, [Message("user", user), Message("assistant", output)], unread)


def prompt_and_completion(row: Mapping[str, Any], unread: set[str]) -> Completion | Conversation:
    """Two texts, or two lists of messages; assistant messages in the prompt are not trained on."""
    prompt, completion = row["prompt"], row["completion"]
    are_lists = [not isinstance(value, str) for value in (prompt, completion)]
    if not any(isinstance(value, list | dict) for value in (prompt, completion)):
        if unused := [column for column in CONTEXT_COLUMNS if has_value(row.get(column))]:
            raise RowError(
                f"`{unused[0]}` needs a chat template, which is not applied if `prompt` and "
                "`completion` are texts; expected two lists of messages, or the column empty"
            )
        before, after = text_of(prompt, "`prompt`"), text_of(completion, "`completion`")
        if not after.strip():
            raise RowError("`completion` is empty")
        return Completion(before, after)
    if not all(are_lists):
        kinds = f"`prompt` is {json_name(prompt)} and `completion` {json_name(completion)}"
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
    return (m for item in list_of(value, column) for m in read_message(item, unread))


def _conversation(row: Mapping[str, Any], turns: list[Message], unread: set[str]) -> Conversation:
    """The turns, with the system prompt and the tools from other columns of the row."""
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
            system = text_of(row[column], f"`{column}`")
        if turns[0].role != "system":
            turns = [Message("system", system), *turns]
        elif turns[0].content != system:
            raise RowError(f"`{column}` and the first message are different system prompts")
    return Conversation(tuple(turns), _tools(row))


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The row's tools, each as {type, function}."""
    named = [column for column in ("tools", "functions") if has_value(row.get(column))]
    if len(named) > 1:
        raise RowError("both `tools` and `functions`")
    if not named:
        return ()
    tools = list_of(row[named[0]], "`tools`", strips_nulls=True)
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects")
    require_json(tools, "`tools`")
    return tuple(tool if "function" in tool else _wrapped(tool) for tool in tools)


def _wrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool {name, description, parameters} as {type, function}, whatever API it was written for.

    The Responses API has `type` beside the name; Anthropic's has `input_schema` for `parameters`.
    """
    names = {} if "parameters" in tool else {"input_schema": "parameters"}
    function = {
        names.get(key, key): value
        for key, value in tool.items()
        if key != "type" or value not in ("function", "custom")
    }
    return {"type": "function", "function": function}
