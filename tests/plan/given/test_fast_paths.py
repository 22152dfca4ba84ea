"""Fast paths: all are off on request, and plan.json has the reason for each that is off."""

from dataclasses import replace

import pytest

from pipeline.plan.given.class_proof import Proof
from pipeline.plan.given.fast_paths import (
    JOINT_LORA,
    LOSS_GRADIENT,
    ONE_REDUCTION,
    fast_paths,
)
from pipeline.plan.render import plan_json
from tests.messages import assert_mentions
from tests.tiny import make_plan

pytestmark = pytest.mark.unit


def states(folder, **settings):
    return plan_json(make_plan(folder, 2, **settings))["fast_paths"]


def test_all_fast_paths_are_on_by_default(tiny_model):
    assert set(states(tiny_model).values()) == {"on"}


def test_all_fast_paths_are_off_on_request(tiny_model):
    assert set(states(tiny_model, fast_paths=False).values()) == {"fast_paths is false"}


@pytest.mark.parametrize(
    ("settings", "layout", "name", "reason"),
    [
        ({}, {"training_dtype": "float16"}, LOSS_GRADIENT, "fp16"),
        ({}, {"zero_stage": 3}, LOSS_GRADIENT, "ZeRO-3"),
        ({"use_dora": True}, {}, JOINT_LORA, "use_dora"),
        ({}, {"accumulation_steps": 1}, ONE_REDUCTION, "one micro-batch"),
    ],
)
def test_a_fast_path_that_does_not_apply_is_the_only_one_off(
    tiny_model, settings, layout, name, reason
):
    plan = make_plan(tiny_model, 2, **settings)
    reasons = fast_paths(plan.shape, plan.settings, replace(plan.layout, **layout))
    assert_mentions(reasons.pop(name), reason)
    assert not any(reasons.values())


def test_all_fast_paths_are_off_if_they_change_the_results_of_the_class(tiny_model):
    plan = make_plan(tiny_model, 2).with_proof(Proof(without_fast_paths=["differ by 1e-2"]))
    assert set(plan.fast_paths.values()) == {"differ by 1e-2"}
    assert not plan.settings.fast_paths
