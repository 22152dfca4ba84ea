"""Accepted keys of a user's DeepSpeed JSON do not change losses, gradients and weights."""

import json

import pytest

from tests.plan.deepspeed.test_overlay import TRAINER_JSON
from tests.ranks import run_ranks
from tests.train_tiny import build_engine, distance, train_each

pytestmark = pytest.mark.engine

STEPS = 3
# ZeRO stage, and content of a user's DeepSpeed JSON. The keys change how DeepSpeed works; the
# bucket sizes are so small that the tiny model needs several buckets.
ACCEPTED = [
    (
        2,
        {
            "zero_optimization": {
                "contiguous_gradients": False, "reduce_scatter": False,
                "allgather_partitions": False, "parameter_alignment": True,
                "reduce_bucket_size": 600, "allgather_bucket_size": 600,
            },
            "wall_clock_breakdown": True, "comms_logger": {"enabled": True},
        },
    ),
    (
        3,
        {
            "zero_optimization": {
                "sub_group_size": 500, "stage3_allgather_sequential": True, "overlap_comm": False,
                "stage3_param_persistence_threshold": 0, "enable_sanity_checks": True,
            },
        },
    ),
    (3, TRAINER_JSON),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """Results without a user's JSON by ZeRO stage, and results with each of ACCEPTED."""
    folder = tmp_path_factory.mktemp("json")
    runs = [{"zero_stage": stage, "batch_size": 2} for stage in (2, 3)]
    for index, (stage, content) in enumerate(ACCEPTED):
        path = folder / f"{index}.json"
        path.write_text(json.dumps(content))
        runs.append({"zero_stage": stage, "batch_size": 2, "deepspeed_json": str(path)})
    zero2, zero3, *with_json = run_ranks(train_each, tiny_model, runs, STEPS, tmp_path=folder)[0]
    return {2: zero2, 3: zero3}, with_json


@pytest.mark.parametrize("index", range(len(ACCEPTED)))
def test_accepted_keys_change_no_number(results, index):
    stage, _ = ACCEPTED[index]
    plain_by_stage, all_with_json = results
    plain, with_json = plain_by_stage[stage], all_with_json[index]
    assert with_json["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert distance(with_json["gradients"], plain["gradients"]) < 1e-6
    assert distance(with_json["weights"], plain["weights"]) < 1e-5


def test_a_changed_optimizer_reaches_the_engine(tiny_model, tmp_path):
    json_file = tmp_path / "ds.json"
    json_file.write_text('{"optimizer": {"params": {"betas": [0.5, 0.9], "weight_decay": 0.3}}}')
    settings = {"deepspeed_json": str(json_file)}
    of_groups = run_ranks(betas_and_weight_decays, tiny_model, settings, tmp_path=tmp_path)[0]
    assert of_groups == [((0.5, 0.9), 0.3)]


def betas_and_weight_decays(session, folder, settings):
    """Adam's betas and weight decay in each parameter group of the engine."""
    engine = build_engine(session, folder, settings)[1]
    parameter_groups = engine.deepspeed.optimizer.param_groups
    return [(tuple(group["betas"]), group["weight_decay"]) for group in parameter_groups]
