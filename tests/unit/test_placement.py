"""Environment -> ranks: complete, contradictory, or none."""

import pytest

from pipeline.cluster.placement import Placement, from_environment
from pipeline.errors import UserError

DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_no_launcher_is_one_process():
    assert from_environment({"PATH": "/bin"}) == Placement()


def test_deepspeed():
    placement = from_environment(DEEPSPEED)
    assert (placement.rank, placement.local_rank, placement.nodes) == (5, 1, 2)
    assert placement.launcher == "deepspeed"
    assert placement.variables() == DEEPSPEED


def test_torchrun():
    env = DEEPSPEED | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}
    del env["LOCAL_SIZE"], env["CROSS_RANK"], env["CROSS_SIZE"]
    placement = from_environment(env)
    assert placement.launcher == "torchrun"
    assert placement.variables() == DEEPSPEED


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"RANK": None}, "RANK"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
        ({"RANK": "8"}, "below its size"),
        ({"LOCAL_RANK": "4"}, "below its size"),
        ({"WORLD_SIZE": "seven"}, "not a whole number"),
        ({"WORLD_SIZE": "7"}, "not a multiple"),
    ],
)
def test_contradictions_are_named(change, part):
    env = {key: value for key, value in (DEEPSPEED | change).items() if value is not None}
    with pytest.raises(UserError, match=part):
        from_environment(env)


@pytest.mark.parametrize("env", [{"SLURM_NTASKS": "16"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_many_lonely_processes_are_refused(env):
    with pytest.raises(UserError, match="train alone"):
        from_environment(env)
    assert from_environment(dict.fromkeys(env, "1")) == Placement()
