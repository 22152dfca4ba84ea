"""All usual forms of messages, content parts and tool calls are read as the same Messages.

A row in another form is refused with the reason.
"""

import json

import pytest

from pipeline.rows.examples import Message, RowError
from pipeline.rows.formats import read_example
from tests.messages import refused
from tests.rows.read import row_of

pytestmark = pytest.mark.unit

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ARGUMENTS = {"city": "Bergen", "days": [1, 2]}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "rain"}
REASONING = {"type": "thinking", "thinking": "let me see"}
CALL = {"type": "function", "function": {"name": "forecast", "arguments": ARGUMENTS}}


def read(*messages, **columns):
    """The example and unread keys of a row with these messages and other columns."""
    return read_example(row_of({"messages": list(messages), **columns}))


def messages_of(*messages):
    """The Messages that are read from a row with these messages."""
    return read(*messages).example.messages


def message_with(call, key="tool_calls"):
    return {"role": "assistant", "content": None, key: call}


@pytest.mark.parametrize("key", ["arguments", "args", "parameters", "input"])
@pytest.mark.parametrize("encode", [dict, json.dumps])
@pytest.mark.parametrize(
    "layout",
    ["openai", "flat", "arguments outside", "langchain", "function_call", "json text"],
)
def test_every_form_of_a_tool_call_gives_the_same_message(key, encode, layout):
    call = {"name": "forecast", key: encode(ARGUMENTS)}
    arguments_outside = {"function": {"name": "forecast"}, key: encode(ARGUMENTS)}
    message = {
        "openai": message_with([{"type": "function", "function": call}]),
        "flat": message_with([call]),
        "arguments outside": message_with([arguments_outside]),
        "langchain": message_with([call | {"type": "tool_call"}]),
        "function_call": message_with(call, "function_call"),
        "json text": message_with(json.dumps([call])),
    }[layout]
    result = read(USER, message)
    assert result.example.messages[1] == Message("assistant", "", others={"tool_calls": [CALL]})
    assert not result.unread


@pytest.mark.parametrize("key", ["arguments", "args", "parameters", "input"])
@pytest.mark.parametrize("encode", [dict, json.dumps])
def test_every_form_of_a_function_call_turn_gives_the_same_message(key, encode):
    call = {"name": "forecast", key: encode(ARGUMENTS)}
    expected = read(USER, message_with([CALL])).example
    for value in (call, json.dumps(call), [call]):
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
        assert read_example(row_of({"conversations": turns})).example == expected


def test_ids_of_calls_and_results_are_kept():
    part = {"type": "tool_use", "id": "toolu_1", "name": "forecast", "input": ARGUMENTS}
    for call in (CALL | {"id": "toolu_1"}, part, CALL | {"call_id": "toolu_1", "index": 0}):
        (message,) = messages_of(message_with([call]))
        assert message.others["tool_calls"] == [CALL | {"id": "toolu_1"}]
    result = {"role": "tool", "content": "rain", "tool_call_id": "toolu_1"}
    assert messages_of(result, ANSWER)[0].others == {"tool_call_id": "toolu_1"}


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (CALL | {"output": "rain"}, ["tool call", "output", "unknown"]),
        ({"name": "f", "arguments": {"a": 1}, "args": {"b": 1}}, ["arguments", "args"]),
        ({"name": "f", "function": {"name": "g"}}, ["name", "different values"]),
        ({"name": "f", "arguments": [1]}, ["arguments", "a list"]),
        ({"name": "f", "arguments": [["city", "B"]]}, ["arguments", "a list", "map", "an object"]),
        ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, ["arguments", "key", "twice"]),
        ({"name": "f", "arguments": "{"}, ["arguments", "not valid JSON"]),
        ({"name": "f", "arguments": "{'a': 1}"}, ["arguments", "Python", "json.dumps"]),
        ({"name": 7}, ["names no function"]),
        ({"name": " ", "arguments": {"a": 1}}, ["names no function"]),
        ({"function": "f"}, ["function of a tool call is text"]),
        (7, ["a tool call is a number"]),
    ],
)
def test_a_tool_call_with_unreadable_values_refuses_the_row(call, facts):
    with refused(*facts, error=RowError):
        read(USER, message_with([call]))


