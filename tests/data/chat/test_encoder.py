"""Examples of every kind as documents, one by one and many at once; tokenizers as they are."""

import json

import numpy as np
import pytest

from pipeline.data.chat.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.rows.examples import Completion, RowError, Text, Tokens
from tests.data.chat.documents import (
    adding_bos,
    chat,
    encoder,
    sentence_piece,
    shown,
    tokenizer_with,
    user,
)
from tests.messages import refused
from tests.tiny import CHATML, make_tokenizer

pytestmark = pytest.mark.tensor


def with_token_ab():
    tokenizer = make_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"]["ab"] = len(tokenizer)
    data["model"]["merges"] = [["a", "b"]]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(data))
    assert len(tokenizer("ab").input_ids) == 1
    return tokenizer


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


class TestSpecialTokensInPlainText:
    ROWS = (
        Completion("say <|im_end|>", "x <|im_start|>y"),
        Completion("<|im_end|>", "<|im_end|> x <|im_end|>"),
        Text("one <|im_end|> two"),
    )

    @pytest.mark.parametrize("row", ROWS)
    def test_they_are_counted_or_the_row_is_rejected(self, row):
        (encoded,) = encoder(make_tokenizer()).encode_many([row])
        assert encoded.token_counts["special_tokens_in_text"] in (1, 2)
        text = row.text if isinstance(row, Text) else row.prompt
        with refused("special token", "<|im_end|>", error=RowError) as error:
            encoder(make_tokenizer(), special_tokens_in_text="reject").encode(row)
        assert ("`text`" in str(error.value)) == (isinstance(row, Text))
        assert "<|im_end|>" in text

    @pytest.mark.parametrize("row", ROWS)
    def test_they_are_tokenised_as_text(self, row):
        tokenizer = make_tokenizer()
        made = encoder(tokenizer, special_tokens_in_text="as-text")
        (document,) = made.encode(row)
        text = row.text if isinstance(row, Text) else row.prompt + row.completion
        end = tokenizer.eos_token
        whole = tokenizer.decode(document.ids.tolist())
        assert whole == (text if text.endswith(end) else text + end)
        assert sum(int(i) in made._special_ids for i in document.ids) == 1
        trained = tokenizer.decode(document.ids[document.supervised].tolist())
        answer = row.text if isinstance(row, Text) else row.completion
        assert trained.removesuffix(end) == answer.removesuffix(end)[isinstance(row, Text) :]

    def test_a_bos_and_an_end_around_the_text_are_its_own(self):
        tokenizer = adding_bos()
        text = f"{tokenizer.bos_token}one{tokenizer.eos_token}"
        (encoded,) = encoder(tokenizer).encode_many([Text(text)])
        assert not encoded.token_counts


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
    assert [str(f)[:4] if isinstance(f, RowError) else len(f.documents) for f in found] == [
        2,
        1,
        "`inp",
        "half",
        1,
        1,
        1,
    ]
    for example, row in zip(examples, found, strict=True):
        if isinstance(row, RowError):
            with pytest.raises(RowError):
                alone.encode(example)
            continue
        for one, other in zip(row.documents, alone.encode(example), strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.supervised.tolist() == other.supervised.tolist()
    assert together.encode_many([]) == []


@pytest.mark.parametrize("make", [make_tokenizer, adding_bos, sentence_piece])
def test_texts_are_the_same_tokens_with_and_without_places_of_characters(make):
    """Without, as among texts alone, is another road through the tokenizer."""
    given = ("a", " a b  c ", "\n\nab", "é 🙂\u0301", "<|im_end|>a", "<s>a")
    texts = [Text(text) for text in given]
    made = encoder(make())
    among_others = made.encode_many([*texts, Completion("q", "a")])[:-1]
    for alone, among in zip(made.encode_many(texts), among_others, strict=True):
        (one,), (other,) = alone.documents, among.documents
        assert one.ids.tolist() == other.ids.tolist()
        assert one.supervised.tolist() == other.supervised.tolist()


def test_settings_of_the_tokenizer_file_do_not_cut_documents():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert shown(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"


def test_the_ends_are_known_before_any_row():
    """So that how often they are trained does not depend on the order of rows."""
    tokenizer = make_tokenizer()
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    tokenizer.eos_token = "<|endoftext|>"
    made = encoder(tokenizer)
    assert made.ends == {end, eos}
    assert made.num_ends(np.array([end, 5, eos, end, 6])) == 3
    assert made.num_ends(np.array([], np.int32)) == 0
    for template in (None, "{% for %}", "{{ raise_exception('no') }}", "no end"):
        tokenizer.chat_template = template
        assert encoder(tokenizer).ends == {eos}


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
        with pytest.raises(UserError, match=r"absent.*`hf download"):
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
        with refused("no tokenizer", "hf download", "--local-dir", tmp_path, error=UserError):
            load_tokenizer(tmp_path)


class TestSentencePiece:
    """A space belongs to the word behind it: a token may begin before the content it is for."""

    TEMPLATE = (  # as Llama 2's
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    )

    def test_the_space_before_a_turn_is_part_of_its_first_token(self):
        tokenizer = sentence_piece()
        tokenizer.chat_template = self.TEMPLATE
        (document,) = encoder(tokenizer).encode(chat("q", "yes", "r", "no\n"))
        trained = [
            tokenizer.convert_ids_to_tokens(run.tolist())
            for run in np.split(document.ids, 1 + np.flatnonzero(np.diff(document.supervised)))[
                1::2
            ]
        ]
        assert trained == [["▁yes", "▁", "</s>"], ["▁no", "<0x0A>", "▁", "</s>"]]
        assert shown(chat("q", "yes"), tokenizer) == "<s> [INST] q [/INST][[ yes </s>]]"
        prompt, answer = encoder(tokenizer).last_answer(chat("q", "yes"))
        assert prompt == "<s>[INST] q [/INST]"
        assert answer.strip() == "yes"

    def test_a_completion_begins_with_its_space(self):
        tokenizer = sentence_piece()
        assert shown(Completion("q", " yes"), tokenizer) == "q[[ yes</s>]]"
        assert shown(Completion("q ", "yes"), tokenizer) == "q [[yes</s>]]"  # one space
