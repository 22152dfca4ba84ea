"""The checks of a model class accept a correct class, and report the error of an incorrect one."""

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from pipeline.model import attention, proof
from pipeline.model.proof import mixing_classes, prove, prove_model, require_proof, small_model
from pipeline.model.small_copy import small_copies
from pipeline.model.structure import blocks
from pipeline.plan.given.class_proof import LIMIT, Proof
from tests.messages import assert_mentions, refused
from tests.model.kinds import small
from tests.model.models import build, make_own_code
from tests.models.kinds import ALL
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

ATTENTION = ("q_proj", "v_proj", "o_proj")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama():
    return build("llama")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "llama4_text", "gemma4"])
def test_a_class_that_is_trained_correctly_passes_every_check(kind):
    result = prove_model(build(kind), ATTENTION)
    assert not [
        *result.refusals,
        *result.without_packs,
        *result.without_reentrant,
        *result.without_fast_paths,
    ]
    assert len(result.errors) == 8  # every comparison was made
    assert max(result.errors.values()) < LIMIT


@pytest.mark.parametrize("kind", ["qwen3_5_text", "stablelm", "falcon_h1"])
def test_a_class_that_mixes_documents_is_trained_without_packs(kind):
    result = prove_model(build(kind), ("q_proj", "k_proj"))
    assert result.without_packs
    assert not result.refusals


@pytest.mark.parametrize(
    ("kind", "mixer"),
    [("falcon_h1", "FalconH1Mixer"), ("stablelm", "StableLmAttention")],
)
def test_the_reason_names_the_module_that_reads_other_documents(kind, mixer):
    """Blocks of Falcon-H1 also have an attention; StableLM's attention drops its arguments."""
    assert mixing_classes(build(kind)) == [mixer]


def test_a_proof_against_packs_names_the_mixer_of_blocks_with_attention():
    result = prove_model(build("falcon_h1"), ("q_proj", "k_proj"))
    assert_mentions(result.without_packs[0], "FalconH1Mixer")


def test_no_module_is_named_if_documents_stay_separate(llama):
    assert mixing_classes(llama) == []


def test_shared_keys_and_values_exclude_re_entrant_checkpointing():
    result = prove_model(build("gemma4_text/ple+shared"), ("k_proj", "v_proj"))
    assert not result.refusals
    assert_mentions(result.without_reentrant[0], "re-entrant checkpointing")


def test_blocks_that_are_called_several_times_exclude_re_entrant_checkpointing():
    """DeepSpeed 0.19.8 fails at ZeRO-3 if a block has several re-entrant backward passes."""
    keys = small(num_layers_per_stack=2, H_cycles=2, L_cycles=2)
    model = small_model(AutoModelForCausalLM, AutoConfig.for_model("hrm_text", **keys))
    result = prove_model(model, ATTENTION)
    assert not result.refusals
    assert_mentions(result.without_reentrant[0], "block", "times")


def test_a_class_whose_attention_differs_from_ours_is_refused(llama, monkeypatch):
    fused = attention._LayerAttention._fused
    monkeypatch.setattr(
        attention._LayerAttention,
        "_fused",
        lambda self, q, k, v, mask: fused(self, 1.01 * q, k, v, mask),
    )
    result = prove_model(llama, ATTENTION)
    assert_mentions(" ".join(result.refusals), "attention", "1e-05")  # 1e-05 is LIMIT


def test_a_class_that_ignores_the_attention_function_is_refused(llama, monkeypatch):
    monkeypatch.setattr(llama, "set_attn_implementation", lambda name: None)
    result = prove_model(llama, ATTENTION)
    assert_mentions(" ".join(result.refusals), "LlamaForCausalLM", "attention function")


def test_a_class_whose_loss_differs_from_ours_is_refused(llama, monkeypatch):
    forward = LlamaForCausalLM.forward

    def scaled(self, *args, labels=None, **kwargs):
        output = forward(self, *args, labels=labels, **kwargs)
        if labels is not None:  # such as the router's auxiliary loss
            output.loss = output.loss * 1.001
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    result = prove_model(llama, ATTENTION)
    assert_mentions(result.refusals[0], "loss", "1.0e-03")


