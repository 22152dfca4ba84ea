"""What config.json says equals transformers', peft's and bitsandbytes' own counts."""

import json
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.model.adapter import expected_shapes, file_key, lora_config
from pipeline.model.base import load_base
from pipeline.plan.given.shape import read_shape
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_EXPERTS = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 40}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TIED, ALL = {"tie_word_embeddings": True}, {"lora_target_modules": "all-linear"}
WITHOUT_HEAD_DIM = {"phi3", "qwen2", "phi", "gpt_neox", "qwen2_moe"}
CASES = [
    ("llama", {}),
    ("llama", TIED | {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", TIED | {"attention_bias": True}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("smollm3", {}),
    ("phi3", {"lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    ("phi", ALL),
    ("phi", TIED | {"qk_layernorm": True, "lora_target_modules": ["q_proj", "dense", "fc2"]}),
    ("gpt_neox", ALL),
    ("gpt_neox", TIED | {"attention_bias": False, "lora_target_modules": ["query_key_value"]}),
    ("mixtral", ALL | EXPERTS),
    ("mixtral", TIED | EXPERTS | {"lora_target_modules": r".*layers\.1\..*\.[qv]_proj"}),
    ("qwen3_moe", ALL | QWEN_EXPERTS),
    ("qwen3_moe", QWEN_EXPERTS | {"attention_bias": True, "lora_target_modules": ATTENTION}),
    ("qwen2_moe", ALL | QWEN_EXPERTS | {"shared_expert_intermediate_size": 56}),
    ("qwen2_moe", QWEN_EXPERTS | {"shared_expert_intermediate_size": 56, "qkv_bias": False}),
]


def save_config(folder, kind, change):
    """A small config of this kind in the folder, and the settings among the changes."""
    settings = {key: change[key] for key in change if key.startswith("lora")}
    keys = SMALL | {key: change[key] for key in change if not key.startswith("lora")}
    if kind in WITHOUT_HEAD_DIM:
        keys.pop("head_dim")
    config = AutoConfig.for_model(kind, **keys)
    config.save_pretrained(folder)
    return config, settings


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_counts_equal_the_real_model(tmp_path, kind, change):
    config, settings = save_config(tmp_path, kind, change)
    plan = make_plan(tmp_path, lora_r=4, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == plan.shape.parameters
        wrapped = get_peft_model(model, lora_config(plan.settings))
    found = {
        file_key(name): tuple(p.shape) for name, p in wrapped.named_parameters() if p.requires_grad
    }
    assert found == expected_shapes(plan)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == plan.trainable


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_parts_equal_the_real_model(tmp_path, kind, change):
    config, _ = save_config(tmp_path, kind, change)
    shape = read_shape(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    linears = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    assert linears == {
        name: (linear.d_in, linear.d_out, linear.has_bias)
        for name, linear in shape.targeted("all-linear")
    }
    first = [
        module
        for name, module in modules.items()
        if name.startswith(f"{shape.layers_name}.0.") and "norm" in name
    ]
    assert sum(p.numel() for m in first for p in m.parameters()) == shape.norm_parameters
    widths = [module.weight.numel() for module in first]
    assert widths.count(shape.hidden_size) == shape.num_block_norms
    assert len(widths) - shape.num_block_norms == 2 * shape.has_head_norms
    has_means = any(isinstance(module, nn.LayerNorm) for module in first)
    assert shape.norm_kind == ("layer" if has_means else "rms")
    fused = [p for name, p in model.named_parameters() if ".experts." in name]
    assert sum(p.numel() for p in fused) == shape.expert_parameters
    active = sum(p.numel() // shape.num_experts * shape.experts_per_token for p in fused)
    active += sum(p.numel() for name, p in model.named_parameters() if ".mlp.gate.weight" in name)
    assert shape.active_linear_parameters == active + sum(a * b for a, b, _ in linears.values())
    assert shape.has_head_bias == (getattr(model.get_output_embeddings(), "bias", None) is not None)
    assert shape.is_tied == config.tie_word_embeddings
    assert shape.logit_softcap == (getattr(config, "final_logit_softcapping", None) is not None)
    gates = [name for name in linears if "gate_proj" in name or "gate_up_proj" in name]
    assert shape.is_gated == bool(gates or fused)
    assert shape.has_fused_gate == any("gate_up_proj" in name for name in linears)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", TIED),
        ("phi", ALL),
        ("gpt_neox", ALL),
        ("gpt_neox", TIED | ALL),
        ("mixtral", ALL | EXPERTS),
        ("qwen2_moe", ALL | QWEN_EXPERTS | {"shared_expert_intermediate_size": 64}),
    ],
)
def test_quantised_weights_are_those_that_bitsandbytes_packs(tmp_path, kind, change):
    config, settings = save_config(tmp_path, kind, change)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plan = make_plan(tmp_path, load_in_4bit=True, **settings)
    model = load_base(plan, torch.device("cpu"))
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert sum(math.prod(p.quant_state.shape) for p in packed) == plan.shape.quantised_parameters
    assert sum(p.numel() for p in packed) == plan.shape.quantised_parameters // 2
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in packed)
    assert rest == plan.shape.parameters - plan.shape.quantised_parameters


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        ("gpt_neox", {}, ["'q_proj' matches no linear layer", "query_key_value, ", "all-linear"]),
        ("phi", {}, ["'o_proj' matches no linear layer", "dense, fc1, fc2", "all-linear"]),
        ("mixtral", EXPERTS, ["'gate_proj'", "fused", "[q_proj, k_proj, v_proj, o_proj]"]),
        ("mixtral", EXPERTS | {"lora_target_modules": ["w1"]}, ["'w1'", "fused"]),
        ("mixtral", EXPERTS | {"lora_target_modules": ["gate"]}, ["'gate' matches no linear"]),
        ("qwen3_moe", QWEN_EXPERTS, ["'gate_proj'", "fused", "all-linear"]),
    ],
)
def test_targets_that_a_family_does_not_have(tmp_path, kind, change, parts):
    _, settings = save_config(tmp_path, kind, change)
    with pytest.raises(UserError, match="lora_target_modules") as error:
        make_plan(tmp_path, **settings)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"num_local_experts": 0}]
)
def test_a_model_with_experts_in_some_blocks_is_refused(tmp_path, change):
    save_config(tmp_path, "qwen3_moe", QWEN_EXPERTS)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="not every block has experts") as error:
        read_shape(str(tmp_path))
    assert str(path) in str(error.value)


def test_the_name_of_the_number_of_experts_in_published_configs(tmp_path):
    save_config(tmp_path, "qwen3_moe", QWEN_EXPERTS)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    assert read_shape(str(tmp_path)).num_experts == 4