def test_nulls_in_arguments_are_dropped_from_objects_and_kept_in_json_text():
    filled = {"city": "Bergen", "days": [1, 2], "unit": None, "in": {"a": None}}
    call = {"id": None, "function": {"name": "forecast", "arguments": filled, "args": None}}
    (message,) = messages_of(message_with([call]))
    expected = CALL["function"] | {"arguments": ARGUMENTS | {"in": {}}}
    assert message.others["tool_calls"] == [CALL | {"function": expected}]
    (message,) = messages_of(message_with([{"name": "f", "arguments": json.dumps(filled)}]))
    assert message.others["tool_calls"][0]["function"]["arguments"] == filled


def test_anthropic_content_parts_become_reasoning_text_calls_and_results():
    asked = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "let me see", "signature": "c2ln"},
            {"type": "text", "text": "I ask.", "cache_control": {"type": "ephemeral"}},
            {"type": "tool_use", "id": "t1", "name": "forecast", "input": ARGUMENTS},
            {"type": "tool_use", "id": "t2", "name": "now", "input": {}},
        ],
    }
    answered = {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "rain", "is_error": False},
            {
                "type": "tool_result",
                "tool_use_id": "t2",
                "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "on"}],
                "is_error": True,
            },
            {"type": "text", "text": "Well?"},
        ],
    }
    result = read(USER, asked, answered, ANSWER)
    now = {"id": "t2", "type": "function", "function": {"name": "now", "arguments": {}}}
    assert result.example.messages[1:5] == (
        Message(
            "assistant",
            "I ask.",
            others={
                "reasoning_content": "let me see",
                "tool_calls": [CALL | {"id": "t1"}, now],
            },
        ),
        Message("tool", "rain", others={"tool_call_id": "t1"}),
        Message("tool", "noon", others={"tool_call_id": "t2"}),
        Message("user", "Well?"),
    )
    assert result.unread == ("tool_result.is_error",)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (["text", "thinking"], ["thinking", "text"]),
        (["tool_use", "text"], ["text", "call"]),
        (["tool_use", "thinking"], ["thinking", "call"]),
        (["image"], ["'image'", "text parts"]),
        (["redacted_thinking"], ["redacted_thinking"]),
        (["tool_result"], ["tool_result"]),
    ],
)
def test_content_parts_of_an_answer_of_another_type_or_order_refuse_the_row(content, facts):
    value = {"text": "a", "thinking": "t", "name": "f"}
    keys = {"text": ["text"], "thinking": ["thinking"], "tool_use": ["name"]}
    parts = [{"type": kind} | {key: value[key] for key in keys.get(kind, [])} for kind in content]
    with refused(*facts, error=RowError):
        read(USER, {"role": "assistant", "content": parts})


@pytest.mark.parametrize(
    ("message", "facts"),
    [
        ({"role": "tool", "content": [RESULT]}, ["tool", "tool_result"]),
        ({"role": "user", "content": [RESULT | {"content": [RESULT]}]}, ["tool", "tool_result"]),
        ({"role": "user", "content": [RESULT], "name": "Ida"}, ["tool results", "name"]),
        ({"role": "system", "content": [RESULT]}, ["system", "tool_result"]),
        ({"role": "user", "content": [{"type": ["text"], "text": "q"}]}, ["part", "a list"]),
        ({"role": "user", "content": [{"type": "text", "text": "q", "x": 1}]}, ["part", "x"]),
        ({"role": "user", "content": [REASONING]}, ["user", "thinking"]),
        ({"role": "assistant", "content": [REASONING]}, ["assistant", "empty"]),
    ],
)
def test_content_parts_that_are_malformed_or_wrong_for_the_role_refuse_the_row(message, facts):
    with refused(*facts, error=RowError):
        read(message, ANSWER)


