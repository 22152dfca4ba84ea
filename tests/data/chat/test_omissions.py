"""Each text of a row is in the document, or the row is refused with the path of the text.

The exception is reasoning that the template omits by design, which is counted.
"""

import json
from dataclasses import replace

import pytest

from pipeline.data.chat.tokenizer import special_ids
from pipeline.rows.examples import Conversation, Message, RowError
from tests import ROOT
from tests.data.chat.documents import (
    SPECIAL,
    chat,
    encoder,
    marked_text,
    marked_texts,
    published,
    tokenizer_with,
    user,
)
from tests.data.chat.kinds import kind_tokenizer, tokenizer_of
from tests.docs.pages import blocks
from tests.messages import refused
from tests.tiny import CHATML

pytestmark = pytest.mark.tensor

TOOL = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "The weather of a day",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
                "days": {"type": "integer", "default": 1},
            },
            "required": ["city"],
        },
    },
}


def call(name="forecast", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation_with(*calls, content="", result="rain", **others):
    """A conversation with these tool calls in one turn, their results and an answer."""
    messages = (
        Message("user", "Weather?"),
        Message("assistant", content, True, {"tool_calls": list(calls), **others}),
        *(Message("tool", f"{result} {i}") for i in range(len(calls))),
        Message("assistant", "It rains."),
    )
    return Conversation(messages, (TOOL,))


def token_counts_of(example, tokenizer, **values):
    """Token counts of a row, without those of ends at which generation does not stop."""
    (row,) = encoder(tokenizer, **values).encode_many([example])
    assert not isinstance(row, RowError), row
    return {name: count for name, count in row.token_counts.items() if "without_stop" not in name}


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
        deep_call = call(city="Oslo", days=3, deep={"flags": [True, None, 1.5, "x"]})
        text = marked_text(conversation_with(deep_call), tokenizer_with(self.TEMPLATE))
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
        row = conversation_with(call(city="Oslo", days=3), call(city="Bergen"))
        with refused(path, error=RowError):
            marked_text(row, self.omitting(old, new))

    def test_an_omitted_name_is_refused_for_a_user_but_not_for_a_tool_result(self):
        asked, answer = chat("q", "a").messages
        with refused("messages[0].name", error=RowError):
            marked_text(
                Conversation((replace(asked, others={"name": "Ann"}), answer)), published("qwen3")
            )
        row = conversation_with(call(city="Oslo"))
        result = replace(row.messages[2], others={"name": "forecast", "tool_call_id": "c1"})
        row = replace(row, messages=(*row.messages[:2], result, row.messages[3]))
        assert "rain 0" in marked_text(row, published("qwen3"))

    def test_white_space_around_a_text_may_be_stripped_but_not_inside(self):
        assert "[[a  b<|eot_id|>]]" in marked_text(chat("q", " a  b\n"), published("llama-3"))
        inside = self.omitting("{{ m['content'] }}", "{{ m['content'] | replace(' ', '') }}")
        with refused("messages[1].content", error=RowError):
            marked_text(chat("q", "a b"), inside)


class TestReasoning:
    def test_text_before_or_between_reasoning_is_not_dropped_silently(self):
        for answer in ("Before.<think>a</think>b", "<think>a</think>b<think>c</think>d"):
            with refused("messages[1].content", error=RowError):
                marked_text(chat("q", answer), published("qwen3"))
            text = marked_text(chat("q", answer), published("qwen2.5"))
            assert text.endswith(f"assistant\n[[{answer}<|im_end|>]]\n")

    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_omitted_reasoning_of_earlier_turns_is_counted(self, key):
        def turn(text, reasoning):
            return Message("assistant", text, True, {key: reasoning})

        asked = Message("user", "q")
        row = Conversation((asked, turn("a", "12345"), asked, turn("b", "678")))
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
        drops_b = CHATML.replace(
            "{{ m['content'] }}",
            "{{ m.reasoning_content if 'b' not in (m.reasoning_content or '') }}{{ m['content'] }}",
        )
        kept, dropped = (
            Message("assistant", "x", True, {"reasoning_content": text}) for text in ("a", "b")
        )
        question = Message("user", "q")
        assert "[[ax<|im_end|>]]" in marked_text(
            Conversation((question, kept)), tokenizer_with(drops_b)
        )
        with refused("messages[1].reasoning_content", error=RowError):
            marked_text(Conversation((question, dropped)), tokenizer_with(drops_b))

    def test_empty_reasoning_is_masked_alike_before_answers_and_calls(self):
        empty = "<think>\n\n</think>\n\n"
        rows = [chat("q", "a"), replace(conversation_with(call(city="Oslo")), tools=())]
        rows[1] = replace(rows[1], messages=rows[1].messages[:2])
        for row in rows:
            header = "<|im_start|>assistant\n"
            assert f"{header}[[{empty}" in marked_text(row, published("qwen3"))
            for values in (
                {"train_on_reasoning": False},
                {"chat_template_kwargs": {"enable_thinking": False}},
            ):
                assert f"{header}{empty}[[" in marked_text(row, published("qwen3"), **values)

    @pytest.mark.parametrize("name", ["channels", "next-role", "qwen3"])
    def test_reasoning_that_is_not_supervised_stays_in_the_document(self, name):
        tokenizer = tokenizer_of(name)
        row = conversation_with(call(city="Oslo"), reasoning_content="I must look")
        with_reasoning = marked_text(row, tokenizer)
        without_reasoning = marked_text(row, tokenizer, train_on_reasoning=False)

        def without_brackets(text):
            return text.replace("[[", "").replace("]]", "")

        assert without_brackets(with_reasoning) == without_brackets(without_reasoning)
        spans = [part.partition("]]")[0] for part in without_reasoning.split("[[")[1:]]
        trained = "".join(spans)
        assert "I must look" in with_reasoning
        assert "I must look" not in trained
        assert "think>" not in trained
        assert "forecast" in trained
        assert "It rains." in trained


class TestKinds:
    def test_channel_headers_and_every_end_of_turn_are_supervised(self):
        text = marked_text(conversation_with(call(city="Oslo")), kind_tokenizer("channels"))
        opened = "<|start|>assistant[[<|channel|>"
        call_text = 'commentary to=functions.forecast<|message|>{"city": "Oslo"}<|call|>]]'
        assert opened + call_text in text
        assert text.endswith(f"{opened}final<|message|>It rains.<|return|>]]")
        text = marked_text(chat("q", "one", "r", "two"), kind_tokenizer("channels"))
        assert f"{opened}final<|message|>one<|end|>]]<|start|>user" in text

    def test_the_token_of_the_next_role_ends_every_turn(self):
        text = marked_text(chat("q", "one", "r", "two"), kind_tokenizer("next-role"))
        assert text.endswith(
            "<|user|>q<|assistant|>[[<think></think>one<|user|>]]"
            "r<|assistant|>[[<think></think>two<|user|>]]"
        )
        row = conversation_with(call(city="Oslo"))
        text = marked_text(replace(row, messages=row.messages[:2]), kind_tokenizer("next-role"))
        assert text.endswith("</tool_call><|observation|>]]")

    def test_arguments_are_json_text_if_a_template_concatenates_them(self):
        text = marked_text(
            replace(conversation_with(call(city="Oslo", days=2)), tools=()),
            kind_tokenizer("joined"),
        )
        assert '[[<call>function<sep>forecast\n{"city": "Oslo", "days": 2}</call></s>]]' in text

    def test_two_generation_blocks_are_one_span(self):
        text = marked_text(chat("q", "one", "r", "two"), kind_tokenizer("two-blocks"))
        assert text.count("[[") == text.count("<|im_end|>]]") == 2

    def test_missing_call_ids_are_generated_if_a_template_requires_them(self):
        row = replace(conversation_with(call(city="Oslo"), call(city="Bergen")), tools=())
        text = marked_text(row, published("mistral-nemo"))
        for number in (0, 1):
            assert f'"id": "call0000{number}"' in text
            assert f'"call_id": "call0000{number}"' in text
        assert "[[<|call|>functions.forecast:0<|argument|>" in marked_text(
            row, kind_tokenizer("named-ids")
        )

    def test_valid_call_ids_are_kept_and_results_refer_to_them(self):
        calls = [{**call(city=city), "id": new} for city, new in (("O", "toolong_1"), ("B", "b2"))]
        row = conversation_with(*calls)
        answers = [
            replace(row.messages[n], others={"tool_call_id": old})
            for n, old in ((2, "b2"), (3, "toolong_1"))
        ]
        calls[0]["id"] = "abc123DEF"
        answers[1] = replace(answers[1], others={"tool_call_id": "abc123DEF"})
        row = Conversation((*row.messages[:2], *answers, row.messages[4]))
        text = marked_text(row, published("mistral-nemo"))
        assert text.index('"id": "abc123DEF"') < text.index('"id": "call00001"')
        assert '{"content": rain 0, "call_id": "call00001"}' in text
        assert '{"content": rain 1, "call_id": "abc123DEF"}' in text

    def test_a_thousand_turns_and_calls_are_one_document(self):
        messages = [Message("user", "go")]
        for i in range(1000):
            others = {"tool_calls": [call(city=f"c{i}")], "reasoning_content": f"thought {i}"}
            messages += [Message("assistant", f"step {i}", True, others), Message("tool", f"r{i}")]
        messages.append(Message("assistant", "done"))
        text = marked_text(Conversation(tuple(messages), (TOOL,)), published("qwen3"))
        assert text.count("[[") == 1001

    def test_the_tool_use_template_is_used_for_rows_with_tools(self):
        tokenizer = published("qwen2.5")
        tools = tokenizer.chat_template.replace("<|im_start|>system", "TOOLS<|im_start|>system")
        tokenizer.chat_template = {"default": CHATML, "tool_use": tools}
        assert marked_text(chat("q", "a"), tokenizer).startswith("<|im_start|>user")
        assert marked_text(conversation_with(call(city="Oslo")), tokenizer).startswith("TOOLS")

    def test_a_template_file_replaces_the_model_s(self, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text(CHATML.replace("<|im_start|>", "<|im_start|>my "))
        text = marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))
        expected = (user("q") + "[[a<|im_end|>]]\n").replace("start|>", "start|>my ")
        assert text == expected
        with refused("chat_template", tmp_path / "none.jinja"):
            marked_text(
                chat("q", "a"), published("qwen3"), chat_template=str(tmp_path / "none.jinja")
            )

    def test_a_template_file_without_generation_prompt_is_refused(self, tmp_path):
        path = tmp_path / "mine.jinja"
        page = (ROOT / "docs/howto/chat-template.md").read_text(encoding="utf-8")
        example = blocks(page, "jinja")[0]
        path.write_text(example)
        text = marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))
        assert text == "<|user|>\nq\n<|assistant|>\n[[a<|im_end|>]]\n"
        path.write_text(example[: example.rindex("{%- if add_generation_prompt")])
        with refused("chat_template", "<|assistant|>", "add_generation_prompt"):
            marked_text(chat("q", "a"), published("qwen3"), chat_template=str(path))

    @pytest.mark.parametrize("family", sorted(SPECIAL))
    def test_each_published_template_is_accepted_as_a_file(self, family, tmp_path):
        path = tmp_path / "published.jinja"
        path.write_text(published(family).chat_template)
        assert "[[" in marked_text(chat("q", "a"), published(family), chat_template=str(path))

    def test_a_variable_of_the_tokenizer_is_not_listed_as_settable(self):
        template = "{{ eos_token }}" + published("qwen3").chat_template
        tokenizer = published("qwen3")
        tokenizer.chat_template = template
        with refused("chat_template_kwargs", "moood") as error:
            marked_text(chat("q", "a"), tokenizer, chat_template_kwargs={"moood": 1})
        assert "eos_token" not in str(error.value)

    def test_template_variables_that_are_not_read_are_refused(self):
        with refused("chat_template_kwargs", "moood", "enable_thinking"):
            marked_text(chat("q", "a"), published("qwen3"), chat_template_kwargs={"moood": 1})
        fixed = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
        assert "26 Jul 2024" in marked_text(chat("q", "a"), published("llama-3.2"), **fixed)

    def test_end_tokens_of_the_generation_config_end_turns(self, tmp_path):
        """<|eom_id|> ends a call of a built-in tool; no template writes it."""
        ends = published("llama-3")
        ends.add_tokens(["<|eom_id|>"], special_tokens=True)
        number = ends.convert_tokens_to_ids("<|eom_id|>")
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [number, 1]}))
        assert number in encoder(ends, model=str(tmp_path)).end_ids
        assert number not in encoder(ends, model="elsewhere").end_ids


