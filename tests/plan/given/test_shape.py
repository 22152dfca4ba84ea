"""Counts computed from config.json equal counts of the models that transformers and peft build.

This holds for the model types of the table of families (plan/given/families.py).
"""

import json
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.adapter import expected_shapes, lora_config, trainable
from pipeline.model.base import load_base
from pipeline.plan.given.adapter_counts import adapter_shapes
from pipeline.plan.given.families import FAMILIES
from pipeline.plan.given.shape import read_shape, shape_of
from tests.messages import refused
from tests.plans import LLAMA_8B, SMOLLM2
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
WITH_EXPERTS = {"lora_target_modules": ["auto", "experts"]}
QWEN_EXPERTS = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 40}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TIED, ALL = {"tie_word_embeddings": True}, {"lora_target_modules": "all-linear"}
WITHOUT_HEAD_DIM = {"phi3", "qwen2", "phi", "gpt_neox", "qwen2_moe"}
# Model type, and changes for `save_config`.
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
    ("mixtral", EXPERTS | {"lora_target_modules": ["q_proj", "experts"]}),
    ("mixtral", EXPERTS | {"lora_target_modules": "experts"}),
    ("qwen3_moe", QWEN_EXPERTS | WITH_EXPERTS | {"mlp_only_layers": [1]}),
    ("qwen2_moe", QWEN_EXPERTS | WITH_EXPERTS),
    ("qwen3_moe", ALL | QWEN_EXPERTS),
    ("qwen3_moe", QWEN_EXPERTS | {"attention_bias": True, "lora_target_modules": ATTENTION}),
    ("qwen2_moe", ALL | QWEN_EXPERTS | {"shared_expert_intermediate_size": 56}),
    ("qwen2_moe", QWEN_EXPERTS | {"shared_expert_intermediate_size": 56, "qkv_bias": False}),
    # Layers of two kinds: with experts and without.
    ("qwen3_moe", ALL | QWEN_EXPERTS | {"mlp_only_layers": [0]}),
    ("qwen3_moe", QWEN_EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 5}),
    ("qwen2_moe", QWEN_EXPERTS | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}),
    ("qwen3_moe", ALL | QWEN_EXPERTS | {"num_local_experts": 0, "num_experts": 0}),
    # A missing key has the default of the config class: 8 key-value heads, for example.
    *(
        (model_type, {"without": ["num_key_value_heads"], "num_attention_heads": 32, "head_dim": 4})
        for model_type in (
            "mistral",
            "mixtral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2_moe",
            "qwen3_moe",
            "smollm3",
        )
    ),
    # Two keys for the number of experts, of which the class of the model type reads one.
    ("mixtral", EXPERTS | {"num_experts": 6}),
    ("qwen3_moe", QWEN_EXPERTS | {"num_experts": 6}),
    ("qwen2_moe", QWEN_EXPERTS | {"num_local_experts": 6}),
]


