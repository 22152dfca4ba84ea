"""Build the examples of rows in the formats messages, sharegpt, alpaca and prompt-completion.

Every function adds to the set `unread` the names of keys that have a value and are not part of the
example.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from pipeline.rows.examples import Completion, Conversation, Message, RowError
from pipeline.rows.messages import read_message, read_turn
from pipeline.rows.other_apis import list_tools
from pipeline.rows.reasoning import (
    closing_tag,
    require_closed_reasoning,
    require_opened_reasoning,
)
from pipeline.rows.values import has_value, json_type, parse_list, require_json, require_text

# Columns with a system prompt, and with the tools that the assistant may call.
_SYSTEM = (
    *("system", "system_prompt", "system_message"),
    *("systemInstruction", "system_instruction"),
)
_TOOLS = ("tools", "functions", "toolConfig", "tool_config")
# Names of a tool's `parameters` in the APIs of Anthropic, MCP and Gemini.
_SCHEMAS = ("input_schema", "inputSchema", "parametersJsonSchema")
# Optional columns of a conversation, the same in every format.
CONTEXT_COLUMNS = (*_SYSTEM, *_TOOLS, "chat_template_kwargs")


def messages_example(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation in the column `messages`, a list of {role, content}."""
    return _build_conversation(
        row, list(_read_messages(row["messages"], "`messages`", unread)), unread
    )


def sharegpt_example(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation in the column `conversations`, a list of {from, value}."""
    turns = parse_list(row["conversations"], "`conversations`")
    converted = [message for turn in turns for message in read_turn(turn, unread)]
    return _build_conversation(row, converted, unread)


def alpaca_example(row: Mapping[str, Any], unread: set[str]) -> Conversation:
    """The conversation of an Alpaca row: one user message and one assistant message.

    The user message is `instruction` and `input`, separated by a blank line. The assistant message
    is `output`.
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
    return _build_conversation(row, [Message("user", user), Message("assistant", output)], unread)


def completion_example(row: Mapping[str, Any], unread: set[str]) -> Completion | Conversation:
    """The example in the columns `prompt` and `completion`.

    Two texts become a Completion. Two lists of messages become a Conversation, in which assistant
    messages of the prompt are not trained on.
    """
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list | dict) and not isinstance(completion, list | dict):
        if unused := [column for column in CONTEXT_COLUMNS if has_value(row.get(column))]:
            raise RowError(
                f"`{unused[0]}` needs a chat template, and none is applied if `prompt` and "
                "`completion` are texts; give two lists of messages, or leave the column empty"
            )
        prompt_text = require_text(prompt, "`prompt`")
        answer_text = require_text(completion, "`completion`")
        if not answer_text.strip():
            raise RowError("`completion` is empty")
        require_closed_reasoning(answer_text, "`completion`")
        if tag := closing_tag(answer_text):
            before_tag = prompt_text + answer_text[: tag.start()]
            require_opened_reasoning(tag, before_tag, "`completion`")
        return Completion(prompt_text, answer_text)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError(
            f"`prompt` is {json_type(prompt)} and `completion` {json_type(completion)}; expected "
            "two texts or two lists of messages"
        )
    context = [
        replace(message, is_trained=False) if message.role == "assistant" else message
        for message in _read_messages(prompt, "`prompt`", unread)
    ]
    answer = list(_read_messages(completion, "`completion`", unread))
    if not any(message.role == "assistant" for message in answer):
        raise RowError("`completion` has no assistant message, so nothing to train on")
    return _build_conversation(row, [*context, *answer], unread)


def _read_messages(value: Any, column: str, unread: set[str]) -> Iterator[Message]:
    """The messages of a column whose value is a list of {role, content}."""
    for item in parse_list(value, column):
        yield from read_message(item, unread)


