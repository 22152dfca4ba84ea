"""Published chat templates: which tokens each trains, and that it is rendered once a row."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rows.examples import Conversation, Message, RowError
from tests.data.chat.documents import (
    SPECIAL,
    all_shown,
    chat,
    encoder,
    published,
    renderings,
    shown,
    tokenizer_with,
)
from tests.messages import refused

pytestmark = pytest.mark.tensor

THOUGHT = "<think>\nhm\n</think>\n\ntwo"
NO_SYSTEM = {"mistral-7b-v0.1", "mistral-nemo", "gemma-2"}


def bar(text):
    return text.replace("|", "\uff5c")  # as DeepSeek writes it


EXPECTED = {
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n"
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n",
    # The generation prompt has no thought, so the model must write the empty one itself.
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
EXPECTED["phi-4-first"] = EXPECTED["phi-4"]  # its user turns write the assistant's header


END = dict.fromkeys(SPECIAL, "<|im_end|>")
END |= {"phi-3.5": "<|end|>", "llama-3": "<|eot_id|>", "llama-3.2": "<|eot_id|>"}
END |= {"mistral-7b-v0.1": "</s>", "mistral-nemo": "</s>"}
END |= {"gemma-2": "<end_of_turn>", "gemma-3": "<end_of_turn>"}
END["deepseek-r1-distill"] = bar("<|end▁of▁sentence|>")


def without_date(text):
    """Llama 3.2 writes the day on which it is rendered."""
    start, _, rest = text.partition("<|start_header_id|>system")
    return start + rest.partition("<|eot_id|>")[2] if rest else text


@pytest.mark.parametrize("name", SPECIAL)
def test_two_turns(name):
    found = shown(chat("q", "one", "r", "two"), published(name))
    assert without_date(found) == EXPECTED["llama-3" if name == "llama-3.2" else name]


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_documents_are_those_of_transformers(name):
    """Token by token, so with one BOS where the template writes it and none where it does not."""
    example = chat(
        "q", "one\n\nmore", " r ", "two", system=None if name in NO_SYSTEM else "be brief"
    )
    tokenizer = published(name)
    (document,) = encoder(tokenizer).encode(example)
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    assert document.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert document.ids.tolist().count(tokenizer.bos_token_id or -1) == bool(tokenizer.bos_token)


@pytest.mark.parametrize("name", sorted(NO_SYSTEM))
def test_a_system_message_that_would_be_lost_is_refused(name):
    with pytest.raises(RowError, match=r"refuses the conversation|messages\[0\].content"):
        shown(chat("q", "one", system="be brief"), published(name))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", sorted(SPECIAL))
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=6))
def test_whatever_is_said_each_turn_is_trained_through_its_end(name, contents):
    contents = contents[: len(contents) // 2 * 2]
    tokenizer = published(name)
    made = encoder(tokenizer)
    (document,) = made.encode(chat(*contents))
    trained = tokenizer.decode(document.ids[document.supervised].tolist())
    is_trimmed = name.startswith(("llama", "gemma"))
    answers = [text.strip() if is_trimmed else text for text in contents[1::2]]
    if name == "qwen3":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
    assert trained == "".join(f"{text}{END[name]}" for text in answers)


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_a_row_is_rendered_once_when_its_shape_is_known(name, monkeypatch):
    """Only thoughts that are omitted need more: one rendering of their shape."""
    made = encoder(published(name))
    made.encode(chat("q", THOUGHT, "r", THOUGHT))
    rendered = renderings(monkeypatch)
    made.encode_many([chat(f"q{i}", THOUGHT, "r", f"{THOUGHT} {i}") for i in range(5)])
    assert len(rendered) == 5


class TestThoughts:
    def test_qwen3_keeps_them_in_the_last_turn_only(self):
        found = shown(chat("q", "<think>a</think>one", "r", THOUGHT), published("qwen3"))
        assert found == (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[one<|im_end|>]]\n"
            f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[{THOUGHT}<|im_end|>]]\n"
        )

    @pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "deepseek-r1-distill", "gemma-3"])
    def test_as_many_turns_as_there_are(self, name):
        """Answers that are as they were said are not searched for, however many alike there are."""
        found = shown(chat(*("same", THOUGHT) * 30), published(name))
        assert found.count("[[") == found.count(f"two{END[name]}]]") == 30

    def test_a_document_of_each_turn_keeps_them_all(self):
        example = chat("q", THOUGHT.replace("two", "one"), "r", THOUGHT)
        first, second = all_shown(example, published("qwen3"), split_turns=True)
        assert first.endswith("assistant\n[[<think>\nhm\n</think>\n\none<|im_end|>]]\n")
        assert second == shown(example, published("qwen3"), train_on="last-assistant")
        assert "one<|im_end|>\n" in second
        assert second.endswith(f"assistant\n[[{THOUGHT}<|im_end|>]]\n")

    def test_reasoning_in_a_key_of_its_own(self):
        said = Message("assistant", "two", others={"reasoning_content": "hm"})
        asked = Message("user", "q")
        found = shown(Conversation((asked, said)), published("qwen3"))
        assert found.endswith(f"assistant\n[[{THOUGHT}<|im_end|>]]\n")
        earlier = shown(Conversation((asked, said, asked, said)), published("qwen3"))
        assert earlier.count("hm") == 1
        with refused("messages[1].reasoning_content", "<think>", error=RowError):
            shown(Conversation((asked, said)), published("qwen2.5"))

    def test_deepseek_strips_them_and_asks_for_them(self):
        """Its generation prompt is not how it begins turns, and is not needed."""
        found = shown(chat("q", THOUGHT), published("deepseek-r1-distill"))
        assert found.endswith(bar("<|Assistant|>[[\n\ntwo<|end▁of▁sentence|>]]"))

    @pytest.mark.parametrize("name", ["deepseek-r1-distill", "qwen3"])
    @pytest.mark.parametrize("train_on", ["assistant", "all"])
    def test_an_answer_of_which_nothing_is_left_is_not_trained_as_silence(self, name, train_on):
        thought = THOUGHT.removesuffix("two")
        found = chat("q", thought, "r", "two")  # Qwen3 keeps the thought of a last turn
        with pytest.raises(RowError, match="omits the whole answer"):
            shown(found, published(name), train_on=train_on)
        assert "two" in shown(found, published(name), train_on="last-assistant")
        unsaid = replace(found.messages[1], is_trained=False)
        found = replace(found, messages=(found.messages[0], unsaid, *found.messages[2:]))
        assert "two" in shown(found, published(name), train_on=train_on)

    def test_the_question_is_what_was_trained(self):
        made = encoder(published("qwen3"))
        prompt, answer = made.last_answer(chat("q", "one"))
        assert prompt.endswith("<|im_start|>assistant\n")
        assert answer == "<think>\n\n</think>\n\none"
        silent = encoder(published("qwen3"), chat_template_kwargs={"enable_thinking": False})
        prompt, answer = silent.last_answer(chat("q", "one"))
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answer == "one"
        prompt, answer = made.last_answer(chat("q", THOUGHT))
        assert prompt.endswith("<|im_start|>assistant\n")
        assert answer == THOUGHT


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calls(*arguments):
    return [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "add", "arguments": given}}
        for i, given in enumerate(arguments)
    ]


def with_tools(*arguments, tools=None, result="3"):
    """A question, a call of a tool for each of the arguments, their results, and the answer."""
    answers = [
        Message("tool", result, others={"tool_call_id": f"call0000{i}"})
        for i in range(len(arguments))
    ]
    messages = (
        Message("user", "add"),
        Message("assistant", "", others={"tool_calls": calls(*arguments)}),
        *answers,
        Message("assistant", "it is 3"),
    )
    return Conversation(messages, tuple(tools or [tool("add", a={"type": "integer"})]))


TRAINED = {
    "qwen2.5": '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]',
    "qwen3": '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]',
    "llama-3.2": '[[{"name": "add", "parameters": {"a": 1}}<|eot_id|>]]',
    "mistral-nemo": '[[[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "call00000"}]'
    "</s>]]",
}


class TestTools:
    @pytest.mark.parametrize("name", sorted(TRAINED))
    def test_a_call_is_trained_and_its_result_is_not(self, name):
        for result in ("3", '3\n"4"', " "):
            found = shown(with_tools({"a": 1}, result=result), published(name))
            assert TRAINED[name] in found
            assert f"it is 3{END[name]}]]" in found
            assert found.count("]]") == 2

    def test_text_before_a_call_is_trained_with_it(self):
        asked, said, *rest = with_tools({"a": 1}).messages
        said = Message("assistant", "I add", others=said.others)
        found = shown(Conversation((asked, said, *rest)), published("qwen2.5"))
        assert "assistant\n[[I add\n<tool_call>\n" in found
        with refused("messages[1].content", error=RowError):
            shown(Conversation((asked, said, *rest)), published("llama-3.2"))

    def test_several_calls_in_a_turn(self):
        found = shown(with_tools({"a": 1}, {"a": 2}), published("qwen2.5"))
        one, two = (f'<tool_call>\n{{"name": "add", "arguments": {{"a": {i}}}}}\n' for i in (1, 2))
        assert f"assistant\n[[{one}</tool_call>\n{two}</tool_call><|im_end|>]]\n" in found
        with pytest.raises(RowError, match="single tool-calls"):
            shown(with_tools({"a": 1}, {"a": 2}), published("llama-3.2"))

    def test_tools_that_stand_before_the_last_question(self):
        """Mistral Nemo's call is not behind what it would be asked with."""
        example = with_tools({"a": 1})
        later = Conversation((*example.messages, *chat("r", "bye").messages), example.tools)
        found = shown(later, published("mistral-nemo"))
        assert found.startswith(f"<s>[INST]add[/INST]{TRAINED['mistral-nemo']}[TOOL_RESULTS]")
        assert found.endswith("[/AVAILABLE_TOOLS][INST]r[/INST][[bye</s>]]")

    @pytest.mark.parametrize("name", ["smollm2", "llama-3", "deepseek-r1-distill"])
    def test_a_template_without_tools_is_refused_for_rows_with_them(self, name):
        example = with_tools({"a": 1})
        with refused("chat template", error=RowError):
            shown(example, published(name))
        with refused("chat template", error=RowError):
            shown(Conversation(example.messages), published(name))

    @pytest.mark.parametrize("name", sorted(TRAINED))
    def test_rows_with_tools_are_rendered_once_too(self, name, monkeypatch):
        made = encoder(published(name))
        made.encode(with_tools({"a": 1}))
        rendered = renderings(monkeypatch)
        others = [tool("add"), tool("sub", b={"type": "string", "enum": ["x"]})]
        (found,) = made.encode_many([with_tools({"b": {"c": ["x"]}, "d": None}, tools=others)])
        assert len(found.documents) == len(rendered) == 1


def supervised_in(text):
    return [part.partition("]]")[0] for part in text.split("[[")[1:]]


def test_the_header_of_a_second_answer_in_a_row_is_not_trained():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    first, second = Message("assistant", "one"), Message("assistant", "two")
    row = Conversation((Message("user", "q"), first, second))
    found = supervised_in(shown(row, tokenizer_with(template)))
    assert found == ["one<|im_end|>", "two<|im_end|>"]


def test_a_special_token_that_quotes_an_argument_does_not_end_the_turn():
    """Gemma 4 quotes texts in calls with a special token, and goes on with the results."""
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
    found = supervised_in(shown(row, tokenizer_with(template, special)))
    assert found == ["<call>look at=<q>sky<q></call>", "blue</turn>"]
