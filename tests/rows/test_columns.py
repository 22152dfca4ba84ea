"""Columns that no format reads: used, counted by name, or the row is refused."""

import pytest

from pipeline.rows.examples import Message, RowError
from pipeline.rows.formats import read_example
from tests.messages import refused
from tests.rows.reading import row_of

pytestmark = pytest.mark.unit

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FORMATS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "t"},
    "pre-tokenised": {"input_ids": [1], "labels": [1]},
}
EMPTY = [None, "", " \n", [], {}, [None], [""], {"bytes": None, "path": None}]
CHANGING = ["image", "images", "Pictures", "audio", "videos", "image_path", "documents", "sound"]
CHANGING += ["chosen", "rejected", "rejected_response", "chosen_messages"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", CHANGING)
def test_a_column_that_changes_what_a_row_means_goes_by_its_value(name, column):
    row = FORMATS[name]
    plain = read_example(row_of(row))
    assert plain.data_format == name
    for empty in EMPTY:
        assert read_example(row_of(row | {column: empty})) == plain
    for value in ("x.png", ["x.png"], [{"path": "x.png"}], {"role": "assistant", "content": "b"}):
        with refused(f"`{column}`", error=RowError):
            read_example(row_of(row | {column: value}))


@pytest.mark.parametrize("name", FORMATS)
def test_other_columns_with_a_value_are_named(name):
    row = FORMATS[name]
    others = {"label": True, "score": 0, "meta": {"a": [None, "x"]}, "note": "n"}
    found = read_example(row_of(row | others | dict.fromkeys("abc") | {"d": "", "e": [[]]}))
    assert found.unread == ("label", "meta", "note", "score")
    assert found.example == read_example(row_of(row)).example


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt-completion"])
def test_an_answer_that_is_marked_as_undesirable_is_not_trained_on(name):
    row = FORMATS[name]
    for column, value in [
        ("label", False), ("label", "False"), ("kto_tag", False), ("desirable", "false"),
        ("undesirable", True), ("is_undesirable", "true"),
    ]:  # fmt: skip
        with refused(f"`{column}`", "undesirable", error=RowError):
            read_example(row_of(row | {column: value}))
    for column, value in [("label", True), ("label", 0), ("label", "no"), ("undesirable", False)]:
        found = read_example(row_of(row | {column: value}))
        assert found.unread == (column,)


def test_the_label_of_a_text_is_its_class():
    assert read_example(row_of({"text": "t", "label": False})).unread == ("label",)


def test_pairs_of_answers_are_trained_on_where_the_user_names_one():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "rejected_score": 1}
    found = read_example(row_of(row), "auto", {"completion": "chosen"})
    assert found.example == read_example(row_of({"prompt": "q", "completion": "a"})).example
    assert found.unread == ("rejected", "rejected_score")
    with refused("`chosen`", "columns", error=RowError):
        read_example(row_of(row))


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca"])
def test_a_system_prompt_in_a_column_is_the_first_message(name, column):
    row = FORMATS[name]
    found = read_example(row_of(row | {column: "be brief"}))
    assert found.example.messages[0] == Message("system", "be brief")
    assert not found.unread
    for empty in EMPTY[:4]:
        assert read_example(row_of(row | {column: empty})) == read_example(row_of(row))


def test_a_column_whose_name_another_takes_is_named():
    row = {"question": "q", "answer": "a", "prompt": "not this", "completion": ""}
    columns = {"prompt": "question", "completion": "answer"}
    assert read_example(row_of(row), "auto", columns).unread == ("prompt",)


def test_a_mapped_column_that_the_format_does_not_read_is_named_as_in_the_data():
    row = FORMATS["messages"] | {"context": "c"}
    assert read_example(row_of(row), "auto", {"input": "context"}).unread == ("context",)


def test_names_with_characters_that_no_terminal_writes_are_escaped():
    row = FORMATS["messages"] | {"half\ud83d": 1, "red\x1b[31m": 1}
    assert read_example(row_of(row)).unread == ("half\\ud83d", "red\\x1b[31m")
    with pytest.raises(RowError) as refusal:
        read_example(row_of({"half\ud83d": 1}))
    assert "half\\ud83d" in str(refusal.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", ["response_rejected", "answer_chosen", "image_base64", "img"])
def test_other_spellings_of_pairs_and_pictures_go_by_their_value(name, column):
    with refused(f"`{column}`", error=RowError):
        read_example(row_of(FORMATS[name] | {column: "x"}))


def test_a_system_prompt_may_be_text_parts():
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    found = read_example(row_of(FORMATS["messages"] | {"system": parts}))
    assert found.example.messages[0] == Message("system", "be brief")
