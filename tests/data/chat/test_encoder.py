"""Documents (token ids and loss mask) of every type of example; loading of tokenizers.

Documents are shown as text with supervised spans in [[brackets]].
"""

import json

import numpy as np
import pytest

from pipeline.data.chat.tokenizer import load_tokenizer, special_ids
from pipeline.errors import UserError
from pipeline.rows.examples import Completion, RowError, Text, Tokens
from tests.data.chat.documents import (
    bos_tokenizer,
    chat,
    encoder,
    marked_text,
    sentence_piece,
    tokenizer_with,
    user,
)
from tests.messages import refused
from tests.tiny import CHATML, make_tokenizer

pytestmark = pytest.mark.tensor


def tokenizer_with_pair(first, second):
    """A byte-level tokenizer in which these two characters together are one token."""
    tokenizer = make_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"][first + second] = len(tokenizer)
    data["model"]["merges"] = [[first, second]]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(data))
    assert len(tokenizer(first + second).input_ids) == 1
    return tokenizer


class TestPromptAndCompletion:
    def test_the_completion_and_its_end_are_supervised(self):
        text = marked_text(Completion("q:", " a"), make_tokenizer())
        assert text == "q:[[ a<|im_end|>]]"

    def test_train_on_all_supervises_every_token_except_the_first(self):
        text = marked_text(Completion("q:", " a"), make_tokenizer(), train_on="all")
        assert text == "q[[: a<|im_end|>]]"

    def test_an_end_token_in_the_completion_is_not_doubled(self):
        text = marked_text(Completion("q", "a<|im_end|>"), make_tokenizer())
        assert text == "q[[a<|im_end|>]]"

    def test_a_document_has_one_bos_if_the_tokenizer_adds_one(self):
        assert marked_text(Completion("q", "a"), bos_tokenizer()) == "<s>q[[a<|im_end|>]]"
        assert marked_text(Completion("<s>q", "a"), bos_tokenizer()) == "<s>q[[a<|im_end|>]]"
        assert marked_text(Completion("", "a"), bos_tokenizer()) == "<s>[[a<|im_end|>]]"
        without_bos = tokenizer_with(CHATML, bos_token="<s>")
        assert marked_text(Completion("q", "a"), without_bos) == "q[[a<|im_end|>]]"

    def test_without_a_prompt_the_first_token_is_not_supervised(self):
        assert marked_text(Completion("", "ab"), make_tokenizer()) == "a[[b<|im_end|>]]"

    def test_no_token_spans_prompt_and_completion(self):
        """`ab` is one token, but after the prompt `a` the model has to generate `b`."""
        tokenizer = tokenizer_with_pair("a", "b")
        (document,) = encoder(tokenizer).encode(Completion("xa", "b"))
        assert document.ids.tolist() == [
            *tokenizer("xa").input_ids,
            *tokenizer("b").input_ids,
            tokenizer.eos_token_id,
        ]
        assert document.supervised.tolist() == [False, False, True, True]
        assert marked_text(Completion("x", "ab"), tokenizer) == "x[[ab<|im_end|>]]"

    def test_a_tokenizer_without_end_of_sequence_token_is_refused(self):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        for example in (Completion("q", "a"), Text("a")):
            with refused("tokenizer", "eos_token"):
                marked_text(example, tokenizer)


def test_a_token_that_spans_the_end_of_reasoning_belongs_to_the_answer():
    row = chat("q", "<think>x</think>yes")
    text = marked_text(row, tokenizer_with_pair(">", "y"), train_on_reasoning=False)
    assert text == f"{user('q')}<think>x</think[[>yes<|im_end|>]]\n"


def test_a_whole_text_and_its_end_are_supervised():
    assert marked_text(Text("abc"), make_tokenizer()) == "a[[bc<|im_end|>]]"
    assert marked_text(Text("abc"), bos_tokenizer()) == "<s>[[abc<|im_end|>]]"
    with refused("no supervised token", error=RowError):
        marked_text(Text("<|im_end|>"), make_tokenizer())