def test_attention_across_documents_excludes_packs(llama, monkeypatch):
    monkeypatch.setattr(
        attention, "_by_document", lambda documents, layer, q, k, v: layer(q, k, v).transpose(1, 2)
    )
    result = prove_model(llama, ATTENTION)
    assert result.errors["other documents"] > 1e-3
    assert len(result.without_packs) == 2
    assert not result.refusals


def test_an_adapter_that_differs_after_loading_in_plain_peft_is_refused(llama, monkeypatch):
    load = PeftModel.from_pretrained

    def load_scaled(base, folder):
        loaded = load(base, folder)
        loaded.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"] *= 1.01
        return loaded

    monkeypatch.setattr(proof.PeftModel, "from_pretrained", load_scaled)
    result = prove_model(llama, ATTENTION)
    assert_mentions(result.refusals[0], "adapter", "1e-05")


def test_a_matrix_without_a_gradient_is_refused():
    result = prove_model(build("jamba"), ("dt_proj", "q_proj"))
    assert_mentions(result.refusals[0], "dt_proj", "lora_target_modules")


def test_layers_that_peft_rewrites_are_refused():
    """peft 0.21.2 adapts fused experts instead of the named dense MLPs of GLM-4.x."""
    result = prove_model(build("glm4_moe"), ("q_proj", "gate_proj", "up_proj", "down_proj"))
    assert any("instead of" in reason for reason in result.refusals)


def test_a_class_that_needs_a_mask_is_refused():
    assert prove_model(build("deepseek_v32"), ("o_proj",)).refusals


def test_the_checks_of_a_model_folder_are_cached_for_its_targets(tiny_model, monkeypatch):
    first = prove(tiny_model, ["q_proj", "v_proj"])
    assert not [*first.refusals, *first.without_packs, *first.without_merge]
    monkeypatch.setattr(proof, "prove_model", lambda *_: 1 / 0)
    assert prove(tiny_model, ["v_proj", "q_proj"]) == first
    with pytest.raises(ZeroDivisionError):
        prove(tiny_model, ["q_proj"])  # other targets


@pytest.mark.parametrize(
    ("failed_checks", "settings", "facts"),
    [
        ({"refusals": ["loss differs by 0.1"]}, {}, ("loss differs by 0.1", "class-refused")),
        (
            {"without_packs": ["1 of 4 blocks"]},
            {"packing": True},
            ("packing: false", "class-packs"),
        ),
        (
            {"without_reentrant": ["gradients differ by 0.5"]},
            {"zero_stage": 3, "gradient_checkpointing": True},
            ("differ by 0.5", "zero_stage: 2", "class-re-entrant"),
        ),
    ],
    ids=["class", "packs", "re-entrant"],
)
def test_a_run_that_the_checks_exclude_is_refused_before_the_base_is_loaded(
    tiny_model, monkeypatch, failed_checks, settings, facts
):
    plan = make_plan(tiny_model, 2, **settings)
    monkeypatch.setattr(proof, "_proof_of", lambda *_, **__: Proof(**failed_checks))
    with refused(*facts):
        require_proof(plan)


@pytest.mark.parametrize(
    ("failed_checks", "settings"),
    [
        ({}, {"packing": True, "zero_stage": 3, "gradient_checkpointing": True}),
        ({"without_packs": ["1 of 4 blocks"]}, {"packing": False}),
        (
            {"without_reentrant": ["gradients differ by 0.5"]},
            {"zero_stage": 2, "gradient_checkpointing": True},
        ),
    ],
    ids=["nothing found", "without packs", "not re-entrant"],
)
def test_a_run_that_the_checks_do_not_exclude_is_allowed(
    tiny_model, monkeypatch, failed_checks, settings
):
    plan = make_plan(tiny_model, 2, **settings)
    monkeypatch.setattr(proof, "_proof_of", lambda *_, **__: Proof(**failed_checks))
    assert require_proof(plan) == Proof(**failed_checks)


