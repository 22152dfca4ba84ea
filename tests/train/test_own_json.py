"""Accepted keys of a user's DeepSpeed JSON do not change losses, gradients and weights."""

import json

import pytest

from tests.plan.deepspeed.test_overlay import TRAINER_JSON
from tests.ranks import run_ranks
from tests.train_tiny import build_engine, distance, train_each

pytestmark = pytest.mark.engine

STEPS = 3
# Keys that change how DeepSpeed works, several in one run.
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
    """Runs at ZeRO-2 and ZeRO-3 without a JSON of the user, and with each of ACCEPTED."""
    folder = tmp_path_factory.mktemp("json")
    runs = [{"zero_stage": stage, "batch_size": 2} for stage in (2, 3)]
    for number, (stage, content) in enumerate(ACCEPTED):
        (folder / f"{number}.json").write_text(json.dumps(content))
        own = {"deepspeed_json": str(folder / f"{number}.json")}
        runs.append({"zero_stage": stage, "batch_size": 2} | own)
    return run_ranks(train_each, tiny_model, runs, STEPS, tmp_path=folder)[0]


@pytest.mark.parametrize("number", range(len(ACCEPTED)))
def test_accepted_keys_change_no_number(results, number):
    stage, _ = ACCEPTED[number]
    plain, with_json = results[stage - 2], results[2 + number]
    assert with_json["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert distance(with_json["gradients"], plain["gradients"]) < 1e-6
    assert distance(with_json["weights"], plain["weights"]) < 1e-5


def test_a_changed_optimizer_reaches_the_engine(tiny_model, tmp_path):
    json_file = tmp_path / "ds.json"
    json_file.write_text('{"optimizer": {"params": {"betas": [0.5, 0.9], "weight_decay": 0.3}}}')

    parameter_groups = run_ranks(
        groups, tiny_model, {"deepspeed_json": str(json_file)}, tmp_path=tmp_path
    )[0]
    assert parameter_groups == [((0.5, 0.9), 0.3)]


def groups(session, folder, settings):
    engine = build_engine(session, folder, settings)[1]
    parameter_groups = engine.deepspeed.optimizer.param_groups
    return [(tuple(group["betas"]), group["weight_decay"]) for group in parameter_groups]
