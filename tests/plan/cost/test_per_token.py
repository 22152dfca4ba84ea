"""FLOPs, kernels and bytes predicted by plan/cost/per_token.py equal counts of models with LoRA.

The counts are those of one block in bf16, that is 2 bytes a value.
"""

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

SEQUENCES, TOKENS = 4, 64  # of a micro-batch, and of each sequence
CONFIG = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
MODEL_KEYS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 32},
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"mixtral": PROJECTIONS[:4]}  # the experts of Mixtral get no adapter
NO_KERNEL = {  # operators that only make a view or allocate
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


def model_config(model_type, layers):
    keys = CONFIG | MODEL_KEYS.get(model_type, {})
    return AutoConfig.for_model(model_type, num_hidden_layers=layers, **keys)


def counts_of_model(model_type, layers, documents=1):
    """Counted kernels, bytes and FLOPs of the forward and backward pass of a model.

    Keys of the result: (forward or backward, kernels or bytes or flops). `documents`: number of
    documents packed in each sequence.
    """
    torch.manual_seed(0)
    attention = None if documents == 1 else WITHIN_DOCUMENTS
    base = AutoModelForCausalLM.from_config(
        model_config(model_type, layers), attn_implementation=attention
    ).to(torch.bfloat16)
    targets = TARGETS.get(model_type, PROJECTIONS)
    lora = LoraConfig(r=16, lora_dropout=0.0, target_modules=targets)
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
def counts_of_block(model_type, documents=1):
    """The counts of one block: half the difference of models with four and with two blocks."""
    two = counts_of_model(model_type, 2, documents)
    four = counts_of_model(model_type, 4, documents)
    return {key: (four[key] - two[key]) / 2 for key in two}


def predicted_cost(model_type, folder, *, packing=False):
    """The CostPerToken that the plan predicts for a model of one block."""
    model_config(model_type, 1).save_pretrained(folder)
    settings = RunSettings(
        model=str(folder), train_data="t", output_dir="o", lora_r=16, lora_dropout=0.0,
        lora_target_modules=TARGETS.get(model_type, PROJECTIONS), packing=packing,
    )  # fmt: skip
    return cost_per_token(read_shape(str(folder)), settings, "bfloat16")


def assert_bytes_equal(counts, cost, scores, weight_bytes, relative_errors):
    """Compare counted bytes with bf16 values of all tokens and of the weights.

    `scores`: attention scores that are in memory for each token. `relative_errors`: tolerance of
    the forward and of the backward pass.
    """
    values_per_token = {
        "forward": cost.token_values + scores,
        "backward": cost.backward_values + TRAFFIC_BACKWARD * scores,
    }
    for (direction, values), error in zip(values_per_token.items(), relative_errors, strict=True):
        predicted = 2 * SEQUENCES * TOKENS * values + weight_bytes
        assert counts[direction, "bytes"] == pytest.approx(predicted, rel=error)


def test_predicted_flops_of_a_block_equal_the_count(tmp_path):
    """Attention scores are in neither number: torch's counter omits them on a CPU."""
    cost, counts, tokens = (
        predicted_cost("llama", tmp_path),
        counts_of_block("llama"),
        SEQUENCES * TOKENS,
    )
    assert counts["forward", "flops"] == tokens * (cost.base_flops + cost.adapter_flops)
    assert counts["backward", "flops"] == tokens * (cost.base_flops + 2 * cost.adapter_flops)


def test_flops_by_which_sequences_are_assigned_to_ranks_equal_the_count(tmp_path):
    counts, tokens = counts_of_block("llama"), SEQUENCES * TOKENS
    total = counts["forward", "flops"] + counts["backward", "flops"]
    assert total == tokens * sequence_flops(predicted_cost("llama", tmp_path)).per_token


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_predicted_kernels_of_a_block_equal_the_count(model_type, tmp_path):
    counts, cost = counts_of_block(model_type), predicted_cost(model_type, tmp_path)
    assert counts["forward", "kernels"] == cost.kernels
    assert counts["backward", "kernels"] == pytest.approx(cost.backward_kernels, rel=0.1)


@pytest.mark.parametrize(
    ("model_type", "relative_errors"),
    [("llama", (0.05, 0.05)), ("mixtral", (0.1, 0.2)), ("gemma2", (0.12, 0.2))],
)
def test_predicted_bytes_of_a_block_equal_the_count(model_type, relative_errors, tmp_path):
    counts, cost = counts_of_block(model_type), predicted_cost(model_type, tmp_path)
    weight_bytes = 2 * (cost.linear_values + cost.expert_values)
    scores = TOKENS * cost.score_values
    assert_bytes_equal(counts, cost, scores, weight_bytes, relative_errors)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_predicted_kernels_of_each_packed_document_equal_the_count(model_type, tmp_path):
    cost = predicted_cost(model_type, tmp_path, packing=True)
    two, four = counts_of_block(model_type, documents=2), counts_of_block(model_type, documents=4)
    num_documents_added = 2 * SEQUENCES
    for direction, error in {"forward": 0, "backward": 0.1}.items():
        num_kernels_added = four[direction, "kernels"] - two[direction, "kernels"]
        assert num_kernels_added / num_documents_added == pytest.approx(
            cost.document_kernels, rel=error
        )


@pytest.mark.parametrize(
    ("model_type", "relative_errors"), [("llama", (0.05, 0.05)), ("gemma2", (0.12, 0.2))]
)
def test_predicted_bytes_of_packs_equal_the_count(model_type, relative_errors, tmp_path):
    """Attention does not cross the 4 documents of a pack, which have a quarter of its tokens."""
    counts = counts_of_block(model_type, documents=4)
    cost = predicted_cost(model_type, tmp_path, packing=True)
    scores = TOKENS // 4 * cost.score_values
    assert_bytes_equal(counts, cost, scores, 2 * cost.linear_values, relative_errors)