def save_config(folder, model_type, changes):
    """Write a small config.json; return the config of transformers and the LoRA settings.

    `changes`: keys of config.json; settings of LoRA, which begin with "lora"; and in "without" the
    keys that config.json does not have.
    """
    settings = {key: value for key, value in changes.items() if key.startswith("lora")}
    config = {"model_type": model_type} | SMALL
    config |= {key: value for key, value in changes.items() if not key.startswith("lora")}
    if "moe" in model_type:
        config = QWEN_EXPERTS | {"shared_expert_intermediate_size": 56} | config
    if model_type == "mixtral":
        config = EXPERTS | config
    if model_type in WITHOUT_HEAD_DIM:
        config.pop("head_dim")
    for key in config.pop("without", ()):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder), settings


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_number_of_parameters_and_lora_shapes_equal_those_of_the_real_model(
    tmp_path, model_type, changes
):
    config, settings = save_config(tmp_path, model_type, changes)
    plan = make_plan(tmp_path, lora_r=4, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == plan.shape.parameters
        adapted = get_peft_model(model, lora_config(plan.settings))
    shapes = {key: tuple(parameter.shape) for key, parameter in trainable(adapted).items()}
    assert expected_shapes(plan) == shapes
    shapes_without_experts = {key: shape for key, shape in shapes.items() if ".experts." not in key}
    assert shapes_without_experts == adapter_shapes(plan.shape, plan.settings)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_linears_norms_experts_and_head_equal_those_of_the_real_model(
    tmp_path, model_type, changes
):
    config, _ = save_config(tmp_path, model_type, changes)
    shape = read_shape(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    linears = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module is not head
    }
    assert linears == {
        name: (linear.d_in, linear.d_out, linear.has_bias) for name, linear in shape.linears.items()
    }
    for layer, index in enumerate(shape.layer_kinds):
        assert_block_equals(shape.blocks[index], model, f"{shape.layers_name}.{layer}.")
    # Fused experts: one parameter has the weights of all experts, stacked on the first axis.
    fused_experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert sum(p.numel() for p in fused_experts) == shape.expert_parameters
    experts_per_token = config.num_experts_per_tok if fused_experts else 0
    num_active = sum(p.numel() // len(p) * experts_per_token for p in fused_experts)
    routers = [p for name, p in model.named_parameters() if ".mlp.gate.weight" in name]
    num_active += sum(p.numel() for p in routers)
    num_active += sum(d_in * d_out for d_in, d_out, _ in linears.values())
    assert sum(count * block.active_weights for block, count in shape.counts()) == num_active
    assert shape.has_head_bias == (getattr(head, "bias", None) is not None)
    assert shape.is_tied == config.tie_word_embeddings
    assert shape.has_logit_softcap == (getattr(config, "final_logit_softcapping", None) is not None)
    gates = [name for name in linears if "gate_proj" in name or "gate_up_proj" in name]
    assert shape.blocks[0].is_gated == bool(gates or fused_experts)
    assert shape.blocks[0].has_fused_gate == any("gate_up_proj" in name for name in linears)


def assert_block_equals(block, model, prefix):
    """Compare norms and number of parameters with those of the modules with this name prefix."""
    norms = [
        module
        for name, module in model.named_modules()
        if name.startswith(prefix) and "norm" in name
    ]
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == block.norm_parameters
    widths = [norm.weight.numel() for norm in norms]
    assert widths.count(block.hidden_size) == block.num_norms
    # Norms of another width are those of the query heads and of the key heads.
    assert len(widths) - block.num_norms == 2 * block.has_head_norms
    has_layer_norm = any(isinstance(norm, nn.LayerNorm) for norm in norms)
    assert block.norm_kind == ("layer" if has_layer_norm else "rms")
    sizes = [p.numel() for name, p in model.named_parameters() if name.startswith(prefix)]
    assert sum(sizes) == block.parameters


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", TIED),
        ("phi", ALL),
        ("gpt_neox", ALL),
        ("gpt_neox", TIED | ALL),
        ("mixtral", ALL | EXPERTS),
        ("qwen2_moe", ALL | QWEN_EXPERTS | {"shared_expert_intermediate_size": 64}),
    ],
)
def test_the_number_of_quantised_weights_equals_that_of_bitsandbytes(tmp_path, model_type, changes):
    config, settings = save_config(tmp_path, model_type, changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plan = make_plan(tmp_path, load_in_4bit=True, **settings)
    model = load_base(plan, torch.device("cpu"))
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    num_quantised = plan.shape.quantised_parameters
    assert sum(math.prod(p.quant_state.shape) for p in packed) == num_quantised
    assert sum(p.numel() for p in packed) == num_quantised // 2  # two 4-bit values in a byte
    num_others = sum(p.numel() for p in model.parameters() if not hasattr(p, "quant_state"))
    assert num_others == plan.shape.parameters - num_quantised


@pytest.mark.parametrize(
    ("model_type", "targets", "facts"),
    [
        ("gpt_neox", ["q_proj"], ["q_proj", "query_key_value"]),
        ("phi", ["o_proj"], ["o_proj", "dense, fc1, fc2"]),
        ("mixtral", ["gate_proj"], ["gate_proj", "fused", "q_proj, k_proj, v_proj, o_proj"]),
        ("mixtral", ["w1"], ["w1", "fused"]),
        ("mixtral", ["gate"], ["gate"]),
        ("qwen3_moe", ["gate_proj"], ["gate_proj", "fused"]),
    ],
)
def test_targets_that_a_model_type_does_not_have_are_refused_with_the_names_of_its_layers(
    tmp_path, model_type, targets, facts
):
    save_config(tmp_path, model_type, {})
    with refused("lora_target_modules", *facts):
        make_plan(tmp_path, lora_target_modules=targets)


def test_mlps_of_layers_without_experts_are_not_default_targets_and_are_refused(tmp_path):
    """In a model with experts, peft applies the names of MLP layers to the fused experts."""
    save_config(tmp_path, "qwen3_moe", {"mlp_only_layers": [0]})
    assert make_plan(tmp_path).settings.lora_target_modules == ATTENTION
    with refused("lora_target_modules", "layers.0.mlp.up_proj", ", ".join(ATTENTION)):
        make_plan(tmp_path, lora_target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_auto_adapts_every_linear_layer_except_routers(tmp_path, model_type):
    config, _ = save_config(tmp_path, model_type, {})
    plan = make_plan(tmp_path, lora_r=4)
    with torch.device("meta"):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_config(config), lora_config(plan.settings)
        )
    model = adapted.get_base_model()
    linears = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not model.get_output_embeddings()
        and "lora_" not in name
    }
    adapter_keys = [key.removeprefix("base_model.model.") for key in expected_shapes(plan)]
    adapted_layers = {key.split(".lora_")[0] for key in adapter_keys}
    routers = {name for name in linears if name.endswith("gate")}
    assert adapted_layers == linears - routers
    assert bool(routers) == (model_type == "qwen2_moe")  # in other types it is not an nn.Linear


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_settings_that_are_not_an_object_are_refused(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {key: "dynamic"}))
    with refused("config.json", key, "'dynamic'"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1e30),
        ("hidden_size", 10**12),
        ("num_key_value_heads", 10**10),
        ("head_dim", 10**15),
        ("n_layer", 10**8),
        ("num_local_experts", 10**7),
        ("vocab_size", int("9" * 400)),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "not_in_the_table"])
