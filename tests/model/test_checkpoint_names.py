"""Parameters of a loaded model are mapped to the names of its checkpoint."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.model.base import load_plain
from pipeline.model.checkpoint_names import model_on_meta, stored_names
from tests.model.models import build

pytestmark = pytest.mark.tensor


@pytest.mark.parametrize(
    # `num_renamed`: linear layers of the decoder whose name in memory differs from the stored one
    ("kind", "num_renamed"),
    [
        ("gemma3", 28),
        ("nemotron_h", 10),
        ("qwen3_5", 31),  # loaded as a text model
        ("kimi_linear", 18),
        ("llama", 0),
    ],
)
def test_every_linear_layer_is_mapped_to_its_stored_weight(tmp_path, kind, num_renamed):
    build(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = stored_names(model_on_meta(tmp_path), tensors)
    model = load_plain(tmp_path, dtype=torch.float32)
    layers = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "vision" not in name and "lm_head" not in name
    }
    for name, weight in layers.items():
        assert torch.equal(tensors[stored[name].keys[0]], weight), name
    assert sum(stored[name].keys != (name,) for name in layers) == num_renamed


def test_fused_experts_are_mapped_to_their_stored_parts_and_converter(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fused = stored_names(model_on_meta(tmp_path), tensors)["model.layers.0.mlp.experts.down_proj"]
    assert fused.converter is not None
    # model.layers.0.mlp.experts.NUMBER.down_proj.weight
    assert [key.split(".")[5] for key in fused.keys] == ["0", "1", "2", "3"]
