"""Fast paths: each is on unless it does not apply, and plan.json has the reason if it is off.

A fast path is a faster computation with the same result as that of peft, transformers or DeepSpeed.
"""

from dataclasses import replace

import pytest

from pipeline.plan.given.catalogue import GPUS, cpu_of
from pipeline.plan.given.class_proof import Proof
from pipeline.plan.given.fast_paths import (
    FP32_KERNELS,
    JOINT_LORA,
    LOSS_GRADIENT,
    ONE_REDUCTION,
    fast_paths,
)
from pipeline.plan.render import plan_json
from tests.messages import assert_mentions
from tests.tiny import make_plan

pytestmark = pytest.mark.unit


# On such a CPU all fast paths apply.
SLOW_IN_BF16 = replace(cpu_of(num_cores=2, memory_bytes=16 * 2**30), is_slow_in_bf16=True)


def plan_of(folder, hardware=SLOW_IN_BF16, **settings):
    return make_plan(folder, world_size=2, hardware=hardware, **({"bf16": True} | settings))


def states(folder, hardware=SLOW_IN_BF16, **settings):
    """Name of each fast path -> "on", or the reason why it is off."""
    return plan_json(plan_of(folder, hardware, **settings))["fast_paths"]


def test_all_fast_paths_are_on_by_default(tiny_model):
    assert set(states(tiny_model).values()) == {"on"}


def test_all_fast_paths_are_off_on_request(tiny_model):
    assert set(states(tiny_model, fast_paths=False).values()) == {"fast_paths is false"}


@pytest.mark.parametrize(
    ("settings", "layout_changes", "name", "reason"),
    [
        ({"use_dora": True}, {}, JOINT_LORA, "use_dora"),
        ({}, {"accumulation_steps": 1}, ONE_REDUCTION, "one micro-batch"),
        ({}, {"training_dtype": "float32"}, FP32_KERNELS, "float32"),
    ],
)
def test_a_fast_path_that_does_not_apply_is_the_only_one_off(
    tiny_model, settings, layout_changes, name, reason
):
    plan = plan_of(tiny_model, **settings)
    layout = replace(plan.layout, **layout_changes)
    reasons = fast_paths(plan.shape, plan.settings, layout, plan.hardware)
    assert_mentions(reasons.pop(name), reason)
    assert not any(reasons.values())


def test_in_fp16_the_loss_has_no_gradient_in_the_forward_pass(tiny_model):
    plan = plan_of(tiny_model)
    layout = replace(plan.layout, training_dtype="float16")
    reasons = fast_paths(plan.shape, plan.settings, layout, plan.hardware)
    assert_mentions(reasons[LOSS_GRADIENT], "fp16")


@pytest.mark.parametrize(
    ("hardware", "reason"),
    [
        (cpu_of(num_cores=2, memory_bytes=16 * 2**30), "CPU"),
        (replace(GPUS["h100-80gb"], devices_per_node=2, host_bytes=64 * 2**30), "GPUs"),
    ],
)
def test_fp32_kernels_are_only_for_cpus_with_slow_bf16(tiny_model, hardware, reason):
    assert_mentions(states(tiny_model, hardware)[FP32_KERNELS], reason)


def test_all_fast_paths_are_off_if_a_check_found_other_results_with_them(tiny_model):
    """A Proof has the results of the checks of a model class."""
    proof = Proof(without_fast_paths=["differ by 1e-2"])
    plan = make_plan(tiny_model, world_size=2).with_proof(proof)
    assert set(plan.fast_paths.values()) == {"differ by 1e-2"}
    assert not plan.settings.fast_paths
