"""FLOPs, kernels and bytes of plan/cost/per_token.py equal those counted on models with LoRA."""

from collections import Counter
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.settings import RunSettings
from pipeline.model.attention import WITHIN_DOCUMENTS, document_arguments
from pipeline.model.joint_lora import join_lora
from pipeline.plan.cost.per_token import TRAFFIC_BACKWARD, cost_per_token, sequence_flops
from pipeline.plan.given.shape import read_shape

pytestmark = pytest.mark.tensor

SEQUENCES, TOKENS = 4, 64
CONFIG = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
MODEL_KEYS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 32},
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"mixtral": PROJECTIONS[:4]}
NO_KERNEL = {
    "alias", "as_strided", "detach", "empty_like", "expand", "select", "slice", "split", "squeeze",
    "split_with_sizes", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts operators that launch a kernel, and the bytes of their tensors of two or more axes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] not in NO_KERNEL:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.counts["kernels"] += 1
            self.counts["bytes"] += sum(
                x.numel() * x.element_size() for x in tensors if x.dim() > 1
            )
        return out


def model_config(kind, layers):
    return AutoConfig.for_model(kind, num_hidden_layers=layers, **CONFIG | MODEL_KEYS.get(kind, {}))


def counted(kind, layers, documents=1):
    """Counted kernels, bytes and FLOPs of the forward and backward pass of a model.

    `documents`: number of documents packed in each sequence.
    """
    torch.manual_seed(0)
    attention = None if documents == 1 else WITHIN_DOCUMENTS
    base = AutoModelForCausalLM.from_config(
        model_config(kind, layers), attn_implementation=attention
    ).to(torch.bfloat16)
    lora = LoraConfig(r=16, lora_dropout=0.0, target_modules=TARGETS.get(kind, PROJECTIONS))
    adapted = get_peft_model(base, lora, autocast_adapter_dtype=False)
    join_lora(adapted)
    model = adapted.get_base_model().model
    ids = torch.randint(0, 512, (SEQUENCES, TOKENS))
    packs = [[TOKENS // documents] * documents] * SEQUENCES
    pack_arguments = document_arguments(WITHIN_DOCUMENTS, packs, ids)
    counts = Counter()
    for direction in ("forward", "backward"):
        with FlopCounterMode(display=False) as flops, Kernels() as kernels:
            if direction == "forward":
                hidden = model(ids, use_cache=False, **pack_arguments)[0]
            else:
                hidden.float().sum().backward()
        counts |= {(direction, name): count for name, count in kernels.counts.items()}
        counts[direction, "flops"] = flops.get_total_flops()
    return counts


@cache
def block(kind, documents=1):
    """The counts of one block: half the difference of models with four and with two blocks."""
    two, four = counted(kind, 2, documents), counted(kind, 4, documents)
    return {key: (four[key] - two[key]) / 2 for key in two}


def work(kind, folder, *, packing=False):
    model_config(kind, 1).save_pretrained(folder)
    settings = RunSettings(
        model=str(folder), train_data="t", output_dir="o", lora_r=16, lora_dropout=0.0,
        lora_target_modules=TARGETS.get(kind, PROJECTIONS), packing=packing,
    )  # fmt: skip
    return cost_per_token(read_shape(str(folder)), settings, "bfloat16")


def test_flops_of_a_block_are_those_counted(tmp_path):
    """Both leave out attention scores: torch's counter omits them on a CPU."""
    counts, planned, tokens = block("llama"), work("llama", tmp_path), SEQUENCES * TOKENS
    assert counts["forward", "flops"] == tokens * (planned.base_flops + planned.adapter_flops)
    assert counts["backward", "flops"] == tokens * (planned.base_flops + 2 * planned.adapter_flops)


def test_flops_used_to_partition_sequences_are_those_counted(tmp_path):
    counts, tokens = block("llama"), SEQUENCES * TOKENS
    both = counts["forward", "flops"] + counts["backward", "flops"]
    assert both == tokens * sequence_flops(work("llama", tmp_path)).per_token


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_kernels_of_a_block_are_those_counted(kind, tmp_path):
    counts, planned = block(kind), work(kind, tmp_path)
    assert counts["forward", "kernels"] == planned.kernels
    assert counts["backward", "kernels"] == pytest.approx(planned.backward_kernels, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "forward_error", "backward_error"),
    [("llama", 0.05, 0.05), ("mixtral", 0.1, 0.2), ("gemma2", 0.12, 0.2)],
)
def test_bytes_of_a_block_are_those_counted(kind, forward_error, backward_error, tmp_path):
    counts, planned = block(kind), work(kind, tmp_path)
    scores = TOKENS * planned.score_values
    weights = 2 * (planned.linear_values + planned.expert_values)
    assert counts["forward", "bytes"] == pytest.approx(
        2 * SEQUENCES * TOKENS * (planned.token_values + scores) + weights, rel=forward_error
    )
    values = planned.backward_values + TRAFFIC_BACKWARD * scores
    expected = 2 * SEQUENCES * TOKENS * values + weights
    assert counts["backward", "bytes"] == pytest.approx(expected, rel=backward_error)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_kernels_of_a_packed_document_are_those_counted(kind, tmp_path):
    two, four = block(kind, 2), block(kind, 4)
    for direction, rel in {"forward": 0, "backward": 0.1}.items():
        added = (four[direction, "kernels"] - two[direction, "kernels"]) / (2 * SEQUENCES)
        assert added == pytest.approx(work(kind, tmp_path, packing=True).document_kernels, rel=rel)


@pytest.mark.parametrize(
    ("kind", "forward_error", "backward_error"), [("llama", 0.05, 0.05), ("gemma2", 0.12, 0.2)]
)
def test_bytes_of_packs_are_those_counted(kind, forward_error, backward_error, tmp_path):
    counts, planned = block(kind, 4), work(kind, tmp_path, packing=True)
    scores = TOKENS // 4 * planned.score_values
    weights = 2 * planned.linear_values
    assert counts["forward", "bytes"] == pytest.approx(
        2 * SEQUENCES * TOKENS * (planned.token_values + scores) + weights, rel=forward_error
    )
    values = planned.backward_values + TRAFFIC_BACKWARD * scores
    expected = 2 * SEQUENCES * TOKENS * values + weights
    assert counts["backward", "bytes"] == pytest.approx(expected, rel=backward_error)
