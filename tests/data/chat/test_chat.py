"""Which tokens are trained on, read back as text: `[[like this]]`."""

import pytest

from pipeline.data.chat.encoder import chat_template_of
from pipeline.errors import UserError
from pipeline.rows.examples import Completion, Conversation, Message, RowError
from tests.data.chat.documents import (
    adding_bos,
    all_shown,
    chat,
    encoder,
    renderings,
    shown,
    tokenizer_with,
    user,
    without_im_end,
)
from tests.messages import refused
from tests.tiny import CHATML, make_tokenizer

pytestmark = pytest.mark.tensor

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
OWN_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% if loop.last %}"
OWN_END += "<|im_end|>{% endif %}\n{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, MARKED])
class TestTurns:
    def test_a_turn_is_its_content_through_the_end_of_turn(self, template):
        found = shown(chat("q", "yes"), tokenizer_with(template))
        assert found == user("q") + "[[yes<|im_end|>]]\n"

    def test_every_assistant_turn(self, template):
        found = shown(chat("q", "one", "r", "two", "s"), tokenizer_with(template))
        rest = "<|im_start|>user\ns<|im_end|>\n"
        first = user("q") + "[[one<|im_end|>]]\n"
        assert found == first + user("r") + "[[two<|im_end|>]]\n" + rest

    def test_the_last_assistant_turn(self, template):
        last = {"train_on": "last-assistant"}
        found = shown(chat("q", "one", "r", "two"), tokenizer_with(template), **last)
        assert found == user("q") + "one<|im_end|>\n" + user("r") + "[[two<|im_end|>]]\n"

    def test_all_but_the_first_token(self, template):
        found = shown(chat("q", "yes"), tokenizer_with(template), train_on="all")
        rest = user("q").removeprefix("<|im_start|>")
        assert found == f"<|im_start|>[[{rest}yes<|im_end|>\n]]"

    def test_no_text_leads_astray(self, template):
        """Neither a content that is in the header or in the end token, nor one said before."""
        for said in ("end", "assistant", "user", "m", "<", "é 😀 日本", "a\n\nb", " ", "Zq00001qZ"):
            found = shown(chat("same", said, said, said), tokenizer_with(template))
            first = user("same") + f"[[{said}<|im_end|>]]\n"
            assert found == first + user(said) + f"[[{said}<|im_end|>]]\n", said

    def test_a_text_that_looks_like_an_end_does_not_end_the_turn(self, template):
        found = shown(chat("q", "a<|im_end|>b"), tokenizer_with(template))
        assert found == user("q") + "[[a<|im_end|>b<|im_end|>]]\n"
        fake = f"a<|im_end|>\n{user('r')}b"
        found = shown(chat("q", fake, "s", "c"), tokenizer_with(template))
        assert found == user("q") + f"[[{fake}<|im_end|>]]\n" + user("s") + "[[c<|im_end|>]]\n"

    def test_a_turn_of_weight_0_is_read_and_not_trained(self, template):
        one, two = chat("q", "one", "r", "two").messages[::2], ("one", "two")
        turns = [Message("assistant", text, is_trained=text == "two") for text in two]
        both = Conversation((one[0], turns[0], one[1], turns[1]))
        found = shown(both, tokenizer_with(template))
        assert found == user("q") + "one<|im_end|>\n" + user("r") + "[[two<|im_end|>]]\n"
        found = shown(both, tokenizer_with(template), train_on="all")
        asked = user("q").removeprefix("<|im_start|>")
        rest = user("r") + "two<|im_end|>\n"
        assert found == f"<|im_start|>[[{asked}]]one<|im_end|>[[\n{rest}]]"
        nothing = Conversation((one[0], turns[0]))
        for settings in ({}, {"split_turns": True}, {"train_on": "last-assistant"}):
            with pytest.raises(RowError, match="no supervised token"):
                shown(nothing, tokenizer_with(template), **settings)

    def test_a_document_of_each_turn(self, template):
        found = all_shown(
            chat("q", "one", "r", "two", "s"), tokenizer_with(template), split_turns=True
        )
        first = user("q") + "one<|im_end|>\n" + user("r")
        assert found == [user("q") + "[[one<|im_end|>]]\n", first + "[[two<|im_end|>]]\n"]


