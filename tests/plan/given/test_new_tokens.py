"""new_tokens: ids from the tokenizer's file, rows of the embeddings, counts, and refused tokens.

A spare row is a row of the embeddings without a token. If there are too few, rows are added.
"""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import adapter_counts, trainable_parameters
from pipeline.plan.given.fast_paths import LOSS_GRADIENT
from pipeline.plan.given.new_tokens import token_rows, with_added_rows
from pipeline.plan.given.shape import read_shape
from tests.messages import refused
from tests.plans import SMOLLM2
from tests.tiny import make_plan

pytestmark = pytest.mark.unit

WIDTH = SMOLLM2["hidden_size"]
NEW = ["<a>", "<b>"]


@pytest.fixture
def model(tmp_path):
    """Function that writes a model folder: config.json, and a tokenizer of 12 tokens.

    The tokens are 10 letters, `<s>` and `</s>`, and the `other_tokens`. `num_rows`: rows of the
    embeddings.
    """

    def write(num_rows, *, tied=True, other_tokens=()):
        config = SMOLLM2 | {"vocab_size": num_rows, "tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(config))
        vocab = {letter: i for i, letter in enumerate("abcdefghij")}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.add_tokens([AddedToken(text) for text in ("<s>", "</s>", *other_tokens)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return write


def rows_of(folder, *tokens):
    """Rows that are trained for new tokens, the shape with added rows, and the settings."""
    settings = RunSettings.model_validate(
        {"model": str(folder), "train_data": "t", "output_dir": "o", "new_tokens": [*tokens]}
    )
    shape = read_shape(str(folder))
    return token_rows(shape, settings), with_added_rows(shape, settings), settings


def test_no_rows_are_added_if_there_are_spare_rows_for_all_new_tokens(model):
    rows, shape, _ = rows_of(model(num_rows=14), *NEW)
    assert rows.ids == {"<a>": 12, "<b>": 13}
    assert rows.vocab_size == shape.vocab_size == 14
    assert shape.added_rows == 0


@pytest.mark.parametrize(("num_rows", "num_added"), [(12, 2), (13, 1)])
def test_rows_are_added_for_new_tokens_without_a_spare_row(model, num_rows, num_added):
    rows, shape, settings = rows_of(model(num_rows), *NEW)
    assert rows.ids == {"<a>": 12, "<b>": 13}
    assert (shape.vocab_size, shape.added_rows) == (14, num_added)
    # The second call with the same settings adds no further rows.
    assert token_rows(shape, settings) == rows
    assert with_added_rows(shape, settings) == shape


def test_rows_of_an_untied_head_are_trained_too(model):
    tied_rows, tied_shape, settings = rows_of(model(num_rows=12), *NEW)
    without_new_tokens = settings.model_copy(update={"new_tokens": []})
    adapter = trainable_parameters(tied_shape, without_new_tokens)
    assert tied_rows.modules == ("model.embed_tokens",)
    assert trainable_parameters(tied_shape, settings) == adapter + 2 * WIDTH
    untied_rows, untied_shape, settings = rows_of(model(num_rows=12, tied=False), *NEW)
    assert untied_rows.modules == ("model.embed_tokens", "lm_head")
    assert trainable_parameters(untied_shape, settings) == adapter + 2 * 2 * WIDTH


def test_trained_rows_count_as_an_adapter_matrix_in_the_persistence_threshold(model):
    """At ZeRO-3, parameters up to the largest adapter matrix stay gathered."""
    _, shape, settings = rows_of(model(num_rows=12), *(f"<{i}>" for i in range(900)))
    assert adapter_counts(shape, settings).largest_linear_matrix == 900 * WIDTH


def test_the_plan_has_the_ids_of_new_tokens_and_no_loss_gradient_in_the_forward_pass(model):
    plan = make_plan(model(num_rows=13), new_tokens=NEW, zero_stage=2)
    assert plan.shape.vocab_size == 14
    assert all(text in plan.why["new_tokens"] for text in ("12", "13", "<a>", "1 rows", "seed"))
    assert plan.fast_paths[LOSS_GRADIENT]  # the reason why this fast path is off
    assert trainable_parameters(plan.shape, plan.settings) == plan.trainable


def test_memory_with_new_tokens_has_a_copy_of_the_embeddings(model):
    """The forward pass makes the copy, in which it replaces the trained rows."""
    num_rows = 400_000  # so many that the embeddings are most of the memory
    folder = model(num_rows)
    without, with_tokens = (
        make_plan(folder, new_tokens=tokens, zero_stage=2) for tokens in ([], NEW)
    )
    copy_bytes = num_rows * WIDTH * without.layout.bytes_per_value
    assert with_tokens.memory.tensor_bytes > without.memory.tensor_bytes + copy_bytes


def test_a_new_token_that_has_an_embedding_already_is_refused_with_its_id(model):
    with refused("new_tokens", "</s>", "11", "modules_to_save"):
        rows_of(model(14), "<a>", "</s>")


def test_a_token_that_was_added_to_the_tokenizer_without_an_embedding_must_be_a_new_token(model):
    folder = model(12, other_tokens=["<old>"])
    with refused("new_tokens", "<old>", "tokenizer.json"):
        rows_of(folder, "<a>")
    rows, shape, _ = rows_of(folder, "<a>", "<old>")
    assert rows.ids == {"<a>": 13, "<old>": 12}
    assert shape.added_rows == 2


def test_a_letter_of_the_vocabulary_without_an_embedding_must_be_a_new_token_too(model):
    with refused("new_tokens", "'j'", "tokenizer.json"):  # with 9 rows, "j" of id 9 has none
        rows_of(model(9), "<a>", "<s>", "</s>")


def test_a_folder_without_tokenizer_json_is_refused(model):
    folder = model(12)
    (folder / "tokenizer.json").unlink()
    with refused("new_tokens", folder / "tokenizer.json", "save_pretrained"):
        rows_of(folder, "<a>")


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [""], [" "]])
def test_repeated_and_empty_tokens_are_refused(model, tokens):
    with pytest.raises(ValueError, match="new_tokens"):
        rows_of(model(12), *tokens)
