"""Which tokens are trained on, read back as text: `[[like this]]`."""

import json

import pytest

from pipeline.data.chat import load_tokenizer
from pipeline.data.formats import Completion, Conversation, Message, RowError, Text, Tokens
from pipeline.errors import UserError
from tests.tensor.chatting import all_shown, chat, encoder, shown, tokenizer_with
from tests.tiny import CHATML, make_tokenizer

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
OWN_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% if loop.last %}"
OWN_END += "<|im_end|>{% endif %}\n{% endfor %}"


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def adding_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(CHATML, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def with_token_ab():
    tokenizer = make_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"]["ab"] = len(tokenizer)
    data["model"]["merges"] = [["a", "b"]]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(data))
    assert len(tokenizer("ab").input_ids) == 1
    return tokenizer


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

    def test_turns_end_as_texts_do_where_there_is_no_im_end(self):
        tokenizer = without_im_end()
        found = shown(chat("q", "a"), tokenizer, chat_template="chatml")
        assert found.endswith("assistant\n[[a<|endoftext|>]]\n")
        tokenizer = without_im_end()
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="never learn to stop"):
            shown(chat("q", "a"), tokenizer, chat_template="chatml")

    def test_a_template_of_the_model_s_own_is_not_replaced(self):
        with pytest.raises(UserError, match="of its own"):
            encoder(tokenizer_with(MARKED), chat_template="chatml")
        tokenizer = tokenizer_with(None)
        encoder(tokenizer, chat_template="chatml")
        encoder(tokenizer, chat_template="chatml")  # as a published adapter has it