def test_an_absurdly_large_size_is_refused_before_anything_is_counted(key, value, model_type):
    for config in ({key: value}, {"text_config": {key: value}}):
        with refused(key, "more than any model has"):
            shape_of(LLAMA_8B | {"model_type": model_type} | config, "/no/folder")


@pytest.mark.parametrize(
    ("value", "method"),
    [(None, None), ({}, None), ({"quant_method": "awq"}, "awq"), ({"bits": 4}, "unknown")],
)
def test_the_method_of_a_quantised_checkpoint_is_read(tmp_path, value, method):
    save_config(tmp_path, "llama", {"quantization_config": value})
    assert read_shape(str(tmp_path)).quantization == method


def test_a_quantisation_that_is_not_an_object_is_refused(tmp_path):
    save_config(tmp_path, "llama", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": "fp8"}))
    with refused("quantization_config", "fp8", path):
        read_shape(str(tmp_path))


def test_a_model_with_an_adapter_in_its_folder_is_refused(tmp_path):
    save_config(tmp_path, "llama", {})
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(tmp_path, "adapter_config.json", "another folder", "init_adapter"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "facts"),
    [("adapter_config.json", ("adapter", "base", "init_adapter")), ("m.gguf", ("m.gguf", "GGUF"))],
)
def test_a_folder_without_a_config_is_refused_with_what_it_has(tmp_path, name, facts):
    (tmp_path / name).write_text("{}")
    with refused(tmp_path, "config.json", *facts):
        read_shape(str(tmp_path))


def test_a_padding_token_without_embedding_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {"pad_token_id": 10**6}))
    with refused("config.json", "pad_token_id", "1000000", SMOLLM2["vocab_size"]):
        read_shape(str(tmp_path))
