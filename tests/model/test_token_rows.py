"""Rows of new tokens: seeded values near the mean, without a change of the base's own rows."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data.chat.tokenizer import run_tokenizer
from pipeline.model.adapter import attach_adapter, trainable
from pipeline.model.base import load_base
from tests.messages import refused
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor

CPU = torch.device("cpu")
EMBEDDINGS = "model.embed_tokens.weight"


def loaded_rows(folder, **settings):
    """Plan, model, and the rows of the two new tokens in embeddings and head.

    The base's vocabulary has 259 tokens, so the new ones have the ids 259 and 260.
    """
    plan = make_plan(folder, new_tokens=["<a>", "<b>"], **settings)
    model = load_base(plan, CPU)
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return plan, model, [weight[259:261].clone() for weight in weights]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("untied") / "base", tied=False)


def test_added_rows_are_near_the_mean_and_follow_the_seed(untied):
    _, model, rows = loaded_rows(untied, seed=1)
    before = load_file(untied / "model.safetensors")[EMBEDDINGS]
    assert torch.equal(model.get_input_embeddings().weight[:259], before)
    deviations = (rows[0] - before.mean(0)) / before.std(0)
    assert 0.05 < deviations.abs().mean() < 0.15  # drawn with a tenth of the standard deviation
    assert not torch.equal(rows[0], rows[1])
    again, other = (loaded_rows(untied, seed=seed)[2] for seed in (1, 2))
    assert all(map(torch.equal, rows, again))
    assert not torch.equal(rows[0], other[0])


def test_a_tied_pair_stays_one_weight_in_memory_and_in_the_adapter(tmp_path):
    plan, model, rows = loaded_rows(make_model(tmp_path / "base", tied=True))
    assert torch.equal(rows[0], rows[1])
    parameters = trainable(attach_adapter(model, plan))
    assert len([key for key in parameters if "trainable_tokens" in key]) == 1


def test_new_tokens_use_spare_rows_of_the_base_and_no_row_is_added(tmp_path):
    """The base has 5 rows more than its tokenizer has tokens, as many models do."""
    base = make_model(tmp_path / "base", tied=False)
    tensors = load_file(base / "model.safetensors")
    for name in (EMBEDDINGS, "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((5, 32), 7.0)])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"vocab_size": 259', '"vocab_size": 264'))
    plan, model, rows = loaded_rows(base)
    assert plan.shape.added_rows == 0
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 264
    assert (weight[261:] == 7).all()
    assert not (rows[0] == 7).any()
    after = load_file(base / "model.safetensors")[EMBEDDINGS]
    assert (after[259:] == 7).all(), "the file of the base changed"
    delta = trainable(attach_adapter(model, plan))
    assert torch.equal(delta[next(k for k in delta if "embed_tokens" in k)], rows[0])


def test_a_tokenizer_that_transformers_loads_with_other_ids_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"<|im_start|>"', '"<|im_start|>", "<more>"'))
    with refused("new_tokens", "<a>", "save_pretrained"):
        run_tokenizer(make_plan(base, new_tokens=["<a>"]).settings)
