"""Published chat templates: exact loss masks, and one rendering for each row."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import (
    SPECIAL,
    chat,
    conversation_with_calls,
    encoder,
    marked_text,
    marked_texts,
    published,
    record_renderings,
    supervised_spans,
    tokenizer_with,
    tool_call,
)
from tests.messages import refused

pytestmark = pytest.mark.tensor

REASONED = "<think>\nhm\n</think>\n\ntwo"
NO_SYSTEM = {"mistral-7b-v0.1", "mistral-nemo", "gemma-2"}


def bar(text):
    return text.replace("|", "\uff5c")  # DeepSeek's full-width vertical bar


# Template -> the text of a conversation of two turns, with supervised spans in [[brackets]].
EXPECTED = {
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n"
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n",
    # The generation prompt has no empty reasoning, so the model must generate it.
    "qwen3": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n<|im_start|>"
    "user\nr<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\ntwo<|im_end|>]]\n",
    "phi-4": "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>[[one<|im_end|>]]"
    "<|im_start|>user<|im_sep|>r<|im_end|><|im_start|>assistant<|im_sep|>[[two<|im_end|>]]",
    "phi-3.5": "<|user|>\nq<|end|>\n<|assistant|>\n[[one<|end|>]]\n<|user|>\nr<|end|>\n"
    "<|assistant|>\n[[two<|end|>]]\n<|endoftext|>",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[one<|eot_id|>]]<|start_header_id|>user"
    "<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[[two<|eot_id|>]]",
    "mistral-7b-v0.1": "<s>[INST] q [/INST][[one</s>]] [INST] r [/INST][[two</s>]] ",
    "mistral-nemo": "<s>[INST]q[/INST][[one</s>]][INST]r[/INST][[two</s>]]",
    "gemma-2": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"
    "[[one<end_of_turn>]]\n<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n"
    "[[two<end_of_turn>]]\n",
    "deepseek-r1-distill": bar(
        "<|begin▁of▁sentence|><|User|>q<|Assistant|>[[one<|end▁of▁sentence|>]]"
    )
    + bar("<|User|>r<|Assistant|>[[two<|end▁of▁sentence|>]]"),
}
EXPECTED["gemma-3"] = EXPECTED["gemma-2"]
EXPECTED["phi-4-first"] = EXPECTED["phi-4"]  # the header of an answer is written after user turns
EXPECTED["llama-3.2"] = EXPECTED["llama-3"]


# Template -> the token that ends a turn.
END = dict.fromkeys(SPECIAL, "<|im_end|>")
END |= {"phi-3.5": "<|end|>", "llama-3": "<|eot_id|>", "llama-3.2": "<|eot_id|>"}
END |= {"mistral-7b-v0.1": "</s>", "mistral-nemo": "</s>"}
END |= {"gemma-2": "<end_of_turn>", "gemma-3": "<end_of_turn>"}
END["deepseek-r1-distill"] = bar("<|end▁of▁sentence|>")


def without_date(text):
    """The text without the system message, in which Llama 3.2 writes the current date."""
    start, _, rest = text.partition("<|start_header_id|>system")
    return start + rest.partition("<|eot_id|>")[2] if rest else text


@pytest.mark.parametrize("name", SPECIAL)
def test_two_turns_are_masked_as_expected(name):
    text = marked_text(chat("q", "one", "r", "two"), published(name))
    assert without_date(text) == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_token_ids_equal_those_of_transformers(name):
    """This includes one BOS if the template writes it, and none if it does not."""
    example = chat(
        "q", "one\n\nmore", " r ", "two", system=None if name in NO_SYSTEM else "be brief"
    )
    tokenizer = published(name)
    (document,) = encoder(tokenizer).encode(example)
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    assert document.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert document.ids.tolist().count(tokenizer.bos_token_id or -1) == bool(tokenizer.bos_token)


@pytest.mark.parametrize("name", sorted(NO_SYSTEM))
def test_a_system_message_that_a_template_omits_is_refused(name):
    with pytest.raises(RowError, match=r"refuses the conversation|messages\[0\].content"):
        marked_text(chat("q", "one", system="be brief"), published(name))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", sorted(SPECIAL))
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=6))
def test_any_answer_is_supervised_through_its_end_of_turn(name, contents):
    contents = contents[: len(contents) // 2 * 2]
    tokenizer = published(name)
    (document,) = encoder(tokenizer).encode(chat(*contents))
    trained = tokenizer.decode(document.ids[document.supervised].tolist())
    is_trimmed = name.startswith(("llama", "gemma"))
    answers = [text.strip() if is_trimmed else text for text in contents[1::2]]
    if name == "qwen3":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
    assert trained == "".join(f"{text}{END[name]}" for text in answers)


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_a_row_is_rendered_once_after_the_first_of_its_structure(name, monkeypatch):
    """Omitted reasoning needs one more rendering for each new structure of a row."""
    template_encoder = encoder(published(name))
    template_encoder.encode(chat("q", REASONED, "r", REASONED))
    rendered = record_renderings(monkeypatch)
    template_encoder.encode_many(
        [chat(f"q{i}", REASONED, "r", f"{REASONED} {i}") for i in range(5)]
    )
    assert len(rendered) == 5


class TestReasoning:
    def test_qwen3_writes_it_in_the_last_turn_only(self):
        text = marked_text(chat("q", "<think>a</think>one", "r", REASONED), published("qwen3"))
        assert text == (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n"
            f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[{REASONED}<|im_end|>]]\n"
        )

    @pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "deepseek-r1-distill", "gemma-3"])
    def test_every_one_of_thirty_equal_answers_is_supervised(self, name):
        """Answers are located by tracing, not by searching, so equal answers are not confused."""
        text = marked_text(chat(*("same", REASONED) * 30), published(name))
        assert text.count("[[") == text.count(f"two{END[name]}]]") == 30

    def test_split_turns_keeps_it_in_every_document(self):
        example = chat("q", REASONED.replace("two", "one"), "r", REASONED)
        first, second = marked_texts(example, published("qwen3"), split_turns=True)
        assert first.endswith("assistant\n[[<think>\nhm\n</think>\n\none<|im_end|>]]\n")
        assert second == marked_text(example, published("qwen3"), train_on="last-assistant")
        assert "one<|im_end|>\n" in second
        assert second.endswith(f"assistant\n[[{REASONED}<|im_end|>]]\n")

    def test_it_may_be_given_in_a_separate_key(self):
        answer = Message("assistant", "two", others={"reasoning_content": "hm"})
        question = Message("user", "q")
        text = marked_text(Conversation((question, answer)), published("qwen3"))
        assert text.endswith(f"assistant\n[[{REASONED}<|im_end|>]]\n")
        earlier = marked_text(Conversation((question, answer) * 2), published("qwen3"))
        assert earlier.count("hm") == 1
        with refused("messages[1].reasoning_content", "<think>", error=RowError):
            marked_text(Conversation((question, answer)), published("qwen2.5"))

    def test_deepseek_omits_it_although_its_generation_prompt_asks_for_it(self):
        """Its turns do not begin with its generation prompt."""
        text = marked_text(chat("q", REASONED), published("deepseek-r1-distill"))
        assert text.endswith(bar("<|Assistant|>[[\n\ntwo<|end▁of▁sentence|>]]"))

    @pytest.mark.parametrize("name", ["deepseek-r1-distill", "qwen3"])
    @pytest.mark.parametrize("train_on", ["assistant", "all"])
    def test_an_answer_without_any_remaining_text_is_refused(self, name, train_on):
        only_reasoning = REASONED.removesuffix("two")
        row = chat("q", only_reasoning, "r", "two")  # Qwen3 keeps the reasoning of a last turn
        with refused("chat template", "whole answer", error=RowError):
            marked_text(row, published(name), train_on=train_on)
        assert "two" in marked_text(row, published(name), train_on="last-assistant")
        not_trained = replace(row.messages[1], is_trained=False)
        row = replace(row, messages=(row.messages[0], not_trained, *row.messages[2:]))
        assert "two" in marked_text(row, published(name), train_on=train_on)

    @pytest.mark.parametrize(
        "run_settings",
        [{"train_on_reasoning": False}, {"chat_template_kwargs": {"enable_thinking": False}}],
    )
    @pytest.mark.parametrize("has_call", [False, True])
    def test_the_empty_block_of_qwen3_is_supervised_only_if_reasoning_is(
        self, has_call, run_settings
    ):
        row = chat("q", "a")
        if has_call:
            row = conversation_with_calls(tool_call(city="Oslo"), tools=())
            row = replace(row, messages=row.messages[:2])
        header, empty = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
        assert f"{header}[[{empty}" in marked_text(row, published("qwen3"))
        assert f"{header}{empty}[[" in marked_text(row, published("qwen3"), **run_settings)

    def test_the_prompt_of_the_last_answer_equals_that_of_training(self):
        template_encoder = encoder(published("qwen3"))
        prompt, answer = template_encoder.last_answer(chat("q", "one"))
        assert prompt.endswith("<|im_start|>assistant\n")
        assert answer == "<think>\n\n</think>\n\none"
        without = encoder(published("qwen3"), chat_template_kwargs={"enable_thinking": False})
        prompt, answer = without.last_answer(chat("q", "one"))
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answer == "one"
        prompt, answer = template_encoder.last_answer(chat("q", REASONED))
        assert prompt.endswith("<|im_start|>assistant\n")
        assert answer == REASONED


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calls_of(*arguments):
    return [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "add", "arguments": value}}
        for i, value in enumerate(arguments)
    ]


def with_tools(*arguments, tools=None, result="3"):
    """A question, an assistant turn with a call for each argument, the results, and the answer."""
    answers = [
        Message("tool", result, others={"tool_call_id": f"call0000{i}"})
        for i in range(len(arguments))
    ]
    messages = (
        Message("user", "add"),
        Message("assistant", "", others={"tool_calls": calls_of(*arguments)}),
        *answers,
        Message("assistant", "it is 3"),
    )
    return Conversation(messages, tuple(tools or [tool("add", a={"type": "integer"})]))


# Template -> the supervised text of a turn with a tool call.
TRAINED = {
    "qwen2.5": '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]',
    "qwen3": '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]',
    "llama-3.2": '[[{"name": "add", "parameters": {"a": 1}}<|eot_id|>]]',
    "mistral-nemo": '[[[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "call00000"}]'
    "</s>]]",
}


class TestTools:
    @pytest.mark.parametrize("name", sorted(TRAINED))
    def test_a_call_is_supervised_and_its_result_is_not(self, name):
        for result in ("3", '3\n"4"', " "):
            text = marked_text(with_tools({"a": 1}, result=result), published(name))
            assert TRAINED[name] in text
            assert f"it is 3{END[name]}]]" in text
            assert text.count("]]") == 2

    def test_text_before_a_call_is_supervised_with_it(self):
        question, call, *rest = with_tools({"a": 1}).messages
        call = Message("assistant", "I add", others=call.others)
        text = marked_text(Conversation((question, call, *rest)), published("qwen2.5"))
        assert "assistant\n[[I add\n<tool_call>\n" in text
        with refused("messages[1].content", error=RowError):
            marked_text(Conversation((question, call, *rest)), published("llama-3.2"))

    def test_several_calls_of_a_turn_are_one_span(self):
        text = marked_text(with_tools({"a": 1}, {"a": 2}), published("qwen2.5"))
        first, second = (
            f'<tool_call>\n{{"name": "add", "arguments": {{"a": {value}}}}}\n' for value in (1, 2)
        )
        assert f"assistant\n[[{first}</tool_call>\n{second}</tool_call><|im_end|>]]\n" in text
        with refused("chat template", "single tool-calls", error=RowError):
            marked_text(with_tools({"a": 1}, {"a": 2}), published("llama-3.2"))

    def test_tools_may_be_written_before_the_last_question(self):
        """Mistral Nemo's call does not follow the text of its generation prompt."""
        example = with_tools({"a": 1})
        later = Conversation((*example.messages, *chat("r", "bye").messages), example.tools)
        text = marked_text(later, published("mistral-nemo"))
        assert text.startswith(f"<s>[INST]add[/INST]{TRAINED['mistral-nemo']}[TOOL_RESULTS]")
        assert text.endswith("[/AVAILABLE_TOOLS][INST]r[/INST][[bye</s>]]")

    @pytest.mark.parametrize("name", ["smollm2", "llama-3", "deepseek-r1-distill"])
    def test_a_template_without_tools_is_refused_for_rows_with_them(self, name):
        example = with_tools({"a": 1})
        with refused("chat template", error=RowError):
            marked_text(example, published(name))
        with refused("chat template", error=RowError):
            marked_text(Conversation(example.messages), published(name))

    @pytest.mark.parametrize("name", sorted(TRAINED))
    def test_rows_with_tools_are_rendered_once(self, name, monkeypatch):
        template_encoder = encoder(published(name))
        template_encoder.encode(with_tools({"a": 1}))
        rendered = record_renderings(monkeypatch)
        others = [tool("add"), tool("sub", b={"type": "string", "enum": ["x"]})]
        (text,) = template_encoder.encode_many(
            [with_tools({"b": {"c": ["x"]}, "d": None}, tools=others)]
        )
        assert len(text.documents) == len(rendered) == 1


