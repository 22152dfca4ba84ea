"""Each template masks each kind of conversation correctly or refuses it, as in docs/masks.md.

A family is a group of models with the same chat template, for example "qwen3"; the templates are in
tests/templates. A mask says which tokens count in the loss.
"""

import re

import pytest

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import chat, encoder
from tests.data.chat.matrix import FAMILIES, TEMPLATES, table, tokenizer, written_table
from tests.messages import refused

pytestmark = pytest.mark.tensor


def test_every_template_is_in_the_matrix():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


# Published template "of" repository, its commit or release, and the day of the comparison.
COMPARED = re.compile(
    r"(Compared with .+, (commit|tag|release) [^,]+, 20\d\d-\d\d-\d\d: equal|Not compared)\b"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_line_names_the_published_template_of_the_comparison(family):
    first, _, _ = (TEMPLATES / f"{family}.jinja").read_text("utf-8").partition("\n")
    assert COMPARED.search(first), first


def test_every_cell_of_the_matrix_is_as_documented():
    assert table() == written_table(), "run `make templates`"


def supervised(conversation, family):
    """The supervised text; None if the template refuses the conversation."""
    family_tokenizer = tokenizer(family)
    try:
        (document,) = encoder(family_tokenizer).encode(conversation)
    except RowError:
        return None
    return family_tokenizer.decode(document.ids[document.supervised])


def calls_with_results(result):
    """A conversation with two tool calls that both have this result."""

    def call(number):
        function = {"name": "look", "arguments": {"at": f"sky{number}"}}
        tool_call = {"id": f"abcdefgh{number}", "type": "function", "function": function}
        others = {"tool_call_id": f"abcdefgh{number}"}
        return (
            Message("assistant", "", True, {"tool_calls": [tool_call]}),
            Message("tool", result, True, others),
        )

    messages = (Message("user", "q"), *call(1), *call(2), Message("assistant", "blue"))
    return Conversation(messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_supervised_text_does_not_depend_on_empty_questions_or_results(family):
    with_questions = supervised(chat("q", "one", "r", "two"), family)
    assert with_questions is not None
    assert supervised(chat("", "one", "", "two"), family) == with_questions
    with_results = supervised(calls_with_results("light"), family)
    assert supervised(calls_with_results(""), family) == with_results


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_becomes_a_content_part_if_the_template_expects_parts(key):
    asked = Message("user", "q")
    answer = Message("assistant", "blue", others={key: "hm"})
    (document,) = encoder(tokenizer("ministral-3")).encode(Conversation((asked, answer)))
    decode = tokenizer("ministral-3").decode
    assert decode(document.ids[document.supervised]) == "[THINK]hm[/THINK]blue</s>"
    without_reasoning = encoder(tokenizer("ministral-3"), train_on_reasoning=False)
    (document,) = without_reasoning.encode(Conversation((asked, answer)))
    assert decode(document.ids[document.supervised]) == "blue</s>"
    assert "[THINK]hm[/THINK]" in decode(document.ids)


def with_tool(**function):
    tool = {"type": "function", "function": {"name": "look", **function}}
    return Conversation(chat("q", "a").messages, (tool,))


SCHEMA = {"type": "object", "properties": {"at": {"type": "string", "description": "d"}}}


@pytest.mark.parametrize("family", ["command-r7b", "gemma-4", "gpt-oss"])
def test_a_tool_without_a_key_that_the_template_reads_is_refused(family):
    with refused("tools[0].function", "no description", error=RowError):
        encoder(tokenizer(family)).encode(with_tool(parameters=SCHEMA))
    encoder(tokenizer(family)).encode(with_tool(parameters=SCHEMA, description="d"))


def test_a_tool_without_a_key_that_is_written_as_json_is_refused():
    with refused("tools[0].function", "no parameters", error=RowError):
        encoder(tokenizer("command-r7b")).encode(with_tool(description="d"))


@pytest.mark.parametrize("family", ["deepseek-v3", "llama-3", "smollm2"])
def test_all_tools_are_refused_together_if_the_template_writes_none(family):
    with refused("has tools", "system message", "chat_template", error=RowError):
        encoder(tokenizer(family)).encode(with_tool(parameters=SCHEMA, description="d"))


# phi-4-first has no header here, and nothing predicts the first token of a document.
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"phi-4-first"}))
def test_the_markup_of_answers_is_supervised_also_if_the_assistant_begins(family):
    """The markup that the model generates: channel headers, empty reasoning, answer markers."""
    assistant_begins = chat("hello", "q", "one", "r", "two", first="assistant")
    user_begins = chat("s", "hello", "q", "one", "r", "two")
    text = supervised(assistant_begins, family)
    assert text in (None, supervised(user_begins, family))  # None: the template refuses the first
