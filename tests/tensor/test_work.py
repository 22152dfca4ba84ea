"""What plan/work.py counts, against a Llama with LoRA: FLOPs exactly, kernels and bytes about."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.settings import RunSettings
from pipeline.plan.shape import read_shape
from pipeline.plan.speed import _KERNELS_BACKWARD, _TRAFFIC_BACKWARD
from pipeline.plan.work import work_of

SEQUENCES, TOKENS = 4, 64
CONFIG = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
MOVE_NOTHING = {
    "alias", "as_strided", "detach", "empty_like", "expand", "select", "slice", "split", "squeeze",
    "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts operators that do something, and the bytes of their tensors of two or more axes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] not in MOVE_NOTHING:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.counts["kernels"] += 1
            self.counts["bytes"] += sum(
                x.numel() * x.element_size() for x in tensors if x.dim() > 1
            )
        return out


def counted(layers):
    """Kernels, bytes and FLOPs of forward and backward through so many blocks."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **CONFIG)).to(torch.bfloat16)
    lora = LoraConfig(r=16, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False).get_base_model().model
    ids = torch.randint(0, 512, (SEQUENCES, TOKENS))
    found = Counter()
    for direction in ("forward", "backward"):
        with FlopCounterMode(display=False) as flops, Kernels() as seen:
            if direction == "forward":
                hidden = model(ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            else:
                hidden.float().sum().backward()
        found |= {(direction, name): count for name, count in seen.counts.items()}
        found[direction, "flops"] = flops.get_total_flops()
    return found


@pytest.fixture(scope="module")
def block():
    """The same of one block: what is around the blocks falls out of the difference."""
    two, four = counted(2), counted(4)
    return {key: (four[key] - two[key]) / 2 for key in two}


@pytest.fixture
def work(tmp_path):
    config = LlamaConfig(num_hidden_layers=1, **CONFIG)
    config.save_pretrained(tmp_path)
    values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o", "lora_r": 16}
    return work_of(read_shape(str(tmp_path)), RunSettings(**values, lora_dropout=0.0), "bfloat16")


def test_flops(block, work):
    """torch's counter leaves out attention's scores on a CPU, so they are not compared here."""
    tokens = SEQUENCES * TOKENS
    assert block["forward", "flops"] == tokens * (work.base_flops + work.adapter_flops)
    assert block["backward", "flops"] == tokens * (work.base_flops + 2 * work.adapter_flops)


def test_kernels(block, work):
    assert block["forward", "kernels"] == work.kernels
    backward = _KERNELS_BACKWARD * work.kernels
    assert block["backward", "kernels"] == pytest.approx(backward, rel=0.1)


def test_bytes(block, work):
    activations, weights = 2 * SEQUENCES * TOKENS * work.token_values, 2 * work.linear_values
    assert block["forward", "bytes"] == pytest.approx(activations + weights, rel=0.05)
    backward = _TRAFFIC_BACKWARD * activations + weights
    assert block["backward", "bytes"] == pytest.approx(backward, rel=0.05)
