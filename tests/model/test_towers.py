"""The layers of the text decoder are quantised, also shared ones; a vision tower is not."""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.model.adapter import attach_adapter, trainable
from pipeline.model.base import load_base
from pipeline.model.structure import blocks, expert_tensors
from pipeline.plan.cost.memory import base_bytes, quantisation_constants
from tests.messages import assert_mentions
from tests.model.models import build, cache_shape
from tests.models.kinds import ALL
from tests.tiny import make_plan, make_tokenizer

pytestmark = pytest.mark.tensor

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """Folder of a Gemma 3 with a vision tower of two layers."""
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    build("gemma3").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def in_tower(name):
    return "vision" in name or "projector" in name


@pytest.mark.parametrize("quantised", [{}, NF4], ids=["lora", "nf4"])
def test_the_vision_tower_is_not_changed(wrapper, quantised):
    plan = make_plan(wrapper, zero_stage=2, gradient_checkpointing=True, **quantised)
    model = attach_adapter(load_base(plan, torch.device("cpu")), plan)
    assert not [name for name in trainable(model) if in_tower(name)]
    assert len(trainable(model)) == 2 * 7 * 4  # A and B of seven linear layers in four layers
    tower = [m for n, m in model.named_modules() if in_tower(n) and isinstance(m, nn.Linear)]
    assert tower
    assert not [m for m in tower if "4bit" in type(m).__name__]
    assert {m.weight.dtype for m in tower} == {torch.float32}
    assert len(blocks(model.get_base_model())) == plan.shape.num_layers == 4
    layers = {n: m for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    assert {m.gradient_checkpointing for n, m in layers.items() if in_tower(n)} == {False}
    assert {m.gradient_checkpointing for n, m in layers.items() if not in_tower(n)} == {True}


def test_only_layers_of_the_decoder_are_quantised(wrapper):
    plan = make_plan(wrapper, zero_stage=2, **NF4)
    kinds = {n: type(m).__name__ for n, m in load_base(plan, torch.device("cpu")).named_modules()}
    quantised = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert len(quantised) == 7 * 4
    assert kinds["lm_head"] == "Linear"


def test_fused_experts_are_not_quantised_and_the_plan_has_their_share(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    plan = make_plan(tmp_path, zero_stage=2, **NF4)
    model = load_base(plan, torch.device("cpu"))
    experts = [parameter for _, parameter in expert_tensors(model).values()]
    assert {parameter.dtype for parameter in experts} == {torch.float32}
    count = sum(parameter.numel() for parameter in experts)
    [rule] = [rule for rule in plan.rules if rule.id == "4bit-moe"]
    assert_mentions(rule.message, f"{count / 1e9:.2f} of {plan.shape.parameters / 1e9:.2f} B")
    quantised = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    kept = 4 * (plan.shape.parameters - plan.shape.quantised_parameters)
    buffers = quantisation_constants(plan.shape, plan.settings)
    stored = sum(weight.numel() * weight.element_size() for weight in quantised)
    assert base_bytes(plan.shape, plan.settings, "float32") == kept + stored + buffers


@torch.no_grad()
def test_a_base_whose_blocks_share_weights_runs_in_4_bits(tmp_path):
    """Zamba 2 stores all shared layers under its first block, which does not call all of them."""
    build("zamba2/shared", kinds=ALL).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    cache_shape(tmp_path)
    model = load_base(make_plan(tmp_path, zero_stage=2, **NF4), torch.device("cpu"))
    logits = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
    assert logits.isfinite().all()
