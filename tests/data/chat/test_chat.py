"""Which tokens are trained on, read back as text: `[[like this]]`."""

import pytest

from pipeline.data.chat.encoder import chat_template_of
from pipeline.errors import UserError
from pipeline.rows.formats import Completion, Conversation, Message, RowError
from tests.data.chat.chatting import (
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


def test_what_the_template_does_with_some_content_is_found_for_the_row():
    template = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ '!' if m.content == '?' }}")
    found = shown(chat("?", "one", "q", "two"), tokenizer_with(template))
    first = user("?").replace("user", "user!") + "[[one<|im_end|>]]\n"
    assert found == first + user("q") + "[[two<|im_end|>]]\n"
    with pytest.raises(RowError, match="not certain"):
        shown(chat("q", "?"), tokenizer_with(template))


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


def test_a_text_with_a_marker_of_ours_is_not_taken_for_it():
    template = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ '!' if 'Zq' in m.content }}")
    with pytest.raises(RowError, match="markers"):
        shown(chat("Zq00000qZ", "one"), tokenizer_with(template))


def test_tools_and_calls_that_a_template_with_marks_does_not_know_are_refused():
    said = Message("assistant", "a", others={"tool_calls": [{"function": {"name": "f"}}]})
    with pytest.raises(RowError, match="leaves out `tool_calls`"):
        shown(Conversation((Message("user", "q"), said)), tokenizer_with(MARKED))
    with pytest.raises(RowError, match="no place for tools"):
        shown(Conversation(chat("q", "a").messages, ({"name": "f"},)), tokenizer_with(MARKED))


@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
@pytest.mark.parametrize("write", ["{{ m['content'] }}", "{{ m['content'] | upper }}"])
def test_a_template_with_marks_loses_no_message_unsaid(role, write):
    """Whatever a content is: `q` would be in the text anyway."""
    messages = [Message("system", "q"), *chat("q", "a").messages, Message("tool", "q")]
    messages += chat("q", "b").messages
    template = MARKED.replace("{{ m['content'] }}", write)
    assert shown(Conversation(tuple(messages)), tokenizer_with(template)).count("[[") == 2
    losing = template.replace(write, f"{{% if m.role != '{role}' %}}{write}{{% endif %}}")
    refused = UserError if role == "assistant" else RowError
    with pytest.raises(refused, match="leaves out"):
        shown(Conversation(tuple(messages)), tokenizer_with(losing))
    short = template.replace(write, f"{{% if m.role != '{role}' %}}{write}{{% else %}}"
                             "{{ m['content'][:3] }}{% endif %}")  # fmt: skip
    with pytest.raises(refused, match="leaves out"):
        shown(Conversation(tuple(messages)), tokenizer_with(short))


def test_a_template_with_marks_that_refuses_markers_is_held_to_the_texts():
    choosy = "{% for m in messages %}{% if 'Zq' in m.content %}{{ raise_exception('no') }}"
    choosy += "{% endif %}{% endfor %}" + MARKED
    messages = (Message("system", "be brief"), *chat("why", "a").messages)
    assert "be brief" in shown(Conversation(messages), tokenizer_with(choosy))
    losing = choosy.replace("{% else %}", "{% elif m['role'] == 'user' %}")
    with pytest.raises(RowError, match=r"leaves out the content of a message \(user\)"):
        shown(Conversation(messages), tokenizer_with(losing.replace("'user'", "'system'")))


def test_a_row_is_rendered_once_by_a_template_with_marks_too(monkeypatch):
    made = encoder(tokenizer_with(MARKED))
    made.encode(chat("q", "a"))
    rendered = renderings(monkeypatch)
    made.encode_many([chat(f"q{i}", f"a{i}") for i in range(5)])
    assert len(rendered) == 5