def _build_conversation(
    row: Mapping[str, Any], turns: list[Message], unread: set[str]
) -> Conversation:
    """The conversation of these turns and of the row's columns for system prompt and tools."""
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("the conversation has no assistant message, so nothing to train on")
    if has_value(row.get("chat_template_kwargs")):
        raise RowError(
            "`chat_template_kwargs` in a row is not supported; set it for all rows in the run file"
        )
    for turn in turns:
        if turn.role == "assistant" and turn.is_trained:
            require_closed_reasoning(turn.content, "an assistant message")
    for column in _SYSTEM:
        if not has_value(row.get(column)):
            continue
        if not isinstance(row[column], str):  # a list of content parts, or a whole message
            value = row[column] if isinstance(row[column], dict) else {"content": row[column]}
            (message,) = read_message({**value, "role": "system"}, unread)
            system = message.content
        else:
            system = require_text(row[column], f"`{column}`")
        if turns[0].role != "system":
            turns = [Message("system", system), *turns]
        elif turns[0].content != system:
            raise RowError(f"`{column}` and the first message are different system prompts")
    _require_calls_before_results(turns)
    return Conversation(tuple(_results_in_call_order(turns)), _read_tools(row))


def _require_calls_before_results(turns: Sequence[Message]) -> None:
    """Raise RowError if a tool result stands before the first call that has its id.

    The model would be trained to call a tool whose result it already has.
    """
    first_calls: dict[Any, int] = {}  # call id -> index of the first message with this call
    for index, turn in enumerate(turns):
        for call in turn.others.get("tool_calls", ()):
            first_calls.setdefault(call.get("id"), index)
    for index, turn in enumerate(turns):
        call_id = turn.others.get("tool_call_id")
        if turn.role == "tool" and call_id is not None and first_calls.get(call_id, -1) > index:
            raise RowError(
                f"messages[{index}] is the result of the call {call_id}, but this call comes only "
                f"after it, in messages[{first_calls[call_id]}]; put the result after its call"
            )


def _results_in_call_order(turns: Sequence[Message]) -> Iterator[Message]:
    """The turns, with the results of parallel calls in the order of these calls.

    In the output of a template that writes no ids, the order shows which result belongs to which
    call. Results without ids, or with ids of other calls, keep their order.
    """
    call_ids: list[Any] = []  # of the preceding message
    for are_results, group in groupby(turns, lambda turn: turn.role == "tool"):
        messages = list(group)
        if are_results:
            result_ids = [message.others.get("tool_call_id") for message in messages]
            is_unique = None not in result_ids and len(set(result_ids)) == len(result_ids)
            if is_unique and set(result_ids) <= set(call_ids):
                messages.sort(key=lambda message: call_ids.index(message.others["tool_call_id"]))
        call_ids = [call.get("id") for call in messages[-1].others.get("tool_calls", ())]
        yield from messages


def _read_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, each in the form {type, function}."""
    columns = [column for column in _TOOLS if has_value(row.get(column))]
    if len(columns) > 1:
        raise RowError(f"both `{columns[0]}` and `{columns[1]}`")
    if not columns:
        return ()
    value = row[columns[0]]
    if isinstance(value, dict) and value.keys() <= {"tools", "toolChoice"}:  # Bedrock's toolConfig
        value = value.get("tools")
    tools = parse_list(value, "`tools`", strips_nulls=True)
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects")
    require_json(tools, "`tools`")
    tools = list(list_tools(tools))
    function_tools = tuple(
        tool if "function" in tool else _as_function_tool(tool) for tool in tools
    )
    for tool in function_tools:
        function = tool["function"]
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not has_value(name):
            raise RowError("a tool names no function; expected {name, description, parameters}")
    return function_tools


def _as_function_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a tool {name, description, parameters} to the form {type, function}.

    In OpenAI's Responses API such a tool also has the key `type`. Other APIs name `parameters`
    differently (_SCHEMAS).
    """
    new_names = {} if "parameters" in tool else dict.fromkeys(_SCHEMAS, "parameters")
    function = {
        new_names.get(key, key): value
        for key, value in tool.items()
        if key != "type" or value not in ("function", "custom")
    }
    schema = function.get("parameters")
    if "inputSchema" in tool and isinstance(schema, dict) and schema.keys() == {"json"}:
        function["parameters"] = schema["json"]  # Bedrock
    return {"type": "function", "function": function}
