"""A row that already has the tag that its chat template writes around a text is refused."""

import pytest

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import chat, marked_text, tokenizer_with
from tests.messages import refused

pytestmark = pytest.mark.tensor

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content.strip() }}
</tool_response>{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def agent(result):
    messages = (Message("user", "q"), Message("assistant", "I look"), Message("tool", result))
    return Conversation((*messages, Message("assistant", "yes")))


@pytest.mark.parametrize("space", ["", "\n", "  "])
def test_a_tool_result_with_the_template_s_own_tag_is_refused(space):
    result = f"{space}<tool_response>{space}rain{space}</tool_response>"
    with refused("messages[2].content", "<tool_response>", "twice", error=RowError):
        marked_text(agent(result), tokenizer_with(TEMPLATE))


@pytest.mark.parametrize("result", ["<b>rain</b>", "rain <tool_response>", "</tool_response>"])
def test_a_tool_result_with_other_tags_is_written_unchanged(result):
    assert result in marked_text(agent(result), tokenizer_with(TEMPLATE))


def test_equal_tags_of_two_texts_of_the_row_are_written_unchanged():
    template = TEMPLATE.replace("<|im_start|>{{ m.role }}\n", "", 1)
    template = template.replace("<|im_end|>", "{{ '<|im_end|>' if m.role == 'assistant' }}")
    text = marked_text(chat("a <b>", "<b> c"), tokenizer_with(template))
    assert "a <b>" in text
    assert "<b> c" in text