def test_a_role_header_is_not_trained_where_the_template_ignores_the_generation_prompt():
    template = CHATML.partition("{% if add_generation_prompt")[0]
    found = shown(chat("q", "one", "r", "assistant two"), tokenizer_with(template))
    assert found == user("q") + "[[one<|im_end|>]]\n" + user("r") + "[[assistant two<|im_end|>]]\n"
    thought = "<think>\na\n</think>\n\nb"
    found = shown(chat("q", thought), tokenizer_with(template))
    assert found == user("q") + f"[[{thought}<|im_end|>]]\n"


def test_a_tokenizer_that_adds_a_bos_does_not_double_the_template_s():
    tokenizer = adding_bos()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert shown(chat("q", "yes"), tokenizer).count("<s>") == 1


def test_padding_that_is_the_end_of_turn_is_trained_where_it_is_one():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert shown(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"


def test_a_turn_as_it_stands_where_the_template_changes_it():
    upper = CHATML.replace("m['content'] }}", "m['content'] | upper }}")
    found = shown(chat("q", "one", "r", "two"), tokenizer_with(upper))
    assert found == user("Q") + "[[ONE<|im_end|>]]\n" + user("R") + "[[TWO<|im_end|>]]\n"
    first = shown(chat("a", "q", "b", first="assistant"), make_tokenizer())
    assert first.startswith("<|im_start|>assistant\n[[a<|im_end|>]]\n<|im_start|>user\n")


def test_a_template_may_write_other_markup_for_some_texts():
    template = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ '!' if m.content == '?' }}")
    found = shown(chat("?", "one", "q", "two"), tokenizer_with(template))
    first = user("?").replace("user", "user!") + "[[one<|im_end|>]]\n"
    assert found == first + user("q") + "[[two<|im_end|>]]\n"
    found = shown(chat("q", "?"), tokenizer_with(template))
    assert found == user("q").replace("assistant", "assistant!") + "[[?<|im_end|>]]\n"


def test_a_thought_full_of_fake_turns_ends_where_the_next_real_one_begins():
    thought = f"<think>\na<|im_end|>\n{user('fake')}b\n</think>\n\nc"
    found = shown(chat("q", thought, "r", "d"), make_tokenizer())
    assert found == user("q") + f"[[{thought}<|im_end|>]]\n" + user("r") + "[[d<|im_end|>]]\n"


