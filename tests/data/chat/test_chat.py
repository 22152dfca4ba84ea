"""Loss masks of conversations, shown as text with supervised spans in `[[brackets]]`."""

from dataclasses import replace

import pytest

from pipeline.data.chat.encoder import chat_template_of
from pipeline.rows.examples import Completion, Conversation, Message, RowError
from tests.data.chat.documents import (
    bos_tokenizer,
    chat,
    encoder,
    marked_text,
    marked_texts,
    record_renderings,
    tokenizer_with,
    tokenizer_without_im_end,
    user,
)
from tests.messages import refused
from tests.tiny import CHATML, make_tokenizer

pytestmark = pytest.mark.tensor

# Templates: with each answer in a {% generation %} block, without end tokens, and with an end token
# after the last turn only.
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
LAST_END = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% if loop.last %}"
)
LAST_END += "<|im_end|>{% endif %}\n{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, MARKED])
class TestTurns:
    def test_an_answer_is_supervised_through_its_end_of_turn(self, template):
        text = marked_text(chat("q", "yes"), tokenizer_with(template))
        assert text == user("q") + "[[yes<|im_end|>]]\n"

    def test_every_assistant_turn_is_supervised(self, template):
        text = marked_text(chat("q", "one", "r", "two", "s"), tokenizer_with(template))
        rest = "<|im_start|>user\ns<|im_end|>\n"
        first = user("q") + "[[one<|im_end|>]]\n"
        assert text == first + user("r") + "[[two<|im_end|>]]\n" + rest

    def test_last_assistant_supervises_the_last_turn_only(self, template):
        last = {"train_on": "last-assistant"}
        text = marked_text(chat("q", "one", "r", "two"), tokenizer_with(template), **last)
        assert text == user("q") + "one<|im_end|>\n" + user("r") + "[[two<|im_end|>]]\n"

    def test_train_on_all_supervises_every_token_except_the_first(self, template):
        text = marked_text(chat("q", "yes"), tokenizer_with(template), train_on="all")
        rest = user("q").removeprefix("<|im_start|>")
        assert text == f"<|im_start|>[[{rest}yes<|im_end|>\n]]"

    def test_an_answer_equal_to_other_text_is_supervised_in_its_own_place(self, template):
        """Contents that are part of the header or the end token, or equal to an earlier message."""
        for answer in (
            "end",
            "assistant",
            "user",
            "m",
            "<",
            "é 😀 日本",
            "a\n\nb",
            " ",
            "Zq00001qZ",
        ):
            text = marked_text(chat("same", *[answer] * 3), tokenizer_with(template))
            first = user("same") + f"[[{answer}<|im_end|>]]\n"
            assert text == first + user(answer) + f"[[{answer}<|im_end|>]]\n"

    def test_an_end_token_inside_a_text_does_not_end_the_turn(self, template):
        text = marked_text(chat("q", "a<|im_end|>b"), tokenizer_with(template))
        assert text == user("q") + "[[a<|im_end|>b<|im_end|>]]\n"
        with_turns = f"a<|im_end|>\n{user('r')}b"  # an answer that looks like several turns
        text = marked_text(chat("q", with_turns, "s", "c"), tokenizer_with(template))
        assert text == user("q") + f"[[{with_turns}<|im_end|>]]\n" + user("s") + "[[c<|im_end|>]]\n"

    def test_a_turn_of_weight_0_is_in_the_document_but_not_supervised(self, template):
        question, answer, *second_turn = chat("q", "one", "r", "two").messages
        untrained = replace(answer, is_trained=False)
        conversation = Conversation((question, untrained, *second_turn))
        text = marked_text(conversation, tokenizer_with(template))
        assert text == user("q") + "one<|im_end|>\n" + user("r") + "[[two<|im_end|>]]\n"
        text = marked_text(conversation, tokenizer_with(template), train_on="all")
        before = user("q").removeprefix("<|im_start|>")
        after = user("r") + "two<|im_end|>\n"
        assert text == f"<|im_start|>[[{before}]]one<|im_end|>[[\n{after}]]"
        without_trained_turn = Conversation((question, untrained))
        for settings in ({}, {"split_turns": True}, {"train_on": "last-assistant"}):
            with refused("no supervised token", "weight: 0", error=RowError):
                marked_text(without_trained_turn, tokenizer_with(template), **settings)

    def test_split_turns_makes_a_document_of_each_turn(self, template):
        text = marked_texts(
            chat("q", "one", "r", "two", "s"), tokenizer_with(template), split_turns=True
        )
        first = user("q") + "one<|im_end|>\n" + user("r")
        assert text == [user("q") + "[[one<|im_end|>]]\n", first + "[[two<|im_end|>]]\n"]