def test_reasoning_in_text_parts_is_joined():
    answer = {"type": "text", "text": "a"}
    for reasoning in ("let me", [{"type": "text", "text": "let "}, {"type": "text", "text": "me"}]):
        parts = [{"type": "thinking", "thinking": reasoning}, answer]
        (_, message) = messages_of(USER, {"role": "assistant", "content": parts})
        assert message == Message("assistant", "a", others={"reasoning_content": "let me"})
    with refused("part", "x", error=RowError):
        parts[0]["thinking"][0]["x"] = "y"
        read(USER, {"role": "assistant", "content": parts})


def test_tool_results_of_json_values_become_json_text():
    for result in ({"temp": 20, "wind": "süd"}, [1, {"type": "row"}], 7, True, [], ["a"]):
        message, _ = messages_of({"role": "tool", "content": result}, ANSWER)
        assert json.loads(message.content) == result
    assert "süd" in messages_of({"role": "tool", "content": {"w": "süd"}}, ANSWER)[0].content
    with refused("'image_url'", error=RowError):
        read({"role": "tool", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER)


def test_roles_of_other_formats_become_roles_of_messages():
    result = messages_of(
        {"role": "developer", "content": "be brief"},
        USER,
        {"role": "tool_call", "content": json.dumps(CALL["function"])},
        {"role": "tool_response", "content": "rain"},
        ANSWER,
    )
    assert [message.role for message in result] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert result[2].others == {"tool_calls": [CALL]}


def test_conversations_may_have_role_and_content_keys():
    result = read_example(row_of({"conversations": [USER, ANSWER]})).example
    assert result.messages == messages_of(USER, ANSWER)


def test_different_reasoning_under_two_keys_refuses_the_row():
    twice = ANSWER | {"reasoning": "r", "reasoning_content": "r"}
    assert messages_of(USER, twice)[1].others == {"reasoning_content": "r"}
    with refused("reasoning_content", "thinking", error=RowError):
        read(USER, ANSWER | {"reasoning_content": "r", "thinking": "s"})


def test_metadata_of_messages_is_counted_as_unread_and_other_keys_refuse_the_row():
    result = read(USER | {"timestamp": "10:00", "id": 3}, ANSWER | {"model": "", "refusal": None})
    assert result.unread == ("message.id", "message.timestamp")
    for key, value in (("refusal", "no"), ("audio", {"id": "x"}), ("train", False)):
        with refused(key, "unknown", error=RowError):
            read(USER, ANSWER | {key: value})


LISTED = [USER, message_with([CALL | {"id": "1"}]), {"role": "tool", "content": "rain"}, ANSWER]
TOOL = {"name": "forecast", "parameters": {"type": "object", "properties": {}}}
# The messages of LISTED as one struct of lists, a form that Arrow tables may use.
STRUCT = {
    "role": ["user", "assistant", "tool", "assistant"],
    "content": ["q", None, "rain", "a"],
    "weight": None,
    "tool_calls": [
        None,
        {"id": ["1"], "function": {"name": ["forecast"], "arguments": [ARGUMENTS]}},
        None,
        None,
    ],
}


@pytest.mark.parametrize("messages", [LISTED, json.dumps(LISTED), STRUCT, json.dumps(STRUCT)])
@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        {"name": ["forecast"], "parameters": [TOOL["parameters"]]},
    ],
)
def test_messages_and_tools_are_read_as_lists_json_text_and_structs_of_lists(messages, tools):
    result = read_example(row_of({"messages": messages, "tools": tools})).example
    assert result == read_example(row_of({"messages": LISTED, "tools": [TOOL]})).example
    assert result.tools == ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize("empty", [None, "", "null", "[]", [], {}])
def test_empty_tools_and_calls_in_any_form_are_absent(empty):
    result = read(USER, ANSWER | {"tool_calls": empty}, tools=empty)
    assert result == read(USER, ANSWER)


