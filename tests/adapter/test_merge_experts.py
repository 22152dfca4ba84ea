"""Adapters of fused experts are merged into a checkpoint as peft merges them in memory."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline.adapter.adapter_file import read_adapter
from pipeline.adapter.merge import merge_adapters
from pipeline.adapter.merge_inputs import meta_model, read_base, with_stored_names
from pipeline.adapter.merge_plan import MergeOptions, WeightedAdapter
from pipeline.model.base import load_plain
from pipeline.model.checkpoint_names import model_on_meta, stored_names
from pipeline.model.expert_slices import expert_slices
from pipeline.model.structure import expert_tensors
from tests.adapter.merged import merge_adapter, tensors
from tests.messages import refused
from tests.model.models import build
from tests.models.kinds import ALL

pytestmark = pytest.mark.tensor

KINDS = [
    "qwen3_moe",  # stored as a tensor for each expert and projection
    "gpt_oss",  # stored fused and transposed
    "llama4_text",
    "granitemoe",  # stored fused, under another name
    "nemotron_h",  # without a gate projection
    "deepseek_v3",  # with multi-head latent attention
    "qwen3_vl_moe",  # transposed if the shape in the file differs from that of the class
]


@pytest.fixture
def folders(tmp_path):
    """Function: kind of model -> its folder, and that of a random adapter with experts."""

    def make(kind, dtype=torch.float32, other_targets=(), **options):
        build(kind, kinds=ALL).to(dtype).save_pretrained(tmp_path / "base")
        model = load_plain(tmp_path / "base", dtype=torch.float32)
        names = sorted({name.rsplit(".", 1)[-1] for name in expert_tensors(model)})
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj" if kind != "deepseek_v3" else "q_b_proj", *other_targets],
            target_parameters=names,
            **options,
        )
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "base", tmp_path / "adapter"

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_equals_that_of_peft(folders, tmp_path, kind):
    base, adapter = folders(kind, other_targets=["embed_tokens"], use_rslora=kind == "qwen3_moe")
    merge_adapter(base, adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(load_plain(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "by_peft")
    before, merged, by_peft = (
        tensors(folder) for folder in (base, tmp_path / "merged", tmp_path / "by_peft")
    )
    assert merged.keys() == by_peft.keys()
    assert all(torch.allclose(merged[key], by_peft[key], atol=1e-6) for key in merged)
    changed = {key for key in merged if not torch.equal(merged[key], before[key])}
    assert len(changed) == len(read(base, adapter).layer_updates)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_experts_in_bf16_are_merged_bitwise_as_by_peft(folders, tmp_path, kind):
    base, adapter = folders(kind, torch.bfloat16)
    merge_adapter(base, adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(load_plain(base, dtype=torch.bfloat16), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "by_peft")
    merged, by_peft = tensors(tmp_path / "merged"), tensors(tmp_path / "by_peft")
    assert merged.keys() == by_peft.keys()
    assert all(torch.equal(merged[key], by_peft[key]) for key in merged)


def test_all_linear_layers_with_router_and_experts_are_merged_bitwise_as_by_peft(tmp_path):
    """With `all-linear` peft 0.21.2 adapts the router of Qwen3-MoE as a parameter."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build("qwen3_moe").to(torch.bfloat16).save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(load_plain(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(adapter)
    merge_adapter(base, adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(load_plain(base, dtype=torch.bfloat16), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "by_peft")
    merged, by_peft, before = (
        tensors(folder) for folder in (tmp_path / "merged", tmp_path / "by_peft", base)
    )
    assert all(torch.equal(merged[key], by_peft[key]) for key in by_peft)
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(merged[router], before[router])


def test_the_change_of_experts_is_multiplied_by_the_weight_of_the_adapter(folders, tmp_path):
    base, adapter = folders("qwen3_moe")
    before, changes = tensors(base), []
    for weight in (1.0, -0.5):
        merged = tmp_path / f"merged {weight}"
        merge_adapters(base, [WeightedAdapter(adapter, weight)], merged, MergeOptions())
        changes.append({key: value - before[key] for key, value in tensors(merged).items()})
    once, weighted = changes
    assert all(torch.allclose(weighted[key], -0.5 * once[key], atol=1e-6) for key in before)


@pytest.mark.parametrize("kind", KINDS)
def test_each_stored_tensor_is_the_slice_that_transformers_loads_it_into(tmp_path, kind):
    build(kind, kinds=ALL).save_pretrained(tmp_path)
    assert_slices(tmp_path)


def test_a_fused_tensor_may_be_stored_in_either_orientation(tmp_path):
    """Published checkpoints of Qwen3-VL's mixtures have the inputs before the outputs."""
    build("qwen3_vl_moe", kinds=ALL).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {k: t.mT.contiguous() if "experts" in k else t for k, t in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    assert_slices(tmp_path)


def assert_slices(folder):
    """Assert that `expert_slices` names, for each stored tensor, its place in the fused weight."""
    stored = load_file(folder / "model.safetensors")
    meta, model = model_on_meta(folder), load_plain(folder, dtype=torch.float32)
    names = stored_names(meta, stored)
    shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    fused = [name.strip(".") for name in expert_tensors(model)]
    assert fused
    for name in fused:
        for key, part in expert_slices(meta, name, names[name], shapes).items():
            whole = model.get_parameter(name)
            whole = whole if part.expert is None else whole[part.expert]
            weight = stored[key].mT if part.is_flipped else stored[key]
            rows, columns = (
                axis.positions(n)
                for axis, n in zip((part.rows, part.columns), weight.shape[-2:], strict=True)
            )
            assert torch.equal(whole[..., rows[:, None], columns], weight)


def test_an_adapter_for_another_number_of_experts_is_refused(folders):
    base, adapter = folders("qwen3_moe")
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k: w[:8] if "experts.lora_A" in k else w for k, w in weights.items()}, path)
    with refused("experts", "4 experts", "r is 4"):
        read(base, adapter)


def test_experts_for_a_base_without_experts_are_refused(folders, tmp_path):
    _, adapter = folders("qwen3_moe")
    build("llama").save_pretrained(tmp_path / "dense")
    with refused("does not belong", "experts"):
        read(tmp_path / "dense", adapter)


def test_a_class_that_cannot_be_built_is_refused(folders):
    base, adapter = folders("qwen3_moe")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with refused("cannot be built", "merge_and_unload"):
        read(base, adapter)


def read(base, adapter):
    return with_stored_names(read_adapter(adapter), meta_model(read_base(base)))
