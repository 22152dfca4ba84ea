"""Predicted pinned host memory with offload_param equals a count over the parameters of a model."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.memory import memory
from pipeline.plan.given.catalogue import GPUS
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import read_shape

pytestmark = pytest.mark.tensor

SIZES = {
    "hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 8,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 3000,
}  # fmt: skip
MODELS = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "experts": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
}
# Small parameters, which the prediction does not round up, take about a percent.
MAX_ERROR = 0.03


def pinned_by_pytorch(config, ranks, *, in_4bit):
    """Bytes that PyTorch pins for the shards of all ranks: a power of two for each shard."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    total = 0
    for name, parameter in model.named_parameters():
        is_quantised = in_4bit and name.endswith("_proj.weight")
        num_bytes = parameter.numel() // 2 if is_quantised else 2 * parameter.numel()
        shard = -(-num_bytes // ranks)  # rounded up
        total += ranks * 2 ** (shard - 1).bit_length()
    return total


@pytest.mark.parametrize("ranks", [3, 8])
@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_pinned_shards_equal_the_count(name, in_4bit, ranks, tmp_path):
    model_type, keys = MODELS[name]
    config = AutoConfig.for_model(model_type, dtype="bfloat16", **SIZES, **keys)
    config.save_pretrained(tmp_path)
    settings = RunSettings(
        model=str(tmp_path), train_data="t", output_dir="o", load_in_4bit=in_4bit
    )
    on_device = Layout(
        zero_stage=3, micro_batch_size=1, accumulation_steps=1, checkpointed_layers=2, nodes=1,
        ranks_per_node=ranks, training_dtype="bfloat16",
    )  # fmt: skip
    with_offload, without = (
        memory(
            read_shape(str(tmp_path)),
            settings,
            layout,
            GPUS["h100-80gb"],
            SequenceProfile(tokens=8),
        ).host_peak_bytes
        for layout in (replace(on_device, offload_param="cpu"), on_device)
    )
    counted = pinned_by_pytorch(config, ranks, in_4bit=in_4bit)
    assert with_offload - without == pytest.approx(counted, rel=MAX_ERROR)