def test_a_role_header_is_not_supervised_by_a_template_without_generation_prompt():
    template = CHATML.partition("{% if add_generation_prompt")[0]
    text = marked_text(chat("q", "one", "r", "assistant two"), tokenizer_with(template))
    assert text == user("q") + "[[one<|im_end|>]]\n" + user("r") + "[[assistant two<|im_end|>]]\n"
    answer = "<think>\na\n</think>\n\nb"
    text = marked_text(chat("q", answer), tokenizer_with(template))
    assert text == user("q") + f"[[{answer}<|im_end|>]]\n"


def test_a_bos_of_the_template_is_not_doubled_by_the_tokenizer():
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert marked_text(chat("q", "yes"), tokenizer).count("<s>") == 1


def test_an_end_of_turn_is_supervised_if_it_is_also_the_padding_token():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert marked_text(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"


def test_a_content_that_the_template_changes_is_supervised_as_written():
    upper = CHATML.replace("m['content'] }}", "m['content'] | upper }}")
    text = marked_text(chat("q", "one", "r", "two"), tokenizer_with(upper))
    assert text == user("Q") + "[[ONE<|im_end|>]]\n" + user("R") + "[[TWO<|im_end|>]]\n"
    first = marked_text(chat("a", "q", "b", first="assistant"), make_tokenizer())
    assert first.startswith("<|im_start|>assistant\n[[a<|im_end|>]]\n<|im_start|>user\n")


def test_markup_may_depend_on_the_text():
    template = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ '!' if m.content == '?' }}")
    text = marked_text(chat("?", "one", "q", "two"), tokenizer_with(template))
    first = user("?").replace("user", "user!") + "[[one<|im_end|>]]\n"
    assert text == first + user("q") + "[[two<|im_end|>]]\n"
    text = marked_text(chat("q", "?"), tokenizer_with(template))
    assert text == user("q").replace("assistant", "assistant!") + "[[?<|im_end|>]]\n"


def test_reasoning_that_contains_turn_markup_ends_at_its_own_turn():
    answer = f"<think>\na<|im_end|>\n{user('fake')}b\n</think>\n\nc"
    text = marked_text(chat("q", answer, "r", "d"), make_tokenizer())
    assert text == user("q") + f"[[{answer}<|im_end|>]]\n" + user("r") + "[[d<|im_end|>]]\n"