@pytest.mark.parametrize("empty", [None, "", " ", "null", "{}", {}])
def test_empty_arguments_in_any_form_become_an_empty_object(empty):
    (message,) = messages_of(message_with([{"name": "f", "arguments": empty}]))
    assert message.others["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_nulls_in_tools_are_dropped_from_objects_and_kept_in_json_text():
    tool = TOOL | {"strict": None}
    assert read(USER, ANSWER, tools=[tool]).example.tools[0]["function"] == TOOL
    assert read(USER, ANSWER, tools=json.dumps([tool])).example.tools[0]["function"] == tool


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_arguments_with_a_number_that_is_not_finite_refuse_the_row(number):
    call = {"name": "f", "arguments": f'{{"n": {number}}}'}
    with refused("tool call", error=RowError):
        read(message_with([call]))


def test_a_content_part_with_only_text_needs_no_type():
    """Qwen-Agent writes such parts; in a table the other keys of the schema are null."""
    parts = [{"text": "a", "image": None}, {"type": "text", "text": "b"}]
    question = {"role": "user", "content": "q"}
    result = messages_of(question, {"role": "assistant", "content": parts})
    assert result[1].content == "ab"
    with refused("part", error=RowError):
        read(question, {"role": "assistant", "content": [{"text": "a", "image": "b.png"}]})


def test_tools_of_openai_and_anthropic_become_the_same_tools():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "f", "description": "d", "parameters": schema}
    anthropic = {"name": "f", "description": "d", "input_schema": schema}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for tool in (
        function,
        {"type": "function", **function},
        anthropic,
        {"type": "custom", **anthropic},
    ):
        (result,) = read(*turns, tools=[tool]).example.tools
        assert result == {"type": "function", "function": function}
        assert list(result["function"]) == list(function)


def test_reasoning_given_both_in_a_key_and_in_the_content_is_read_once():
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}
    for key in ("reasoning_content", "reasoning", "thinking"):
        (_, message) = messages_of(USER, answer | {key: "hm"})
        assert message == Message("assistant", "a", others={key: "hm"})
        with refused("reasoning", "content", key, error=RowError):
            messages_of(USER, answer | {key: "another"})


@pytest.mark.parametrize("schema", ["input_schema", "inputSchema", "parametersJsonSchema"])
def test_a_tool_schema_under_any_known_key_is_read_as_parameters(schema):
    tool = {"name": "f", "description": "d", schema: {"type": "object", "properties": {}}}
    expected = {"name": "f", "description": "d", "parameters": tool[schema]}
    result = read(USER, ANSWER, tools=[tool])
    assert result.example.tools == ({"type": "function", "function": expected},)


@pytest.mark.parametrize(
    "tool",
    [
        {"functionDeclarations": [{"description": "d"}]},
        {"toolSpec": {"description": "d"}},
        {"type": "function", "function": {"description": "d"}},
        {"type": "function", "function": "f"},
        {"type": "function", "function": None},
        {"name": "", "description": "d"},
        {"x": 1},
    ],
)
def test_a_tool_without_a_name_refuses_the_row(tool):
    with refused("tool", "names no function", error=RowError):
        read(USER, ANSWER, tools=[tool])


