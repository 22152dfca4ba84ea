"""Models whose sizes ship with the project: published size, source, and a plan for each.

Sizes come from the keys of config.json by the formulas of the model's family. For a type without a
family (`needs_class`), they were derived from the class of transformers and are stored in a file.
"""

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
def test_the_number_of_parameters_is_that_of_the_model_card(model):
    """It is equal to 1 %, or after rounding to the decimals of the published number."""
    counted_billions = model.shape().parameters / 1e9 + model.billions_not_loaded
    is_within_1_percent = counted_billions == pytest.approx(model.billions, rel=0.01)
    num_decimals = len(str(model.billions).partition(".")[2])
    assert is_within_1_percent or round(counted_billions, num_decimals) == model.billions
    assert model.source
    assert model.date.startswith("20")


def test_each_name_has_one_shape():
    counts = Counter(name for model in MODELS for name in (model.name, *model.also))
    assert max(counts.values()) == 1
    assert len(MODELS) >= 40
    assert published_shape("Qwen/Qwen3-8B-Base").folder == "Qwen/Qwen3-8B-Base"


def test_exactly_the_types_without_a_family_have_a_stored_shape():
    names = {model.name for model in (*UNKNOWN_TYPES, *REFUSED)}
    assert names == read_json(SHAPES_FILE)["shapes"].keys()
    assert all(model.shape().is_from_class for model in UNKNOWN_TYPES)


@pytest.mark.parametrize("name", ["qwen/qwen3-32b", "Qwen3-32B", "Qwen/Qwen3-32"])
def test_an_unknown_name_is_refused_with_similar_names(name):
    with refused(name, "Qwen/Qwen3-32B", "hf download"):
        published_shape(name)


def test_a_name_that_is_similar_to_no_other_gets_no_hint():
    with pytest.raises(UserError) as error:
        published_shape("somebody/entirely-different")
    assert "did you mean" not in str(error.value)


LARGE_GPU = gpu(640)  # GiB: more than any GPU has, so that every model fits


def plan_on(hardware, model, **changes):
    return plan_and_candidates(
        settings(model, **changes), model.shape(), hardware, nodes=1, ranks_per_node=1
    )[0]


@pytest.mark.parametrize("model", [m for m in MODELS if m.billions < 40], ids=lambda m: m.name)
def test_a_model_below_40_billion_is_planned_on_one_gpu_of_80_gib(model):
    plan = plan_on(gpu(80, 1), model, max_length=1024, offload_param="none")
    assert plan.fits
    assert plan.memory.device_peak_bytes <= gpu(80, 1).usable_bytes(1)
    assert plan.speed.tokens_per_second > 0


@pytest.mark.parametrize("model", [m for m in MODELS if m.billions > 40], ids=lambda m: m.name)
def test_a_model_above_40_billion_is_refused_on_one_gpu_of_80_gib_with_a_change_that_fits(model):
    with pytest.raises(DoesNotFitError) as error:
        plan_on(gpu(80, 1), model, max_length=1024, offload_param="none")
    assert re.search(r"; (with|it fits on|no single change makes it fit)", str(error.value))


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.name)
def test_a_class_that_cannot_be_trained_is_refused_by_name_with_the_reason(model):
    with refused(model.name, "attention", "keys"):
        published_shape(model.name)


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [("Qwen/Qwen3.5-27B", False), ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", False),
     ("zai-org/GLM-4.7-Flash", True), ("allenai/Olmo-3-7B-Instruct", True)],
)  # fmt: skip
def test_a_plan_by_name_packs_only_if_the_class_keeps_the_documents_of_a_pack_separate(
    name, is_packed
):
    model = next(model for model in MODELS if model.name == name)
    plan = plan_on(LARGE_GPU, model, max_length=1024)
    assert plan.settings.packing is is_packed
    if not is_packed:
        assert f"of {plan.shape.num_layers} blocks" in plan.why["packing"]


# Only 16 of the 64 blocks of this model keep the documents of a pack separate.
MIXES_DOCUMENTS = next(model for model in MODELS if model.name == "Qwen/Qwen3.5-27B")


def test_a_model_folder_of_a_class_that_mixes_documents_is_planned_without_packs():
    shape = replace(MIXES_DOCUMENTS.shape(), source=None)  # as if read from a folder
    cluster = {"nodes": 1, "ranks_per_node": 1}
    plan, _ = plan_and_candidates(settings(MIXES_DOCUMENTS), shape, LARGE_GPU, **cluster)
    assert plan.settings.packing is False
    with refused("packing", "16 of 64 blocks", "rule class-packs"):
        with_packs = settings(MIXES_DOCUMENTS, packing=True)
        plan_and_candidates(with_packs, shape, LARGE_GPU, **cluster)


def test_a_plan_by_name_with_packs_of_a_class_that_mixes_documents_has_the_refusing_rule():
    plan = plan_on(LARGE_GPU, MIXES_DOCUMENTS, max_length=1024, packing=True)
    assert "class-packs" in {rule.id for rule in plan.rules if rule.level == "refuse"}


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V3"])
def test_a_model_that_is_published_with_quantised_weights_is_planned_in_16_bits(name):
    model = next(model for model in MODELS if model.name == name)
    very_large_gpu = gpu(4096)  # GiB
    plan = plan_on(very_large_gpu, model)
    levels = {rule.id: rule.level for rule in plan.rules}
    assert levels["dequantised-base"] == "advise"
    assert "refuse" not in levels.values()
    config_in_16_bits = dict(model.config)
    del config_in_16_bits["quantization_config"]
    plan_in_16_bits = plan_on(very_large_gpu, replace(model, config=config_in_16_bits))
    assert plan.memory.device_peak_bytes == plan_in_16_bits.memory.device_peak_bytes


def test_a_plan_by_name_of_an_awq_checkpoint_has_the_rule_that_refuses_it():
    model = next(model for model in MODELS if model.name == "openai/gpt-oss-20b")
    awq = model.config | {"quantization_config": {"quant_method": "awq"}}
    plan = plan_on(gpu(), replace(model, config=awq))
    assert "prequantised-base" in {rule.id for rule in plan.rules if rule.level == "refuse"}
