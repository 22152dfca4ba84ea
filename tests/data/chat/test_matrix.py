"""No template trains any kind of conversation wrongly, and docs/masks.md says which it refuses."""

import pytest

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.chatting import chat, encoder
from tests.data.chat.matrix import FAMILIES, TEMPLATES, table, tokenizer, written_table

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
    # DeepSeek V3 begins such a turn at no certain place: refused.
    with_results = supervised(calls_with_results("light"), family)
    assert supervised(calls_with_results(""), family) in (with_results, None)