def test_a_header_token_that_absorbs_the_following_space_is_not_supervised():
    """Phi-3's special tokens do so (`rstrip`)."""
    from tokenizers import AddedToken

    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = tokenizer_with(template, ["<|user|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])
    (document,) = encoder(tokenizer).encode(chat("q", "  a", "r", " b"))
    trained = tokenizer.decode(document.ids[document.supervised].tolist())
    assert trained == "a<|end|>b<|end|>"


def test_a_template_with_generation_blocks_that_omits_tools_or_calls_is_refused():
    answer = Message("assistant", "a", others={"tool_calls": [{"function": {"name": "f"}}]})
    with refused("messages[1].tool_calls[0].name", error=RowError):
        marked_text(Conversation((Message("user", "q"), answer)), tokenizer_with(MARKED))
    with refused("has tools", "chat_template", error=RowError):
        marked_text(Conversation(chat("q", "a").messages, ({"name": "f"},)), tokenizer_with(MARKED))


# Several messages have the same text: one that is omitted must not be taken for another.
EQUAL_TEXTS = Conversation(
    (
        Message("system", "qu"), *chat("qu", "an").messages,
        Message("tool", "qu"), *chat("qu", "bn").messages,
    )
)  # fmt: skip
FIRST_OF_ROLE = {"system": 0, "user": 1, "assistant": 2, "tool": 3}
WRITES = pytest.mark.parametrize("write", ["{{ m['content'] }}", "{{ m['content'] | upper }}"])


def with_generation_blocks(write, role=None, instead=""):
    """A template that writes a message as `write`, or as `instead` if it has the role `role`."""
    written = f"{{% if m.role != '{role}' %}}{write}{{% else %}}{instead}{{% endif %}}"
    return tokenizer_with(MARKED.replace("{{ m['content'] }}", written))


@WRITES
def test_a_template_with_generation_blocks_may_write_equal_texts(write):
    assert marked_text(EQUAL_TEXTS, with_generation_blocks(write)).count("[[") == 2


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@WRITES
def test_a_template_with_generation_blocks_that_omits_a_prompt_is_refused(role, write):
    with refused(f"messages[{FIRST_OF_ROLE[role]}].content", error=RowError):
        marked_text(EQUAL_TEXTS, with_generation_blocks(write, role))


@WRITES
def test_a_template_with_generation_blocks_that_omits_answers_is_refused(write):
    with refused("chat template"):
        marked_text(EQUAL_TEXTS, with_generation_blocks(write, "assistant"))


@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
@WRITES
def test_a_template_with_generation_blocks_that_shortens_a_text_is_refused(role, write):
    with refused(f"messages[{FIRST_OF_ROLE[role]}].content", error=RowError):
        marked_text(EQUAL_TEXTS, with_generation_blocks(write, role, "{{ m['content'][:1] }}"))


def test_turn_markup_in_a_text_that_the_template_changes_does_not_end_the_turn():
    template = CHATML.replace("m['content'] }}", "m['content'] | replace('x', 'y') }}")
    fake = f"xa<|im_end|>\n{user('r')}xb"
    alone = marked_text(chat("q", fake), tokenizer_with(template))
    assert alone == user("q") + f"[[{fake.replace('x', 'y')}<|im_end|>]]\n"
    both = marked_text(chat("q", fake, "r", "xb"), tokenizer_with(template))
    assert both == alone + user("r") + "[[yb<|im_end|>]]\n"


def test_a_text_that_is_omitted_or_written_twice_is_refused():
    content = "{{ m['content'] }}"
    only_users = CHATML.replace(content, "{{ m['content'] if m.role == 'user' }}")
    with refused("chat template", "assistant"):
        marked_text(chat("q", "a"), tokenizer_with(only_users))
    twice = CHATML.replace(content, "{{ m['content'] + m['content'] }}")
    with refused("chat template", "assistant turn", "more than once", error=RowError):
        marked_text(chat("q", "a"), tokenizer_with(twice))
    only_assistants = CHATML.replace(content, "{{ m['content'] if m.role != 'user' }}")
    with refused("messages[0].content", error=RowError):
        marked_text(chat("q", "a"), tokenizer_with(only_assistants))


def test_an_end_token_that_ends_only_user_turns_does_not_end_answers():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    template += "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}{% endfor %}"
    assert marked_text(chat("q", "a"), tokenizer_with(template)).endswith(
        "assistant: [[a<|im_end|>]]"
    )
    for answer in ("a", "<think>a</think>b"):
        with refused("chat template", "end", "<|im_end|>", error=RowError):
            marked_text(chat("q", answer, "r", "b"), tokenizer_with(template))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_template_that_does_not_end_turns_is_refused(train_on):
    for row in (chat("q", "a", "r", "b"), chat("q", "a", "r"), chat("q", "a <|im_end|> b")):
        with refused("chat template", "ends", "special token"):
            marked_text(row, tokenizer_with(NO_END), train_on=train_on)
    with refused("chat template", "end", "<|im_end|>", error=RowError):
        marked_text(chat("q", "a", "r", "b"), tokenizer_with(LAST_END), train_on=train_on)


def test_turns_that_are_not_supervised_need_no_end_token():
    text = marked_text(
        chat("q", "a", "r", "b"), tokenizer_with(LAST_END), train_on="last-assistant"
    )
    assert text.endswith(": a<|im_start|>user: r<|im_start|>assistant: [[b<|im_end|>]]")


def test_a_generation_block_without_the_end_of_turn_is_refused():
    end = "<|im_end|>\n{% endgeneration %}"
    template = MARKED.replace(end, "{% endgeneration %}<|im_end|>\n")
    for answer in ("a", "a<|im_end|>"):
        with refused("chat template", "{% generation %}", "special token"):
            marked_text(chat("q", answer), tokenizer_with(template))


def test_several_generation_blocks_of_a_turn_are_one_span():
    piece = "{% generation %}x<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_with(MARKED.replace("{% generation %}", piece + "{% generation %}"))
    text = marked_text(chat("q", "a", "r", "b"), tokenizer)
    assert text.count("[[x<|im_end|>") == text.count("<|im_end|>]]") == 2


def test_a_generation_block_in_a_macro_marks_its_output():
    macro = "{% macro say(m) %}{% generation %}{{ m }}<|im_end|>{% endgeneration %}{% endmacro %}"
    start, end = MARKED.index("{% generation %}"), MARKED.index("{% else %}")
    template = macro + MARKED[:start] + "{{ say(m.content) + '\n' }}" + MARKED[end:]
    text = marked_text(chat("q", "one", "r", "two"), tokenizer_with(template))
    assert text == user("q") + "[[one<|im_end|>]]\n" + user("r") + "[[two<|im_end|>]]\n"


def test_an_invalid_or_failing_template_is_refused():
    with refused("chat template", "Jinja"):
        marked_text(chat("q", "a"), tokenizer_with("{% for %}"))
    with refused("chat template", "no such thing"):
        marked_text(chat("q", "a"), tokenizer_with("{{ raise_exception('no such thing') }}"))


class TestChatML:
    def test_it_is_used_only_if_the_run_file_sets_it(self):
        with refused("chat_template: chatml"):
            marked_text(chat("q", "a"), tokenizer_with(None))
        assert marked_text(Completion("q", "a"), tokenizer_with(None)) == "q[[a<|im_end|>]]"
        text = marked_text(chat("q", "a"), tokenizer_with(None), chat_template="chatml")
        assert text == user("q") + "[[a<|im_end|>]]\n"

    def test_turns_end_with_the_end_of_sequence_token(self):
        tokenizer = tokenizer_without_im_end()
        text = marked_text(chat("q", "a"), tokenizer, chat_template="chatml")
        assert text.endswith("assistant\n[[a<|endoftext|>]]\n")
        tokenizer = tokenizer_without_im_end()
        tokenizer.eos_token = None
        with refused("chat_template: chatml", "eos_token"):
            marked_text(chat("q", "a"), tokenizer, chat_template="chatml")

    def test_the_published_template_gives_the_same_documents(self, tmp_path):
        tokenizer = tokenizer_with(None)
        tokenizer.save_pretrained(tmp_path)
        settings = encoder(tokenizer, model=str(tmp_path))._settings
        assert chat_template_of(settings) is None
        published = chat_template_of(settings.model_copy(update={"chat_template": "chatml"}))
        text = marked_text(chat("q", "a"), tokenizer_with(published))
        assert text == marked_text(chat("q", "a"), tokenizer, chat_template="chatml")

    def test_it_does_not_replace_the_model_s_own_template(self):
        with refused("chat_template: chatml", "the model has a chat template"):
            encoder(tokenizer_with(MARKED), chat_template="chatml")
        tokenizer = tokenizer_with(None)
        encoder(tokenizer, chat_template="chatml")
        encoder(tokenizer, chat_template="chatml")  # a published adapter has it


def test_words_in_a_template_do_not_count_as_reading_a_key():
    """A template may have the words reasoning, enable_thinking and tools without such a key."""
    template = "{# no tools #}{{ 'by reasoning' if enable_thinking }}" + CHATML
    answer = Message("assistant", "a", others={"reasoning_content": "hm"})
    with refused("messages[1].reasoning_content", "<think>", error=RowError):
        marked_text(Conversation((Message("user", "q"), answer)), tokenizer_with(template))
    with refused("has tools", "chat_template", error=RowError):
        marked_text(
            Conversation(chat("q", "a").messages, ({"name": "f"},)), tokenizer_with(template)
        )


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("turns", [1, 5])
def test_a_row_is_rendered_once(template, turns, monkeypatch):
    row_encoder = encoder(tokenizer_with(template))
    rendered = record_renderings(monkeypatch)
    rows = [chat(*(f"turn {t} of row {i}" for t in range(2 * turns))) for i in range(50)]
    assert not any(isinstance(row, RowError) for row in row_encoder.encode_many(rows))
    assert len(rendered) == 50