def test_the_header_of_a_second_consecutive_answer_is_not_supervised():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    first, second = Message("assistant", "one"), Message("assistant", "two")
    row = Conversation((Message("user", "q"), first, second))
    text = supervised_spans(marked_text(row, tokenizer_with(template)))
    assert text == ["one<|im_end|>", "two<|im_end|>"]


def test_a_special_token_that_quotes_an_argument_does_not_end_the_turn():
    """Gemma 4 quotes texts in calls with a special token; results follow in the same turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}<result>{{ m.content }}</result>"
        "{% else %}{% if not (m.role == 'assistant' and loop.previtem.role == 'tool') %}<turn>"
        "{{ m.role }}\n{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}=<q>{{ v }}<q>"
        "{% endfor %}</call>{% endfor %}{% if not m.tool_calls %}</turn>{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    special = ["<turn>", "</turn>", "<call>", "</call>", "<result>", "</result>", "<q>"]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    calls = Message("assistant", "", True, {"tool_calls": [call]})
    row = Conversation(
        (Message("user", "q"), calls, Message("tool", "light"), Message("assistant", "blue"))
    )
    text = supervised_spans(marked_text(row, tokenizer_with(template, special)))
    assert text == ["<call>look at=<q>sky<q></call>", "blue</turn>"]


@pytest.mark.parametrize("add_generation_prompt", ["", "{% if add_generation_prompt %}{% endif %}"])
def test_the_space_after_a_generation_prompt_that_is_always_written_is_supervised(
    add_generation_prompt,
):
    """A token of the space alone, as before a digit, is the first that the model generates."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(
        template + add_generation_prompt, ["[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>"
    )
    assert marked_text(chat("q", "5", "r", "7"), tokenizer) == (
        "<s>[INST] q[/INST][[ 5</s>]][INST] r[/INST][[ 7</s>]]"
    )