def test_a_header_token_that_takes_the_space_behind_it_is_not_trained():
    """As Phi-3's special tokens do (`rstrip`)."""
    from tokenizers import AddedToken

    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = tokenizer_with(template, ["<|user|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])
    (document,) = encoder(tokenizer).encode(chat("q", "  a", "r", " b"))
    trained = tokenizer.decode(document.ids[document.supervised].tolist())
    assert trained == "a<|end|>b<|end|>"


def test_tools_and_calls_that_a_template_with_marks_does_not_know_are_refused():
    said = Message("assistant", "a", others={"tool_calls": [{"function": {"name": "f"}}]})
    with refused("messages[1].tool_calls[0].name", error=RowError):
        shown(Conversation((Message("user", "q"), said)), tokenizer_with(MARKED))
    with refused("has tools", "chat_template", error=RowError):
        shown(Conversation(chat("q", "a").messages, ({"name": "f"},)), tokenizer_with(MARKED))


@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
@pytest.mark.parametrize("write", ["{{ m['content'] }}", "{{ m['content'] | upper }}"])
def test_a_template_with_marks_that_omits_a_message_is_refused(role, write):
    """Even where another message has the same text."""
    messages = [Message("system", "qu"), *chat("qu", "an").messages, Message("tool", "qu")]
    messages += chat("qu", "bn").messages
    template = MARKED.replace("{{ m['content'] }}", write)
    assert shown(Conversation(tuple(messages)), tokenizer_with(template)).count("[[") == 2
    losing = template.replace(write, f"{{% if m.role != '{role}' %}}{write}{{% endif %}}")
    number = [message.role for message in messages].index(role)
    error, fact = RowError, f"messages[{number}].content"
    if role == "assistant":
        error, fact = UserError, "chat template"
    with refused(fact, error=error):
        shown(Conversation(tuple(messages)), tokenizer_with(losing))
    short = template.replace(write, f"{{% if m.role != '{role}' %}}{write}{{% else %}}"
                             "{{ m['content'][:1] }}{% endif %}")  # fmt: skip
    with refused(f"messages[{number}].content", error=RowError):
        shown(Conversation(tuple(messages)), tokenizer_with(short))


def test_fake_turns_in_a_text_that_the_template_changes_are_its_own():
    template = CHATML.replace("m['content'] }}", "m['content'] | replace('x', 'y') }}")
    fake = f"xa<|im_end|>\n{user('r')}xb"
    alone = shown(chat("q", fake), tokenizer_with(template))
    assert alone == user("q") + f"[[{fake.replace('x', 'y')}<|im_end|>]]\n"
    both = shown(chat("q", fake, "r", "xb"), tokenizer_with(template))
    assert both == alone + user("r") + "[[yb<|im_end|>]]\n"


def test_a_text_that_is_not_written_or_written_twice_is_refused():
    content = "{{ m['content'] }}"
    only_users = CHATML.replace(content, "{{ m['content'] if m.role == 'user' }}")
    with refused("chat template", "assistant"):
        shown(chat("q", "a"), tokenizer_with(only_users))
    twice = CHATML.replace(content, "{{ m['content'] + m['content'] }}")
    with pytest.raises(RowError, match="more than once"):
        shown(chat("q", "a"), tokenizer_with(twice))
    only_assistants = CHATML.replace(content, "{{ m['content'] if m.role != 'user' }}")
    with refused("messages[0].content", error=RowError):
        shown(chat("q", "a"), tokenizer_with(only_assistants))


def test_the_end_of_a_question_is_not_taken_for_the_end_of_an_answer():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    template += "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}{% endfor %}"
    assert shown(chat("q", "a"), tokenizer_with(template)).endswith("assistant: [[a<|im_end|>]]")
    for said in ("a", "<think>a</think>b"):
        with pytest.raises(RowError, match="does not end every assistant turn"):
            shown(chat("q", said, "r", "b"), tokenizer_with(template))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_template_that_does_not_end_turns_is_refused(train_on):
    for said in (chat("q", "a", "r", "b"), chat("q", "a", "r"), chat("q", "a <|im_end|> b")):
        with pytest.raises(UserError, match="without a special token"):
            shown(said, tokenizer_with(NO_END), train_on=train_on)
    with pytest.raises(RowError, match="does not end every assistant turn"):
        shown(chat("q", "a", "r", "b"), tokenizer_with(OWN_END), train_on=train_on)


def test_turns_that_are_not_trained_need_no_end():
    found = shown(chat("q", "a", "r", "b"), tokenizer_with(OWN_END), train_on="last-assistant")
    assert found.endswith(": a<|im_start|>user: r<|im_start|>assistant: [[b<|im_end|>]]")


def test_a_mark_that_leaves_out_the_end_of_turn_is_refused():
    end = "<|im_end|>\n{% endgeneration %}"
    template = MARKED.replace(end, "{% endgeneration %}<|im_end|>\n")
    for said in ("a", "a<|im_end|>"):
        with pytest.raises(UserError, match="does not contain the special token"):
            shown(chat("q", said), tokenizer_with(template))


def test_blocks_before_and_behind_an_answer_belong_to_its_turn():
    piece = "{% generation %}x<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_with(MARKED.replace("{% generation %}", piece + "{% generation %}"))
    found = shown(chat("q", "a", "r", "b"), tokenizer)
    assert found.count("[[x<|im_end|>") == found.count("<|im_end|>]]") == 2


def test_a_block_in_a_macro_marks_what_it_wrote():
    macro = "{% macro said(m) %}{% generation %}{{ m }}<|im_end|>{% endgeneration %}{% endmacro %}"
    start, end = MARKED.index("{% generation %}"), MARKED.index("{% else %}")
    template = macro + MARKED[:start] + "{{ said(m.content) + '\n' }}" + MARKED[end:]
    found = shown(chat("q", "one", "r", "two"), tokenizer_with(template))
    assert found == user("q") + "[[one<|im_end|>]]\n" + user("r") + "[[two<|im_end|>]]\n"


def test_a_template_that_is_not_valid_is_refused():
    with pytest.raises(UserError, match="not valid Jinja"):
        shown(chat("q", "a"), tokenizer_with("{% for %}"))
    with pytest.raises(UserError, match="no such thing"):
        shown(chat("q", "a"), tokenizer_with("{{ raise_exception('no such thing') }}"))


class TestChatML:
    def test_only_if_the_run_file_says_so(self):
        with pytest.raises(UserError, match="chat_template: chatml"):
            shown(chat("q", "a"), tokenizer_with(None))
        assert shown(Completion("q", "a"), tokenizer_with(None)) == "q[[a<|im_end|>]]"
        found = shown(chat("q", "a"), tokenizer_with(None), chat_template="chatml")
        assert found == user("q") + "[[a<|im_end|>]]\n"

    def test_turns_end_as_texts_do(self):
        tokenizer = without_im_end()
        found = shown(chat("q", "a"), tokenizer, chat_template="chatml")
        assert found.endswith("assistant\n[[a<|endoftext|>]]\n")
        tokenizer = without_im_end()
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="never learn to stop"):
            shown(chat("q", "a"), tokenizer, chat_template="chatml")

    def test_what_a_model_without_template_is_published_with(self, tmp_path):
        tokenizer = tokenizer_with(None)
        tokenizer.save_pretrained(tmp_path)
        settings = encoder(tokenizer, model=str(tmp_path))._settings
        assert chat_template_of(settings) is None
        published = chat_template_of(settings.model_copy(update={"chat_template": "chatml"}))
        found = shown(chat("q", "a"), tokenizer_with(published))
        assert found == shown(chat("q", "a"), tokenizer, chat_template="chatml")

    def test_a_template_of_the_model_s_own_is_not_replaced(self):
        with pytest.raises(UserError, match="of its own"):
            encoder(tokenizer_with(MARKED), chat_template="chatml")
        tokenizer = tokenizer_with(None)
        encoder(tokenizer, chat_template="chatml")
        encoder(tokenizer, chat_template="chatml")  # as a published adapter has it


def test_a_key_that_only_looks_read_is_refused():
    """`reasoning` in a text, `enable_thinking`, `tools`: words that a template may have anyway."""
    template = "{# no tools #}{{ 'by reasoning' if enable_thinking }}" + CHATML
    said = Message("assistant", "a", others={"reasoning_content": "hm"})
    with refused("messages[1].reasoning_content", "<think>", error=RowError):
        shown(Conversation((Message("user", "q"), said)), tokenizer_with(template))
    with refused("has tools", "chat_template", error=RowError):
        shown(Conversation(chat("q", "a").messages, ({"name": "f"},)), tokenizer_with(template))


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("turns", [1, 5])
def test_a_row_is_rendered_once(template, turns, monkeypatch):
    made = encoder(tokenizer_with(template))
    rendered = renderings(monkeypatch)
    rows = [chat(*(f"turn {t} of row {i}" for t in range(2 * turns))) for i in range(50)]
    assert not any(isinstance(row, RowError) for row in made.encode_many(rows))
    assert len(rendered) == 50