def test_a_model_without_a_working_small_copy_is_checked_itself(tmp_path, monkeypatch):
    build("granite").save_pretrained(tmp_path)
    monkeypatch.setattr(proof, "small_copies", lambda config: iter(()))
    result = prove(tmp_path, ["q_proj"])
    assert not result.refusals
    assert max(result.errors.values()) < LIMIT


def test_a_lack_of_memory_for_the_checks_is_refused_but_not_cached(tmp_path, monkeypatch):
    build("granite").save_pretrained(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(proof, "small_copies", lambda config: iter(()))
        context.setattr(proof, "_COPIES", 10**9)  # copies of the model that the checks would need
        with refused("no small copy", "GiB"):
            prove(tmp_path, ["k_proj"])
    assert not prove(tmp_path, ["k_proj"]).refusals


def test_a_small_copy_with_the_widths_of_the_model_has_fewer_blocks():
    reduced, _, wide = small_copies(AutoConfig.for_model("olmo2", num_hidden_layers=32))
    assert (reduced.num_hidden_layers, wide.num_hidden_layers) == (4, 2)
    assert (reduced.hidden_size, wide.hidden_size) == (64, 4096)


def test_a_class_whose_blocks_share_weights_has_a_small_copy():
    kind, keys = ALL["zamba"]
    assert small_model(AutoModelForCausalLM, AutoConfig.for_model(kind, **keys))


def test_the_small_copy_of_longrope_has_a_factor_for_each_pair_of_its_head():
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + i / 50 for i in range(48)], "long_factor": [2.0] * 48,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "phi3", rope_parameters=rope, partial_rotary_factor=0.75, hidden_size=3072,
        num_attention_heads=24, max_position_embeddings=131072, pad_token_id=0,
    )  # fmt: skip
    model = small_model(AutoModelForCausalLM, config)
    head_dim = 16  # of the small copy; RoPE rotates pairs of 75 % of its values
    assert len(model.config.rope_parameters["short_factor"]) == 0.75 * head_dim / 2


@pytest.mark.parametrize("kind", ["gpt_neo", "mamba"])
def test_the_small_copy_of_a_config_with_other_names_of_its_sizes_is_small(kind):
    """gpt_neo has `num_layers`, and mamba has no attention heads."""
    model = small_model(AutoModelForCausalLM, AutoConfig.for_model(kind))
    assert model.config.num_hidden_layers == 4


def test_a_model_with_its_own_code_is_checked_with_that_code(tmp_path):
    folder = make_own_code(tmp_path / "model")
    result = prove(folder, ["q_proj"], trust_remote_code=True)
    assert not result.refusals
    code = (folder / "own_code.py").read_text()
    (folder / "own_code.py").write_text(code.replace("output.loss = ", "output.loss = 1.01 * "))
    result = prove(folder, ["q_proj"], trust_remote_code=True)
    assert_mentions(result.refusals[0], "loss", "9.9e-03")


def test_a_checkpoint_with_other_names_than_the_model_can_be_merged_into(tmp_path):
    build("gemma3").save_pretrained(tmp_path)  # stored as language_model.model...
    assert not prove(tmp_path, ["q_proj", "down_proj"]).without_merge


def test_an_adapted_weight_missing_in_the_checkpoint_excludes_a_merge(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    [reason] = prove(tmp_path, ["q_proj", "k_proj"]).without_merge
    assert_mentions(reason, "1 adapted", "layers.2.self_attn.q_proj.weight", "cannot be merged")


@pytest.mark.parametrize(
    ("kind", "num_layer_types"),
    [("llama", 1), ("gpt_oss", 2), ("gemma4_text", 2), ("qwen3_5_text", 2), ("llama4_text", 2)],
)
def test_the_small_copy_has_every_type_of_layer(kind, num_layer_types):
    config = AutoConfig.for_model(kind)
    model = small_model(AutoModelForCausalLM, config)
    assert sum(p.numel() for p in model.parameters()) < 2e6
    text = model.config.get_text_config()
    assert len(blocks(model)) == text.num_hidden_layers == 4
    assert len(set(getattr(text, "layer_types", None) or ["full"])) == num_layer_types
