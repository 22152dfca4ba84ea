"""Tags in the texts of a row, such as <tool_response> and </think>.

A row is refused if the template would write a tag of the text a second time, or if a tag closes
reasoning that is not open.
"""

import pytest

from pipeline.rows.examples import Completion, Conversation, Message, RowError
from tests.data.chat.documents import chat, encoder, marked_text, tokenizer_with
from tests.messages import refused

pytestmark = pytest.mark.tensor

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content.strip() }}
</tool_response>{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def conversation_with_tool(result):
    messages = (Message("user", "q"), Message("assistant", "I look"), Message("tool", result))
    return Conversation((*messages, Message("assistant", "yes")))


@pytest.mark.parametrize("space", ["", "\n", "  "])
def test_a_tool_result_with_the_template_s_own_tag_is_refused(space):
    result = f"{space}<tool_response>{space}rain{space}</tool_response>"
    with refused("messages[2].content", "<tool_response>", "twice", error=RowError):
        marked_text(conversation_with_tool(result), tokenizer_with(TEMPLATE))


@pytest.mark.parametrize("result", ["<b>rain</b>", "rain <tool_response>", "</tool_response>"])
def test_a_tool_result_with_other_tags_is_written_unchanged(result):
    assert result in marked_text(conversation_with_tool(result), tokenizer_with(TEMPLATE))


def test_equal_tags_of_two_texts_of_the_row_are_written_unchanged():
    template = TEMPLATE.replace("<|im_start|>{{ m.role }}\n", "", 1)
    template = template.replace("<|im_end|>", "{{ '<|im_end|>' if m.role == 'assistant' }}")
    text = marked_text(chat("a <b>", "<b> c"), tokenizer_with(template))
    assert "a <b>" in text
    assert "<b> c" in text


# Templates that write a content unchanged: without reasoning, with reasoning opened only in the
# generation prompt, and with reasoning opened also before each answer.
PLAIN = TEMPLATE
PROMPTED = TEMPLATE.replace("|>assistant\n", "|>assistant\n<think>")
OPENED = PROMPTED.replace(
    "{{ m.role }}\n", "{{ m.role }}\n{% if m.role == 'assistant' %}<think>{% endif %}", 1
)


@pytest.mark.parametrize("tag", ["</think>", "</thinking>", "</seed:think>", "[/THINK]"])
@pytest.mark.parametrize("answer", ["hm{}yes", "\n{}\n\nyes"])
def test_a_closing_tag_of_reasoning_that_nothing_opens_is_refused(answer, tag):
    row = chat("q", "a", "r", answer.format(tag))
    with refused("messages[3].content", tag, tag.replace("/", ""), error=RowError):
        marked_text(row, tokenizer_with(PLAIN))


@pytest.mark.parametrize("template", [OPENED, PROMPTED])
def test_a_closing_tag_is_kept_if_the_template_opens_the_reasoning(template):
    text = marked_text(chat("q", "hm</think>yes"), tokenizer_with(template))
    assert "hm</think>yes<|im_end|>]]" in text


@pytest.mark.parametrize(
    "answer", ["<think>hm</think>yes", "so <think>hm</think>yes", "write `</think>`", "a </b>"]
)
def test_reasoning_that_the_answer_opens_itself_and_quoted_tags_are_kept(answer):
    assert answer in marked_text(chat("q", answer), tokenizer_with(PLAIN))


def test_a_closing_tag_in_a_turn_that_is_not_trained_is_kept():
    messages = (Message("user", "q"), Message("assistant", "hm</think>yes", False))
    row = Conversation((*messages, *chat("r", "two").messages))
    assert "hm</think>yes" in marked_text(row, tokenizer_with(PLAIN))


def test_a_completion_with_reasoning_is_refused_if_reasoning_must_not_be_trained():
    """A completion has no template, so that the span of its reasoning is not known exactly."""
    row = Completion("q", "<think>hm</think>yes")
    (document,) = encoder(tokenizer_with(PLAIN)).encode(row)
    assert document.supervised.any()
    with refused("completion", "train_on_reasoning", "lists of messages", error=RowError):
        encoder(tokenizer_with(PLAIN), train_on_reasoning=False).encode(row)
