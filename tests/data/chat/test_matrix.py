"""No template trains any kind of conversation wrongly, and docs/masks.md says which it refuses."""

import pytest

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import chat, encoder
from tests.data.chat.matrix import FAMILIES, TEMPLATES, table, tokenizer, written_table
from tests.messages import refused

pytestmark = pytest.mark.tensor


def test_every_template_is_in_the_matrix():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


def test_every_cell_is_trained_right_or_refused_as_the_docs_say():
    assert table() == written_table(), "run `make templates`"


def supervised(conversation, family):
    """The text that counts in the loss; None where the template refuses the conversation."""
    made = tokenizer(family)
    try:
        (document,) = encoder(made).encode(conversation)
    except RowError:
        return None
    return made.decode(document.ids[document.supervised])


def calls_with_results(result):
    def call(number):
        function = {"name": "look", "arguments": {"at": f"sky{number}"}}
        given = {"id": f"abcdefgh{number}", "type": "function", "function": function}
        others = {"tool_call_id": f"abcdefgh{number}"}
        return (
            Message("assistant", "", True, {"tool_calls": [given]}),
            Message("tool", result, True, others),
        )

    messages = (Message("user", "q"), *call(1), *call(2), Message("assistant", "blue"))
    return Conversation(messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_question_or_result_changes_nothing_of_what_is_trained(family):
    asked = supervised(chat("q", "one", "r", "two"), family)
    assert asked is not None
    assert supervised(chat("", "one", "", "two"), family) == asked
    with_results = supervised(calls_with_results("light"), family)
    assert supervised(calls_with_results(""), family) == with_results


@pytest.mark.parametrize("thought", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_a_part_of_the_content_where_the_template_has_such_parts(thought):
    asked = Message("user", "q")
    answer = Message("assistant", "blue", others={thought: "hm"})
    (document,) = encoder(tokenizer("ministral-3")).encode(Conversation((asked, answer)))
    decode = tokenizer("ministral-3").decode
    assert decode(document.ids[document.supervised]) == "[THINK]hm[/THINK]blue</s>"
    made = encoder(tokenizer("ministral-3"), train_on_reasoning=False)
    (document,) = made.encode(Conversation((asked, answer)))
    assert decode(document.ids[document.supervised]) == "blue</s>"
    assert "[THINK]hm[/THINK]" in decode(document.ids)


def with_tool(**function):
    tool = {"type": "function", "function": {"name": "look", **function}}
    return Conversation(chat("q", "a").messages, (tool,))


SCHEMA = {"type": "object", "properties": {"at": {"type": "string", "description": "d"}}}


@pytest.mark.parametrize("family", ["command-r7b", "gemma-4", "gpt-oss"])
def test_a_key_that_a_template_reads_and_a_tool_lacks_is_named(family):
    with refused("tools[0].function", "no description", error=RowError):
        encoder(tokenizer(family)).encode(with_tool(parameters=SCHEMA))
    encoder(tokenizer(family)).encode(with_tool(parameters=SCHEMA, description="d"))


def test_a_key_that_is_missing_in_json_is_named():
    with refused("tools[0].function", "no parameters", error=RowError):
        encoder(tokenizer("command-r7b")).encode(with_tool(description="d"))


@pytest.mark.parametrize("family", ["deepseek-v3", "llama-3", "smollm2"])
def test_tools_are_refused_as_one_where_the_template_writes_none(family):
    with refused("has tools", "system message", "chat_template", error=RowError):
        encoder(tokenizer(family)).encode(with_tool(parameters=SCHEMA, description="d"))


# phi-4-first has no header here, and nothing predicts the first token of a document.
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"phi-4-first"}))
def test_a_conversation_that_the_assistant_opens_trains_the_same_markup(family):
    """All that the model writes itself: channel headers, empty reasoning, markers of answers."""
    opened = supervised(chat("hello", "q", "one", "r", "two", first="assistant"), family)
    asked = supervised(chat("s", "hello", "q", "one", "r", "two"), family)
    assert opened in (None, asked)