def without_im_end():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(("<|endoftext|>", *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


class TestPromptAndCompletion:
    def test_the_completion_and_the_end_are_trained(self):
        found = shown(Completion("q:", " a"), make_tokenizer())
        assert found == "q:[[ a<|im_end|>]]"

    def test_all(self):
        found = shown(Completion("q:", " a"), make_tokenizer(), train_on="all")
        assert found == "q[[: a<|im_end|>]]"

    def test_an_end_that_is_there_is_not_doubled(self):
        found = shown(Completion("q", "a<|im_end|>"), make_tokenizer())
        assert found == "q[[a<|im_end|>]]"

    def test_one_bos_where_the_tokenizer_adds_one(self):
        assert shown(Completion("q", "a"), adding_bos()) == "<s>q[[a<|im_end|>]]"
        assert shown(Completion("<s>q", "a"), adding_bos()) == "<s>q[[a<|im_end|>]]"
        assert shown(Completion("", "a"), adding_bos()) == "<s>[[a<|im_end|>]]"
        silent = tokenizer_with(CHATML, bos_token="<s>")
        assert shown(Completion("q", "a"), silent) == "q[[a<|im_end|>]]"

    def test_without_a_prompt_the_first_token_is_not_trained(self):
        assert shown(Completion("", "ab"), make_tokenizer()) == "a[[b<|im_end|>]]"

    def test_a_token_over_the_border_is_cut_there(self):
        """`ab` is one token; after the prompt `a` the model will see `a` and has to say `b`."""
        tokenizer = with_token_ab()
        (document,) = encoder(tokenizer).encode(Completion("xa", "b"))
        assert document.ids.tolist() == [
            *tokenizer("xa").input_ids,
            *tokenizer("b").input_ids,
            tokenizer.eos_token_id,
        ]
        assert document.supervised.tolist() == [False, False, True, True]
        assert shown(Completion("x", "ab"), tokenizer) == "x[[ab<|im_end|>]]"

    def test_no_end_of_sequence_token_is_refused(self):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        for example in (Completion("q", "a"), Text("a")):
            with pytest.raises(UserError, match="no end-of-sequence token"):
                shown(example, tokenizer)


def test_text_is_trained_whole_and_ends():
    assert shown(Text("abc"), make_tokenizer()) == "a[[bc<|im_end|>]]"
    assert shown(Text("abc"), adding_bos()) == "<s>[[abc<|im_end|>]]"
    with pytest.raises(RowError, match="no supervised token"):
        shown(Text("<|im_end|>"), make_tokenizer())


class TestPreTokenised:
    def test_ids_stay_what_they_are(self):
        (document,) = encoder(make_tokenizer()).encode(Tokens((5, 6, 7), (True, False, True)))
        assert document.ids.tolist() == [5, 6, 7]
        assert document.supervised.tolist() == [False, False, True]

    def test_ids_of_another_vocabulary_are_refused(self):
        size = len(make_tokenizer())
        encoder(make_tokenizer()).encode(Tokens((0, size - 1), (True, True)))
        for outside in (-1, size, 2**40):
            with pytest.raises(RowError, match=f"the model's {size} tokens"):
                encoder(make_tokenizer()).encode(Tokens((0, outside), (True, True)))

    def test_nothing_supervised(self):
        for supervised in ((True, False), (False, False)):
            with pytest.raises(RowError, match="no supervised token"):
                encoder(make_tokenizer()).encode(Tokens((5, 6), supervised))


def test_many_at_once_are_those_of_each_alone():
    half = "\ud800"
    examples = [
        chat("q", "one", "r", "two"),
        Completion("q", "a"),
        Tokens((5, 10**6), (True, True)),
        chat("q", half),
        Text("text"),
        Tokens((5, 6), (True, True)),
        chat("q", "a"),
    ]
    together = encoder(make_tokenizer(), split_turns=True)
    alone = encoder(make_tokenizer(), split_turns=True)
    found = together.encode_many(examples)
    assert [len(f) if isinstance(f, list) else str(f)[:4] for f in found] == [
        2,
        1,
        "`inp",
        "half",
        1,
        1,
        1,
    ]
    for example, documents in zip(examples, found, strict=True):
        if isinstance(documents, RowError):
            with pytest.raises(RowError):
                alone.encode(example)
            continue
        for one, other in zip(documents, alone.encode(example), strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.supervised.tolist() == other.supervised.tolist()
    assert together.encode_many([]) == []


def test_settings_of_the_tokenizer_file_do_not_cut_documents():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert shown(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"


def test_whether_an_end_is_taught():
    made = encoder(make_tokenizer())
    (document,) = made.encode(chat("q", "yes"))
    assert made.teaches_end(document)
    for kept in (len(document.ids) - 2, 1):
        cut = type(document)(document.ids[:kept], document.supervised[:kept])
        assert not made.teaches_end(cut)


class TestLastAnswer:
    def test_the_question_is_what_comes_before_the_answer(self):
        made = encoder(make_tokenizer())
        prompt, answer = made.last_answer(chat("q", "one", "r", "two", "s"))
        assert prompt == user("q") + "one<|im_end|>\n" + user("r")
        assert answer == "two"

    def test_raw_text_begins_as_it_was_trained(self):
        assert encoder(make_tokenizer()).last_answer(Completion("q", " a")) == ("q", " a")
        assert encoder(adding_bos()).last_answer(Completion("q", "a")) == ("<s>q", "a")
        assert encoder(adding_bos()).last_answer(Completion("<s>q", "a")) == ("<s>q", "a")

    def test_a_text_has_no_question(self):
        with pytest.raises(RowError, match="no question"):
            encoder(make_tokenizer()).last_answer(Text("a"))


class TestLoading:
    def test_a_saved_tokenizer(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert shown(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"

    def test_what_cannot_be_loaded_names_the_folder(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            load_tokenizer(tmp_path / "absent")
        with pytest.raises(UserError, match=str(tmp_path)):
            load_tokenizer(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        for text in ('{"half": ', '{"model": {"type": "Unheard"}}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(UserError, match="cannot be loaded"):
                load_tokenizer(tmp_path)

    def test_a_model_folder_without_tokenizer_gives_none(self, tmp_path):
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="tokenizer"):
            load_tokenizer(tmp_path)
