"""Models whose shapes ship with the project: published size, source, and a plan for each."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.plan.given.published import SHAPES_FILE, published_models, published_shape
from pipeline.plan.plan import DoesNotFitError, plan_and_candidates
from tests.messages import refused
from tests.plans import gpu

pytestmark = pytest.mark.unit

MODELS = tuple(model for model in published_models() if not model.refusal)
REFUSED = [model for model in published_models() if model.refusal]
UNKNOWN_TYPES = [model for model in MODELS if model.needs_class]


def settings(model, **changes):
    return RunSettings(model=model.name, train_data="train.jsonl", output_dir="run", **changes)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_counted_parameters_are_the_published_ones(model):
    total = model.shape().parameters / 1e9 + model.billions_not_loaded
    decimals = len(str(model.billions).partition(".")[2])
    assert total == pytest.approx(model.billions, rel=0.01) or round(total, decimals) == (
        model.billions
    )
    assert model.source
    assert model.date.startswith("20")


def test_each_name_has_one_shape():
    names = Counter(name for model in MODELS for name in (model.name, *model.also))
    assert max(names.values()) == 1
    assert len(MODELS) >= 40
    assert published_shape("Qwen/Qwen3-8B-Base").folder == "Qwen/Qwen3-8B-Base"


def test_exactly_the_types_without_a_family_have_a_counted_shape():
    counted = {model.name for model in (*UNKNOWN_TYPES, *REFUSED)}
    assert counted == read_json(SHAPES_FILE)["shapes"].keys()
    assert all(model.shape().is_from_class for model in UNKNOWN_TYPES)


@pytest.mark.parametrize("name", ["qwen/qwen3-32b", "Qwen3-32B", "Qwen/Qwen3-32"])
def test_an_unknown_name_is_refused_with_the_nearest_ones(name):
    with refused(name, "Qwen/Qwen3-32B", "hf download"):
        published_shape(name)


def test_a_name_like_no_other_gets_no_hint():
    with pytest.raises(UserError) as error:
        published_shape("somebody/entirely-different")
    assert "did you mean" not in str(error.value)


def plan_on(hardware, model, **changes):
    return plan_and_candidates(
        settings(model, **changes), model.shape(), hardware, nodes=1, ranks_per_node=1
    )[0]


@pytest.mark.parametrize("model", [m for m in MODELS if m.billions < 40], ids=lambda m: m.name)
def test_a_model_below_40_billion_is_planned_on_one_gpu_of_80_gib(model):
    plan = plan_on(gpu(80, 1), model, max_length=1024, offload_param="none")
    assert plan.fits
    assert plan.memory.device_need <= gpu(80, 1).usable_bytes(1)
    assert plan.speed.tokens_per_second > 0


@pytest.mark.parametrize("model", [m for m in MODELS if m.billions > 40], ids=lambda m: m.name)
def test_a_model_above_40_billion_is_refused_on_that_gpu_with_the_smallest_change(model):
    with pytest.raises(DoesNotFitError) as error:
        plan_on(gpu(80, 1), model, max_length=1024, offload_param="none")
    assert re.search(r"; (with|it fits on|no single change makes it fit)", str(error.value))


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.name)
def test_a_class_that_cannot_be_trained_is_refused_by_name_with_the_reason(model):
    with refused(model.name, "attention", "keys"):
        published_shape(model.name)


@pytest.mark.parametrize(
    ("name", "packs"),
    [("Qwen/Qwen3.5-27B", False), ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", False),
     ("zai-org/GLM-4.7-Flash", True), ("allenai/Olmo-3-7B-Instruct", True)],
)  # fmt: skip
def test_a_plan_by_name_has_packs_only_if_the_class_keeps_documents_separate(name, packs):
    model = next(model for model in MODELS if model.name == name)
    plan = plan_on(gpu(640, 8), model, max_length=1024)
    assert plan.settings.packing is packs
    assert packs or f"of {plan.shape.num_layers} blocks" in plan.why["packing"]


def test_a_folder_of_a_class_that_mixes_documents_is_planned_without_packs():
    model = next(model for model in MODELS if model.name == "Qwen/Qwen3.5-27B")
    shape = replace(model.shape(), source=None)
    plan, _ = plan_and_candidates(settings(model), shape, gpu(640, 8), nodes=1, ranks_per_node=1)
    assert plan.settings.packing is False
    with refused("packing", "16 of 64 blocks", "rule class-packs"):
        plan_and_candidates(
            settings(model, packing=True), shape, gpu(640, 8), nodes=1, ranks_per_node=1
        )


def test_a_plan_by_name_with_packs_of_a_class_that_mixes_documents_has_the_refusing_rule():
    model = next(model for model in MODELS if model.name == "Qwen/Qwen3.5-27B")
    plan = plan_on(gpu(640, 8), model, max_length=1024, packing=True)
    assert "class-packs" in {rule.id for rule in plan.rules if rule.level == "refuse"}


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V3"])
def test_a_model_that_is_published_with_packed_weights_is_planned_in_16_bits(name):
    model = next(model for model in MODELS if model.name == name)
    plan = plan_on(gpu(4096), model)
    levels = {rule.id: rule.level for rule in plan.rules}
    assert levels["dequantised-base"] == "advise"
    assert "refuse" not in levels.values()
    unpacked = {key: value for key, value in model.config.items() if key != "quantization_config"}
    same = plan_on(gpu(4096), replace(model, config=unpacked))
    assert plan.memory.device_need == same.memory.device_need


def test_a_plan_of_a_model_in_another_quantisation_has_the_rule_that_refuses_it():
    model = next(model for model in MODELS if model.name == "openai/gpt-oss-20b")
    awq = model.config | {"quantization_config": {"quant_method": "awq"}}
    plan = plan_on(gpu(), replace(model, config=awq))
    assert "prequantised-base" in {rule.id for rule in plan.rules if rule.level == "refuse"}