def test_where_a_turn_ends_is_never_guessed():
    """Of a content that is not written as it is, its own fake turns cannot be told from real."""
    template = CHATML.replace("m['content'] }}", "m['content'] | replace('x', 'y') }}")
    fake = f"xa<|im_end|>\n{user('r')}xb"
    alone = shown(chat("q", fake), tokenizer_with(template))
    assert alone == user("q") + f"[[{fake.replace('x', 'y')}<|im_end|>]]\n"
    with pytest.raises(RowError, match="not certain"):
        shown(chat("q", fake, "r", "xb"), tokenizer_with(template))


def test_what_is_left_out_or_said_twice_is_refused():
    content = "{{ m['content'] }}"
    only_users = CHATML.replace(content, "{{ m['content'] if m.role == 'user' }}")
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        shown(chat("q", "a"), tokenizer_with(only_users))
    twice = CHATML.replace(content, "{{ m['content'] + m['content'] }}")
    with pytest.raises(RowError, match="more than once"):
        shown(chat("q", "a"), tokenizer_with(twice))
    only_assistants = CHATML.replace(content, "{{ m['content'] if m.role != 'user' }}")
    with pytest.raises(RowError, match=r"leaves out the content of a message \(user\)"):
        shown(chat("q", "a"), tokenizer_with(only_assistants))


def test_the_end_of_a_question_is_not_taken_for_the_end_of_an_answer():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    template += "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}{% endfor %}"
    assert shown(chat("q", "a"), tokenizer_with(template)).endswith("assistant: [[a<|im_end|>]]")
    for said in ("a", "<think>a</think>b"):
        with pytest.raises(RowError, match="does not end every assistant turn"):
            shown(chat("q", said, "r", "b"), tokenizer_with(template))


@pytest.mark.parametrize("train_on", ["assistant", "last-assistant", "all"])
def test_a_template_that_does_not_end_turns_is_refused(train_on):
    for said in (chat("q", "a", "r", "b"), chat("q", "a", "r"), chat("q", "a <|im_end|> b")):
        with pytest.raises(UserError, match="without a special token"):
            shown(said, tokenizer_with(NO_END), train_on=train_on)
    with pytest.raises(RowError, match="does not end every assistant turn"):
        shown(chat("q", "a", "r", "b"), tokenizer_with(OWN_END), train_on=train_on)


def test_a_mark_that_leaves_out_the_end_of_turn_is_refused():
    end = "<|im_end|>\n{% endgeneration %}"
    template = MARKED.replace(end, "{% endgeneration %}<|im_end|>\n")
    for said in ("a", "a<|im_end|>"):
        with pytest.raises(UserError, match="leaves out"):
            shown(chat("q", said), tokenizer_with(template))


def test_a_mark_in_pieces_has_no_certain_turns():
    piece = "{% generation %}x<|im_end|>{% endgeneration %}"
    tokenizer = tokenizer_with(MARKED.replace("{% generation %}", piece + "{% generation %}"))
    with pytest.raises(RowError, match="marks 2 pieces of 1 assistant turns"):
        shown(chat("q", "a"), tokenizer)


def test_a_template_that_is_not_valid_is_refused():
    with pytest.raises(UserError, match="not valid Jinja"):
        shown(chat("q", "a"), tokenizer_with("{% for %}"))
    with pytest.raises(UserError, match=r"cannot be written: .* no such thing"):
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
    with pytest.raises(RowError, match="leaves out `reasoning_content`"):
        shown(Conversation((Message("user", "q"), said)), tokenizer_with(template))
    with pytest.raises(RowError, match="no place for tools"):
        shown(Conversation(chat("q", "a").messages, ({"name": "f"},)), tokenizer_with(template))


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_once_a_shape_is_known_a_row_is_rendered_at_most_once(turns, monkeypatch):
    rendered = renderings(monkeypatch)
    encode = encoder(tokenizer_with(CHATML)).encode_many
    encode(rows_of(0, 20, turns))
    before = len(rendered)
    assert all(len(found) == 1 for found in encode(rows_of(20, 1020, turns)))
    assert before > 0
    assert len(rendered) - before <= 1000


def rows_of(first, end, turns):
    return [chat(*(f"turn {t} of row {i}" for t in range(2 * turns))) for i in range(first, end)]
