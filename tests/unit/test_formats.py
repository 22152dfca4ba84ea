from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.formats import Completion, Conversation, Message, RowError, to_example
from pipeline.data.sources import Row

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def example(value):
    return to_example(Row(Path("rows.jsonl"), 1, value))


def test_messages():
    system = {"role": "system", "content": "s"}
    row = {"messages": [system, USER, ANSWER], "id": 7, "source": None}
    expected = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
    assert example(row) == Conversation(expected)


def test_prompt_and_completion():
    found = example({"prompt": "", "completion": " a", "id": 1})
    assert found == Completion("", " a")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "q", "output": "a"}, ["instruction, output", "`messages`", "`prompt`"]),
        ({}, ["columns none"]),
        ({"prompt": "q"}, ["columns prompt", "`completion`"]),
        ({"messages": [USER, ANSWER], "completion": "a"}, ["both"]),
        ({"messages": "hello"}, ["`messages` is text", "list"]),
        ({"messages": []}, ["no assistant message"]),
        ({"messages": [USER]}, ["no assistant message"]),
        ({"messages": ["hello"]}, ["a message is text"]),
        ({"messages": [{"role": "bot", "content": "a"}]}, ["'bot'", "system, user, assistant"]),
        ({"messages": [{"content": "a"}]}, ["role null"]),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ["role a list"]),
        ({"messages": [{"role": "user"}, ANSWER]}, ["content of a message (user) is null"]),
        ({"messages": [{"role": "user", "content": [{}]}, ANSWER]}, ["is a list; expected text"]),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, ["message is empty"]),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, ["has tool_calls"]),
        ({"prompt": 7, "completion": "a"}, ["`prompt` is a number"]),
        ({"prompt": "q", "completion": None}, ["`completion` is null"]),
        ({"prompt": "q", "completion": "  "}, ["`completion` is empty"]),
        ({"prompt": "q", "completion": "\ud800"}, ["surrogate"]),
    ],
)
def test_what_cannot_be_trained_on_says_why(row, said):
    with pytest.raises(RowError) as raised:
        example(row)
    for words in said:
        assert words in str(raised.value)


def test_one_empty_answer_among_good_ones_refuses_the_row():
    with pytest.raises(RowError, match="empty"):
        example({"messages": [USER, ANSWER, USER, {"role": "assistant", "content": ""}]})


VALUES = st.sampled_from([None, True, 7, 0.5, "", " ", "text", "user", "assistant", [], {}, [[]]])
MESSAGES = st.lists(VALUES | st.fixed_dictionaries({"role": VALUES, "content": VALUES}), max_size=3)
COLUMNS = st.sampled_from(["messages", "prompt", "completion", "text"])


@given(st.dictionaries(COLUMNS, VALUES | MESSAGES, max_size=3))
def test_any_row_is_an_example_or_a_reason(row):
    try:
        found = example(row)
    except RowError:
        return
    if isinstance(found, Completion):
        assert found.completion.strip()
        return
    answers = [m.content for m in found.messages if m.role == "assistant"]
    assert answers
    assert all(text.strip() for text in answers)