def test_results_of_parallel_calls_are_in_the_order_of_the_calls():
    """A template without ids assigns results to calls by their order."""

    def call(number):
        return {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": {}}}

    def result(number):
        return {"role": "tool", "content": f"r{number}", "tool_call_id": f"c{number}"}

    def results_read(*results):
        """Contents of the tool messages of a row with calls 1 to 3 and these results."""
        calls = [call(number) for number in (1, 2, 3)]
        calling = {"role": "assistant", "content": "", "tool_calls": calls}
        _user, _calling, *tool_messages, _answer = messages_of(USER, calling, *results, ANSWER)
        return [message.content for message in tool_messages]

    assert results_read(result(3), result(1), result(2)) == ["r1", "r2", "r3"]
    assert results_read(result(3), result(2)) == ["r2", "r3"]
    # Results are not sorted if one has an unknown id, no id, or the id of another.
    unknown_id = {"role": "tool", "content": "r", "tool_call_id": "c9"}
    without_id = {"role": "tool", "content": "r"}
    assert results_read(result(2), unknown_id) == ["r2", "r"]
    assert results_read(result(2), without_id, result(1)) == ["r2", "r", "r1"]
    assert results_read(result(2), result(1), result(1)) == ["r2", "r1", "r1"]


def test_a_result_before_its_call_refuses_the_row():
    call = message_with([{"id": "c1", **CALL}])
    result = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    with refused("messages[1]", "c1", "call", "after", error=RowError):
        read(USER, result, call, ANSWER)
    with refused("messages[1]", "c1", error=RowError):
        read(USER, result, call, result, ANSWER)
    # A later turn may use the same id, because some programs restart their numbers in each turn.
    assert len(messages_of(USER, call, result, call, result, ANSWER)) == 6
    # The call of a result may be missing, for example in the rest of a longer conversation.
    assert len(messages_of(USER, result, ANSWER)) == 3


TAGS = ["<think>", "\n<thinking>\n", "<seed:think>", "[THINK]"]


@pytest.mark.parametrize("tag", TAGS)
def test_an_answer_that_was_cut_off_in_its_reasoning_refuses_the_row(tag):
    cut_off = {"role": "assistant", "content": f"{tag}I need the forecast, so"}
    turn = {"from": "gpt", "value": cut_off["content"]}
    for row in ({"messages": [USER, cut_off]}, {"conversations": [USER, turn]}):
        with refused("assistant", tag.strip(), "closed", error=RowError):
            read_example(row_of(row))
    call = {"tool_calls": [CALL]}
    with refused(tag.strip(), "closed", error=RowError):
        read(USER, cut_off | call)
    text = cut_off["content"]
    for row in ({"instruction": "q", "output": text}, {"prompt": "q", "completion": text}):
        with refused(tag.strip(), "closed", error=RowError):
            read_example(row_of(row))


def test_a_completion_that_closes_reasoning_that_its_prompt_does_not_open_refuses_the_row():
    row = {"prompt": "q", "completion": "hm</think>yes"}
    with refused("`completion`", "</think>", "<think>", error=RowError):
        read_example(row_of(row))
    for opened in (row | {"prompt": "q <think>"}, row | {"completion": "<think>hm</think>yes"}):
        assert read_example(row_of(opened)).example.completion == opened["completion"]


@pytest.mark.parametrize("opening", ['<thought step="1">', "<thought\nid='a'>"])
def test_reasoning_may_be_opened_by_a_tag_with_attributes(opening):
    completion = f"first {opening}hm</thought> yes"
    row = {"prompt": "q", "completion": completion}
    assert read_example(row_of(row)).example.completion == completion
    with refused("`completion`", "</thought>", error=RowError):
        read_example(row_of(row | {"completion": completion.replace("<thought", "<thoughts")}))


@pytest.mark.parametrize("tag", TAGS)
def test_a_reasoning_tag_is_kept_if_it_is_closed_or_quoted_or_in_an_untrained_message(tag):
    closing = tag.strip().replace("<", "</").replace("[", "[/")
    for message in (
        {"role": "assistant", "content": f"{tag}hm{closing}yes"},
        {"role": "assistant", "content": tag, "weight": 0},
        {"role": "assistant", "content": f"Put it between {tag} and its end."},
    ):
        assert messages_of(USER, message, USER, ANSWER)[1].content == message["content"]


def test_an_untrained_answer_in_the_prompt_may_end_within_its_reasoning():
    cut_off = {"role": "assistant", "content": "<think>I need"}
    row = {"prompt": [USER, cut_off, USER], "completion": [ANSWER]}
    assert read_example(row_of(row)).example.messages[1].content == "<think>I need"