class TestPreTokenised:
    def test_ids_are_kept(self):
        (document,) = encoder(make_tokenizer()).encode(Tokens((5, 6, 7), (True, False, True)))
        assert document.ids.tolist() == [5, 6, 7]
        assert document.supervised.tolist() == [False, False, True]

    def test_ids_of_another_vocabulary_are_refused(self):
        size = len(make_tokenizer())
        encoder(make_tokenizer()).encode(Tokens((0, size - 1), (True, True)))
        for outside in (-1, size, 2**40):
            with refused("`input_ids`", f"{size} tokens", error=RowError):
                encoder(make_tokenizer()).encode(Tokens((0, outside), (True, True)))

    def test_a_row_without_supervised_token_is_rejected(self):
        for supervised in ((True, False), (False, False)):
            with refused("no supervised token", error=RowError):
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
        with refused("special token", "<|im_end|>", error=RowError) as error:
            encoder(make_tokenizer(), special_tokens_in_text="reject").encode(row)
        assert ("`text`" in str(error.value)) == (isinstance(row, Text))

    @pytest.mark.parametrize("row", ROWS)
    def test_as_text_tokenises_them_as_text(self, row):
        tokenizer = make_tokenizer()
        as_text = encoder(tokenizer, special_tokens_in_text="as-text")
        (document,) = as_text.encode(row)
        text = row.text if isinstance(row, Text) else row.prompt + row.completion
        end = tokenizer.eos_token
        whole = tokenizer.decode(document.ids.tolist())
        assert whole == (text if text.endswith(end) else text + end)
        assert sum(int(i) in special_ids(tokenizer).values() for i in document.ids) == 1
        trained = tokenizer.decode(document.ids[document.supervised].tolist())
        # The first character of a text has no token before it that predicts it.
        expected = row.text[1:] if isinstance(row, Text) else row.completion
        assert trained.removesuffix(end) == expected.removesuffix(end)

    def test_as_text_no_token_spans_prompt_and_completion(self):
        tokenizer = sentence_piece()
        (document,) = encoder(tokenizer, special_tokens_in_text="as-text").encode(
            Completion("yes</s> n", "o</s> yes")  # `no` is also a token
        )
        trained = tokenizer.convert_ids_to_tokens(document.ids[document.supervised])
        assert trained[0] == "o"
        assert tokenizer.decode(document.ids[document.supervised]) == "o</s> yes</s>"

    def test_a_bos_and_an_end_around_a_text_are_not_counted(self):
        tokenizer = bos_tokenizer()
        text = f"{tokenizer.bos_token}one{tokenizer.eos_token}"
        (encoded,) = encoder(tokenizer).encode_many([Text(text)])
        assert not encoded.token_counts


def test_a_batch_of_examples_gives_the_documents_of_each_alone():
    lone_surrogate = "\ud800"
    examples = [
        chat("q", "one", "r", "two"),
        Completion("q", "a"),
        Tokens((5, 10**6), (True, True)),
        chat("q", lone_surrogate),
        Text("text"),
        Tokens((5, 6), (True, True)),
        chat("q", "a"),
    ]
    together = encoder(make_tokenizer(), split_turns=True)
    alone = encoder(make_tokenizer(), split_turns=True)
    results = together.encode_many(examples)
    is_error = [isinstance(result, RowError) for result in results]
    assert is_error == [False, False, True, True, False, False, False]
    assert len(results[0].documents) == 2  # split_turns
    for example, result in zip(examples, results, strict=True):
        if isinstance(result, RowError):
            with pytest.raises(RowError):
                alone.encode(example)
            continue
        for in_batch, single in zip(result.documents, alone.encode(example), strict=True):
            assert in_batch.ids.tolist() == single.ids.tolist()
            assert in_batch.supervised.tolist() == single.supervised.tolist()
    assert together.encode_many([]) == []


@pytest.mark.parametrize("make", [make_tokenizer, bos_tokenizer, sentence_piece])
def test_texts_give_the_same_tokens_with_and_without_offsets(make):
    """A batch with only texts is tokenised by another tokenizer function, without offsets."""
    samples = ("a", " a b  c ", "\n\nab", "é 🙂\u0301", "<|im_end|>a", "<s>a")
    texts = [Text(text) for text in samples]
    own_encoder = encoder(make())
    with_offsets = own_encoder.encode_many([*texts, Completion("q", "a")])[:-1]
    without_offsets = own_encoder.encode_many(texts)
    for result, expected in zip(without_offsets, with_offsets, strict=True):
        (document,), (expected_document,) = result.documents, expected.documents
        assert document.ids.tolist() == expected_document.ids.tolist()
        assert document.supervised.tolist() == expected_document.supervised.tolist()