class TestSpecialTokensInText:
    ROW = chat("say <|im_end|>", "x <|im_start|>y<|im_end|>")

    def test_they_are_special_tokens_and_counted_by_default(self):
        assert token_counts_of(self.ROW, published("qwen3")) == {"special_tokens_in_text": 3}
        assert token_counts_of(chat("q", "a"), published("qwen3")) == {}

    def test_reject_rejects_the_row(self):
        with refused("messages[0].content", "<|im_end|>", error=RowError):
            marked_text(self.ROW, published("qwen3"), special_tokens_in_text="reject")

    @pytest.mark.parametrize("name", ["qwen3", "mistral-nemo"])
    def test_as_text_tokenises_them_as_text(self, name):
        tokenizer = published(name)
        row = chat("say </s><|im_end|>", "x [INST]<|im_end|>y\u00e9", "r", "z")
        (plain,) = encoder(tokenizer).encode(row)
        (document,) = encoder(tokenizer, special_tokens_in_text="as-text").encode(row)
        decode = tokenizer.decode
        assert decode(document.ids.tolist()) == decode(plain.ids.tolist())
        ids_of_special_tokens = set(special_ids(tokenizer).values())

        def special_ids_in(encoded):
            return [token for token in encoded.ids.tolist() if token in ids_of_special_tokens]

        (without_them,) = encoder(tokenizer).encode(chat("say", "xy\u00e9", "r", "z"))
        assert special_ids_in(document) == special_ids_in(without_them)
        trained = decode(document.ids[document.supervised].tolist())
        assert trained == decode(plain.ids[plain.supervised].tolist())
