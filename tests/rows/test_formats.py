"""Each format is read into examples; a row without an example is rejected with the reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.data_names import COLUMNS
from pipeline.config.settings import RunSettings
from pipeline.rows import formats
from pipeline.rows.examples import Completion, Conversation, Message, RowError, Text, Tokens
from pipeline.rows.formats import FORMATS, read_example
from tests.messages import refused
from tests.rows.read import row_of

pytestmark = pytest.mark.unit

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
WITH_CALL = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
TURNS = (Message("user", "q"), Message("assistant", "a"))


def example(row, data_format="auto", columns=None):
    """The example of a row; `columns`: name of a column of the format -> its name in the row."""
    return read_example(row_of(row), data_format, columns or {}).example


def test_messages_become_a_conversation():
    system = {"role": "system", "content": "s"}
    row = {"messages": [system, USER, ANSWER], "id": 7, "source": None}
    assert example(row) == Conversation((Message("system", "s"), *TURNS))


@pytest.mark.parametrize(
    ("weight", "is_trained"), [(0, False), (1, True), (0.0, False), (1.0, True), (None, True)]
)
def test_only_messages_of_weight_0_are_excluded_from_the_loss(weight, is_trained):
    (_, answer) = example({"messages": [USER, ANSWER | {"weight": weight}]}).messages
    assert answer.is_trained is is_trained


def test_a_question_may_have_weight_0():
    (question, _) = example({"messages": [USER | {"weight": 0}, ANSWER]}).messages
    assert question.is_trained is False


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_its_key(key):
    (_, answer) = example({"messages": [USER, ANSWER | {key: "r", "refusal": None}]}).messages
    assert answer.others == {key: "r"}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "\nb"}]
    (_, answer) = example({"messages": [USER, ANSWER | {"content": parts}]}).messages
    assert answer.content == "a\nb"


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_arguments_of_tool_calls_become_objects(arguments):
    given_call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    tool = {"name": "f", "parameters": {"type": "object"}}
    row = {"messages": [USER, WITH_CALL | {"tool_calls": [given_call]}, RESULT, ANSWER]}
    wrapped = {"type": "function", "function": tool}
    for tools in ({"tools": [wrapped]}, {"tools": json.dumps([wrapped])}, {"functions": [tool]}):
        result = example(row | tools)
        assert result.tools == (wrapped,)
        _, call, result, _ = result.messages
        assert call == Message("assistant", "", others={"tool_calls": [CALL | {"id": "1"}]})
        assert result == Message("tool", "r", others={"name": "f", "tool_call_id": "1"})
    assert example(row | {"tools": None}).tools == ()


def test_a_function_call_of_the_older_api_becomes_a_tool_call():
    call = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    result = example({"messages": [USER, call, {"role": "function", "name": "f", "content": "r"}]})
    assert result.messages[1].others == {"tool_calls": [CALL]}
    assert result.messages[2] == Message("tool", "r", others={"name": "f"})


def test_sharegpt_turns_become_messages():
    turns = [
        {"from": "system", "value": "s"},
        HUMAN,
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "r"},
        GPT | {"weight": 0},
    ]
    result = example({"conversations": turns, "tools": json.dumps([{"name": "f"}])})
    assert [message.role for message in result.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert result.messages[2] == Message("assistant", "", others={"tool_calls": [CALL]})
    assert result.messages[4] == Message("assistant", "a", is_trained=False)
    assert result.tools == ({"type": "function", "function": {"name": "f"}},)
    assert example({"conversations": [HUMAN, GPT], "system": "s"}).messages[0].role == "system"


def test_an_alpaca_row_becomes_a_user_and_an_assistant_message():
    row = {"instruction": "do", "input": "this", "output": "done"}
    assert example(row).messages == (Message("user", "do\n\nthis"), Message("assistant", "done"))
    assert example(row | {"input": ""}).messages[0].content == "do"
    assert example({"instruction": "do", "output": "done"}).messages[0].content == "do"
    assert example(row | {"text": "Below is an instruction"}) == example(row)


def test_prompt_and_completion_texts_are_kept_verbatim():
    result = example({"prompt": "", "completion": " a", "id": 1, "system": "", "tools": None})
    assert result == Completion("", " a")


def test_assistant_messages_of_a_prompt_are_not_trained_on():
    result = example({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [message.is_trained for message in result.messages] == [True, False, True, True]


def test_text_is_kept_verbatim():
    assert example({"text": " t", "meta": {}}) == Text(" t")


def test_pre_tokenised_rows_are_read_without_their_padding():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    expected = Tokens((5, 6, 7), (False, True, True))
    assert example(row) == expected
    assert example(row | {"attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]}) == expected
    padded = {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, -100, 6, 7, -100]}
    assert example(padded | {"attention_mask": [0, 1, 1, 1, 0]}) == expected


def test_columns_that_the_setting_columns_maps_take_precedence():
    row = {"question": "q", "answer": "a", "prompt": "not this"}
    columns = {"prompt": "question", "completion": "answer"}
    assert example(row, "auto", columns) == Completion("q", "a")
    assert example({"body": "t", "text": "no"}, "text", {"text": "body"}) == Text("t")
    openai_turns = {"conversations": [USER, ANSWER]}
    assert example(openai_turns, "auto", {"messages": "conversations"}) == Conversation(TURNS)
    with refused("`answer`", "completion", "`columns`", error=RowError):
        example({"question": "q"}, "auto", columns)


def test_the_format_of_a_row_without_the_mapped_columns_is_detected_by_its_own_columns():
    columns = {"prompt": "question", "completion": "answer"}
    assert example({"messages": [USER, ANSWER]}, "auto", columns) == Conversation(TURNS)
    assert example({"prompt": "q", "completion": "a"}, "auto", columns) == Completion("q", "a")
    turns = {"conversations": [HUMAN, GPT]}
    assert read_example(row_of(turns), "auto", columns).data_format == "sharegpt"
    for column in ("system", "tools", "input"):  # the row has no column x, so it is misspelt
        with refused("`x`", column, "`columns`", error=RowError):
            example({"messages": [USER, ANSWER]}, "auto", {column: "x"})
    for row in ({"text": "t"}, {"messages": [USER, ANSWER], "question": "q"}, {"prompt": "q"}):
        with refused("no column", error=RowError):
            example(row, "auto", columns)


def test_an_unknown_or_ambiguous_column_mapping_is_refused_by_the_settings():
    def settings(columns):
        return RunSettings(model="m", train_data="t", output_dir="o", columns=columns)

    for required in formats._REQUIRED.values():
        assert set(required) <= set(COLUMNS)
    with refused("promt", "messages", error=ValidationError):
        settings({"promt": "question"})
    with refused("q", "two columns", error=ValidationError):
        settings({"prompt": "q", "completion": "q"})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [], "prompt": "q", "prompt_id": 1}, "messages"),
        ({"messages": None, "prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"instruction": "", "output": "", "text": ""}, "alpaca"),
        ({"text": ""}, "text"),
        ({"input_ids": [], "labels": [], "text": ""}, "pre-tokenised"),
    ],
)
def test_the_format_is_detected_by_the_columns_even_if_they_are_empty(row, expected):
    assert formats._detect_format(row) == expected
    assert set(formats._REQUIRED) == set(FORMATS)


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"instruction": "q"}, ["columns `instruction`", "alpaca (`instruction`, `output`)"]),
        ({}, ["columns none"]),
        ({"prompt": "q"}, ["columns `prompt`", "`completion`"]),
        ({"messages": [USER, ANSWER], "completion": "a"}, ["both"]),
        ({"messages": [USER, ANSWER], "conversations": []}, ["messages and of sharegpt"]),
        ({"messages": "hello"}, ["`messages` is text", "JSON"]),
        ({"messages": []}, ["no assistant message"]),
        ({"messages": [USER]}, ["no assistant message"]),
        ({"messages": ["hello"]}, ["a message is text"]),
        ({"messages": [{"role": "robot", "content": "a"}]}, ["'robot'", "user", "assistant"]),
        ({"messages": [{"content": "a"}]}, ["role null"]),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ["role a list"]),
        ({"messages": [{"role": "user"}, ANSWER]}, ["content of a message (user) is null"]),
        ({"messages": [{"role": "user", "content": [{}]}, ANSWER]}, ["part without a value"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            ["'image_url'", "text parts only"],
        ),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, ["message is empty"]),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]}, ["names no function"]),
        ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, ["user has tool_calls"]),
        ({"messages": [USER, ANSWER | {"tool_calls": 7}]}, ["tool_calls of a message is a number"]),
        ({"messages": [USER, WITH_CALL | {"function_call": {"name": "f"}}]}, ["both tool_calls"]),
        (
            {"messages": [USER, WITH_CALL | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
            ["not valid JSON"],
        ),
        (
            {"messages": [USER, WITH_CALL | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            ["arguments of a tool call: a list"],
        ),
        (
            {
                "messages": [
                    USER,
                    WITH_CALL | {"tool_calls": [{"name": "f", "arguments": {"n": Path()}}]},
                ]
            },
            ["a tool call", "JSON"],
        ),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, ["neither 0 nor 1"]),
        ({"messages": [USER, ANSWER | {"weight": "0"}]}, ["weight", "is text", "0 or 1"]),
        *(
            ({"messages": [USER, ANSWER | {key: False}]}, [f"`{key}`", "weight: 0"])
            for key in ("train", "trainable", "training", "loss", "loss_mask", "masked")
        ),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, ["role user has weight 1"]),
        ({"messages": [USER, ANSWER | {"refusal": "r"}]}, ["unknown", "refusal"]),
        ({"messages": [USER | {"thinking": "r"}, ANSWER]}, ["role user has thinking"]),
        ({"messages": [USER, ANSWER | {"name": 7}]}, ["name of a message is a number"]),
        ({"messages": [USER, ANSWER], "tools": [7]}, ["`tools` is not a list of objects"]),
        ({"messages": [USER, ANSWER], "tools": [CALL], "functions": [CALL]}, ["both `tools`"]),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, ["chat_template_kwargs"]),
        (
            {"messages": [{"role": "system", "content": "a"}, ANSWER], "system": "b"},
            ["`system`", "first message", "system prompts"],
        ),
        ({"conversations": [HUMAN, {"from": "robot", "value": "a"}]}, ["from 'robot'", "human"]),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, ["message is empty"]),
        ({"conversations": [HUMAN, GPT | {"train": False}]}, ["unknown", "train"]),
        ({"conversations": {}}, ["`conversations` is an object"]),
        ({"instruction": "q", "output": " "}, ["`output` is empty"]),
        ({"instruction": " ", "output": "a"}, ["`instruction` is empty"]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, ["`history`"]),
        ({"prompt": 7, "completion": "a"}, ["`prompt` is a number"]),
        ({"prompt": "q", "completion": None}, ["`completion` is null"]),
        ({"prompt": "q", "completion": "  "}, ["`completion` is empty"]),
        ({"prompt": "q", "completion": "\ud800"}, ["surrogate"]),
        *(
            (
                {"prompt": "q", "completion": "a", column: value},
                [f"`{column}`", "`prompt`", "chat template"],
            )
            for column, value in (("system", "s"), ("tools", [CALL]), ("functions", "[{}]"))
        ),
        ({"prompt": [USER], "completion": "a"}, ["`prompt` is a list and `completion` text"]),
        ({"prompt": [ANSWER], "completion": [USER]}, ["`completion` has no assistant message"]),
        ({"text": ["t"]}, ["`text` is a list"]),
        ({"text": " "}, ["`text` is empty"]),
        ({"input_ids": [1], "labels": [1, 2]}, ["`input_ids`", "`labels`", "length"]),
        ({"input_ids": [1, 2], "labels": [2, -100]}, ["`labels`", "-100", "`input_ids`"]),
        ({"input_ids": [1, True], "labels": [1, 1]}, ["holds true or false"]),
        ({"input_ids": [-1], "labels": [-1]}, ["negative"]),
        ({"input_ids": [1, 2**70], "labels": [1, 2**70]}, ["`input_ids`", "token id"]),
        ({"input_ids": [], "labels": []}, ["`input_ids` is empty"]),
        ({"input_ids": "1 2", "labels": [1, 2]}, ["`input_ids` is text"]),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 1]},
            ["labels", "attention_mask", 0],
        ),
        ({"input_ids": [1] * 3, "labels": [-100] * 3, "attention_mask": [1, 0, 1]}, ["padding"]),
        (
            {"input_ids": [1, 1], "labels": [1, 1], "position_ids": [0, 0]},
            ["`position_ids`", "one document"],
        ),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_rejected_with_the_reason(row, facts):
    with refused(*facts, error=RowError):
        example(row)


def test_a_row_without_the_columns_of_the_named_format_is_rejected():
    with refused("`messages`", "data_format messages", error=RowError):
        example({"prompt": "q", "completion": "a"}, "messages")
    both = {"messages": [USER, ANSWER], "conversations": [HUMAN, GPT]}
    assert example(both, "sharegpt") == example(both, "messages") == Conversation(TURNS)


def test_one_empty_answer_among_others_rejects_the_row():
    with refused("empty", error=RowError):
        example({"messages": [USER, ANSWER, USER, {"role": "assistant", "content": ""}]})


VALUES = st.sampled_from([None, True, 7, 0.5, "", " ", "text", "user", "assistant", [], {}, [[]]])
KEYS = ["role", "content", "from", "value", "weight", "tool_calls", "type", "text", "name"]
PARTS = st.lists(VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), max_size=3)
MESSAGES = st.lists(
    VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES | PARTS, max_size=4), max_size=3
)


@given(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES | MESSAGES, max_size=4),
    st.sampled_from(["auto", *FORMATS]),
)
def test_any_row_is_an_example_or_is_rejected(row, data_format):
    try:
        result = example(row, data_format)
    except RowError:
        return
    if isinstance(result, Completion):
        assert result.completion.strip()
    elif isinstance(result, Conversation):
        answers = [message for message in result.messages if message.role == "assistant"]
        assert answers
        assert all(answer.content.strip() or answer.others["tool_calls"] for answer in answers)
    else:
        assert result.text.strip() if isinstance(result, Text) else result.ids
