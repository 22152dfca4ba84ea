"""A loaded base has the weights of its checkpoint, also those that transformers loads wrongly."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from pipeline.model.base import load_base, load_plain
from tests.model.models import build, cache_shape
from tests.models.kinds import ALL
from tests.ranks import run_ranks
from tests.tiny import make_plan, make_tokenizer

pytestmark = pytest.mark.engine

KINDS = [
    "youtu",  # the class writes to a slice of a loaded parameter
    "qwen3_vl_moe",  # experts are transposed in the checkpoint
]


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A model and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model = build(request.param, kinds=ALL)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    cache_shape(folder)
    return model, folder


def differing(loaded, model):
    expected = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    return [name for name, weight in loaded.items() if not torch.equal(weight, expected[name])]


def test_a_loaded_model_is_its_checkpoint(saved):
    model, folder = saved
    loaded = load_plain(folder, dtype=torch.float32)
    assert not differing(dict(loaded.named_parameters()), model)


def gathered_base(session, folder):
    plan = make_plan(folder, 2, 40, zero_stage=3)
    base = load_base(plan, session.device)
    with GatheredParameters(list(base.parameters())):
        return {name: weight.detach().clone() for name, weight in base.named_parameters()}


def test_a_model_that_is_sharded_while_it_loads_is_its_checkpoint(saved, tmp_path):
    model, folder = saved
    for loaded in run_ranks(gathered_base, folder, tmp_path=tmp_path):
        assert not differing(loaded, model)
