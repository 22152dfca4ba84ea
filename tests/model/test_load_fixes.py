"""A loaded base has the weights of its checkpoint, also those that transformers loads wrongly."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors.torch import load_file, save_file

from pipeline.model.base import load_base, load_plain
from tests.messages import refused
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
    """Names of the loaded parameters that differ from those of the model."""
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


@pytest.mark.parametrize("change", ["prefix", "rename", "remove"])
def test_a_checkpoint_without_all_tensors_is_refused(tmp_path, change):
    """transformers only warns, and fills the weights with random numbers."""
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {  # None removes the tensor
        "prefix": lambda name: f"module.{name}",
        "rename": lambda name: name.replace("q_proj", "wq"),
        "remove": lambda name: name if "layers.2.self_attn.q_proj" not in name else None,
    }[change]
    tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})
    # number of missing tensors, and a name in the checkpoint or of a missing tensor
    facts = {"prefix": ("39", "module."), "rename": ("4", "wq.weight"), "remove": ("1", "layers.2")}
    with refused("lm_head" if change == "prefix" else "q_proj.weight", *facts[change], tmp_path):
        load_plain(tmp_path, dtype=torch.float32)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name][:100].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with refused("shape", "config.json", tmp_path):
        load_plain(tmp_path, dtype=torch.float32)
