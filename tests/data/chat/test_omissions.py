"""Each text of a row is in the document, or the row is refused with the path of the text.

Reasoning that the template omits by design does not refuse the row; its tokens are counted.
"""

from dataclasses import replace

import pytest

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import (
    chat,
    conversation_with_calls,
    encoder,
    marked_text,
    marked_texts,
    published,
    supervised_spans,
    tokenizer_with,
    tool_call,
)
from tests.data.chat.kinds import tokenizer_of
from tests.messages import refused
from tests.tiny import CHATML

pytestmark = pytest.mark.tensor


def token_counts_of(example, tokenizer, **settings):
    """Token counts of a row, except the counts of turn ends (..._WITHOUT_STOP of the encoder)."""
    (row,) = encoder(tokenizer, **settings).encode_many([example])
    assert not isinstance(row, RowError), row
    return {name: count for name, count in row.token_counts.items() if "without_stop" not in name}


def unmarked(text):
    """The text of a document without its [[brackets]]."""
    return text.replace("[[", "").replace("]]", "")


class TestOmittedTexts:
    """A text that a template omits is refused with its path."""

    CALLS = (
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>{% endfor %}"
    )
    TEMPLATE = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        + CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + CALLS)
    )  # fmt: skip

    def omitting(self, old, new):
        """A tokenizer whose template has `new` in place of `old`."""
        assert old in self.TEMPLATE
        return tokenizer_with(self.TEMPLATE.replace(old, new))

    def test_a_template_that_writes_all_texts_is_accepted(self):
        deep_call = tool_call(city="Oslo", days=3, deep={"flags": [True, None, 1.5, "x"]})
        text = marked_text(conversation_with_calls(deep_call), tokenizer_with(self.TEMPLATE))
        assert '[[<call>forecast {"city": "Oslo", "days": 3, "deep": {"flags": [true' in text

    @pytest.mark.parametrize(
        ("old", "new", "path"),
        [
            ("{{ c.function.name }}", "", "messages[1].tool_calls[0].name"),
            ("{{ c.function.arguments | tojson }}", "", "messages[1].tool_calls[0].arguments.city"),
            (
                "{{ c.function.arguments | tojson }}",
                "{% for k, v in c.function.arguments.items() %}{{ v }}{% endfor %}",
                "messages[1].tool_calls[0].arguments.city",
            ),
            (
                "{{ c.function.arguments | tojson }}",
                "{% for k, v in c.function.arguments.items() %}{{ k }}="
                "{{ v if v is string }}{% endfor %}",
                "messages[1].tool_calls[0].arguments.days",
            ),
            ("{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [])[:1] %}",
             "messages[1].tool_calls[1].name"),
            ("{{ t | tojson }}", "{{ t.function.name }}", "tools[0].function.description"),
            ("{{ t | tojson }}", "", "tools[0].function.name"),
            ("{{ m['content'] }}", "{{ m['content'] if m.role != 'tool' }}", "messages[2].content"),
            ("{{ m['content'] }}", "{{ m['content'][1:] }}", "messages[0].content"),
            ("{{ m['content'] }}", "{{ m['content'] | replace('e', '') }}", "messages[0].content"),
        ],
    )  # fmt: skip
    def test_a_text_that_is_not_written_is_refused_with_its_path(self, old, new, path):
        row = conversation_with_calls(tool_call(city="Oslo", days=3), tool_call(city="Bergen"))
        with refused(path, error=RowError):
            marked_text(row, self.omitting(old, new))

    def test_an_omitted_name_of_a_user_is_refused(self):
        question, answer = chat("q", "a").messages
        question = replace(question, others={"name": "Ann"})
        with refused("messages[0].name", error=RowError):
            marked_text(Conversation((question, answer)), published("qwen3"))

    def test_an_omitted_name_of_a_tool_result_is_accepted(self):
        row = conversation_with_calls(tool_call(city="Oslo"))
        question, turn, result, answer = row.messages
        result = replace(result, others={"name": "forecast", "tool_call_id": "c1"})
        row = replace(row, messages=(question, turn, result, answer))
        assert "rain 0" in marked_text(row, published("qwen3"))

    def test_white_space_around_a_text_may_be_stripped_but_not_inside(self):
        assert "[[a  b<|eot_id|>]]" in marked_text(chat("q", " a  b\n"), published("llama-3"))
        without_spaces = self.omitting(
            "{{ m['content'] }}", "{{ m['content'] | replace(' ', '') }}"
        )
        with refused("messages[1].content", error=RowError):
            marked_text(chat("q", "a b"), without_spaces)


class TestReasoning:
    def test_text_before_or_between_reasoning_is_written_or_the_row_is_refused(self):
        for answer in ("Before.<think>a</think>b", "<think>a</think>b<think>c</think>d"):
            with refused("messages[1].content", error=RowError):
                marked_text(chat("q", answer), published("qwen3"))
            text = marked_text(chat("q", answer), published("qwen2.5"))
            assert text.endswith(f"assistant\n[[{answer}<|im_end|>]]\n")

    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_omitted_reasoning_of_earlier_turns_is_counted(self, key):
        def turn(text, reasoning):
            return Message("assistant", text, True, {key: reasoning})

        question = Message("user", "q")
        row = Conversation((question, turn("a", "12345"), question, turn("b", "678")))
        for name in ("channels", "qwen3"):
            tokenizer = tokenizer_of(name)
            assert token_counts_of(row, tokenizer) == {"omitted_reasoning": 5}  # bytes
            assert token_counts_of(row, tokenizer, split_turns=True) == {}
        for text in marked_texts(row, published("qwen3"), split_turns=True):
            assert text.count("[[<think>") == 1

    def test_reasoning_that_is_always_stripped_is_counted(self):
        row = chat("q", "<think>123</think>a", "r", "<think>45</think>b")
        assert token_counts_of(row, published("deepseek-r1-distill")) == {"omitted_reasoning": 5}

    def test_reasoning_that_is_dropped_in_some_rows_only_is_refused(self):
        """The template of the test omits the reasoning "b"."""
        template = CHATML.replace(
            "{{ m['content'] }}",
            "{{ m.reasoning_content if 'b' not in (m.reasoning_content or '') }}{{ m['content'] }}",
        )

        def row(reasoning):
            answer = Message("assistant", "x", True, {"reasoning_content": reasoning})
            return Conversation((Message("user", "q"), answer))

        assert "[[ax<|im_end|>]]" in marked_text(row("a"), tokenizer_with(template))
        with refused("messages[1].reasoning_content", error=RowError):
            marked_text(row("b"), tokenizer_with(template))

    @pytest.mark.parametrize("name", ["channels", "next-role", "qwen3"])
    def test_reasoning_that_is_not_supervised_stays_in_the_document(self, name):
        tokenizer = tokenizer_of(name)
        row = conversation_with_calls(tool_call(city="Oslo"), reasoning_content="I must look")
        marked = marked_text(row, tokenizer, train_on_reasoning=False)
        text = marked_text(row, tokenizer)
        assert unmarked(marked) == unmarked(text)
        assert "I must look" in text
        trained = "".join(supervised_spans(marked))
        assert "I must look" not in trained
        assert "think>" not in trained
        assert "forecast" in trained
        assert "It rains." in trained
