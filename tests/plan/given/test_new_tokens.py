"""new_tokens: ids from the tokenizer's file, spare and added rows, counts, and refused tokens."""

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
    """Function: write config.json and a tokenizer of 12 tokens, and return the folder."""

    def write(rows, *, tied=True, more=()):
        config = SMOLLM2 | {"vocab_size": rows, "tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer(
            models.BPE(vocab={c: i for i, c in enumerate("abcdefghij")}, merges=[])
        )
        tokenizer.add_tokens([AddedToken(text) for text in ("<s>", "</s>", *more)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return write


def rows_of(folder, *tokens):
    settings = RunSettings.model_validate(
        {"model": str(folder), "train_data": "t", "output_dir": "o", "new_tokens": [*tokens]}
    )
    shape = read_shape(str(folder))
    return token_rows(shape, settings), with_added_rows(shape, settings), settings


def test_spare_rows_are_used_first(model):
    rows, shape, _ = rows_of(model(14), *NEW)
    assert rows.ids == {"<a>": 12, "<b>": 13}
    assert (rows.vocab_size, shape.vocab_size, shape.added_rows) == (14, 14, 0)


@pytest.mark.parametrize(("rows_in_files", "added"), [(12, 2), (13, 1)])
def test_rows_are_added_for_the_other_tokens(model, rows_in_files, added):
    rows, shape, settings = rows_of(model(rows_in_files), *NEW)
    assert rows.ids == {"<a>": 12, "<b>": 13}
    assert (shape.vocab_size, shape.added_rows) == (14, added)
    assert token_rows(shape, settings) == rows
    assert with_added_rows(shape, settings) == shape


def test_a_head_with_its_own_weight_has_rows_too(model):
    tied, shape, settings = rows_of(model(12), *NEW)
    plain = trainable_parameters(shape, settings.model_copy(update={"new_tokens": []}))
    assert tied.modules == ("model.embed_tokens",)
    assert trainable_parameters(shape, settings) == plain + 2 * WIDTH
    untied, shape, settings = rows_of(model(12, tied=False), *NEW)
    assert untied.modules == ("model.embed_tokens", "lm_head")
    assert trainable_parameters(shape, settings) == plain + 4 * WIDTH


def test_many_rows_are_as_persistent_as_an_adapter_matrix(model):
    _, shape, settings = rows_of(model(12), *(f"<{i}>" for i in range(900)))
    assert adapter_counts(shape, settings).largest_linear_matrix == 900 * WIDTH


def test_the_plan_names_ids_and_has_the_plain_loss(model):
    plan = make_plan(model(13), new_tokens=NEW, zero_stage=2)
    assert plan.shape.vocab_size == 14
    assert all(text in plan.why["new_tokens"] for text in ("12", "13", "<a>", "1 rows", "seed"))
    assert plan.fast_paths[LOSS_GRADIENT]
    assert trainable_parameters(plan.shape, plan.settings) == plan.trainable


def test_the_memory_has_a_copy_of_the_embeddings_and_its_gradient(model):
    folder = model(400_000)
    plans = [make_plan(folder, new_tokens=tokens, zero_stage=2) for tokens in ([], NEW)]
    plain, with_tokens = (plan.memory.tensor_bytes for plan in plans)
    assert with_tokens > plain + 400_000 * WIDTH * plans[0].layout.bytes_per_value


def test_a_token_with_an_embedding_is_refused(model):
    with refused("new_tokens", "</s>", "11", "modules_to_save"):
        rows_of(model(14), "<a>", "</s>")


def test_tokens_without_embeddings_must_be_named(model):
    folder = model(12, more=["<old>"])
    with refused("new_tokens", "<old>", "tokenizer.json"):
        rows_of(folder, "<a>")
    rows, shape, _ = rows_of(folder, "<a>", "<old>")
    assert rows.ids == {"<a>": 13, "<old>": 12}
    assert shape.added_rows == 2


def test_tokens_of_the_vocabulary_without_embeddings_must_be_named_too(model):
    with refused("new_tokens", "'j'", "tokenizer.json"):
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