def test_truncation_and_padding_of_the_tokenizer_file_are_ignored():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert marked_text(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"


def test_the_end_tokens_are_known_before_any_row():
    """Counts of end tokens must not depend on the order of rows."""
    tokenizer = make_tokenizer()
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    tokenizer.eos_token = "<|endoftext|>"
    own_encoder = encoder(tokenizer)
    assert own_encoder.end_ids == {end, eos}
    assert own_encoder.num_end_tokens(np.array([end, 5, eos, end, 6])) == 3
    assert own_encoder.num_end_tokens(np.array([], np.int32)) == 0
    for template in (None, "{% for %}", "{{ raise_exception('no') }}", "no end"):
        tokenizer.chat_template = template
        assert encoder(tokenizer).end_ids == {eos}


class TestLastAnswer:
    def test_the_prompt_is_the_text_before_the_last_answer(self):
        own_encoder = encoder(make_tokenizer())
        prompt, answer = own_encoder.last_answer(chat("q", "one", "r", "two", "s"))
        assert prompt == user("q") + "one<|im_end|>\n" + user("r")
        assert answer == "two"

    def test_the_prompt_of_a_completion_begins_as_in_training(self):
        assert encoder(make_tokenizer()).last_answer(Completion("q", " a")) == ("q", " a")
        assert encoder(bos_tokenizer()).last_answer(Completion("q", "a")) == ("<s>q", "a")
        assert encoder(bos_tokenizer()).last_answer(Completion("<s>q", "a")) == ("<s>q", "a")

    def test_a_text_has_no_prompt(self):
        with refused("no question", error=RowError):
            encoder(make_tokenizer()).last_answer(Text("a"))


class TestLoading:
    def test_a_saved_tokenizer_is_loaded(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert marked_text(chat("q", "yes"), tokenizer) == user("q") + "[[yes<|im_end|>]]\n"

    def test_a_tokenizer_that_cannot_be_loaded_is_refused_with_its_folder(self, tmp_path):
        with refused(tmp_path / "absent", "hf download"):
            load_tokenizer(tmp_path / "absent")
        with refused(tmp_path):
            load_tokenizer(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        for text in ('{"half": ', '{"model": {"type": "Unheard"}}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with refused("tokenizer", tmp_path):
                load_tokenizer(tmp_path)

    def test_a_model_folder_without_tokenizer_is_refused(self, tmp_path):
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with refused("no tokenizer", "hf download", "--local-dir", tmp_path, error=UserError):
            load_tokenizer(tmp_path)


class TestSentencePiece:
    """A token includes the space before its word, so an answer's first token has this space."""

    TEMPLATE = (  # as Llama 2's
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    )

    def test_the_space_before_a_turn_is_part_of_its_first_token(self):
        tokenizer = sentence_piece()
        tokenizer.chat_template = self.TEMPLATE
        (document,) = encoder(tokenizer).encode(chat("q", "yes", "r", "no\n"))
        mask_changes = 1 + np.flatnonzero(np.diff(document.supervised))
        _question, first, _second_question, second = np.split(document.ids, mask_changes)
        assert tokenizer.convert_ids_to_tokens(first.tolist()) == ["▁yes", "▁", "</s>"]
        assert tokenizer.convert_ids_to_tokens(second.tolist()) == ["▁no", "<0x0A>", "▁", "</s>"]
        assert marked_text(chat("q", "yes"), tokenizer) == "<s> [INST] q [/INST][[ yes </s>]]"
        prompt, answer = encoder(tokenizer).last_answer(chat("q", "yes"))
        assert prompt == "<s>[INST] q [/INST]"
        assert answer.strip() == "yes"

    def test_a_completion_keeps_its_leading_space(self):
        tokenizer = sentence_piece()
        assert marked_text(Completion("q", " yes"), tokenizer) == "q[[ yes</s>]]"
        assert marked_text(Completion("q ", "yes"), tokenizer) == "q [[yes</s>]]"  # not two spaces
