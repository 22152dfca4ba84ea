"""A checkpoint resumes at every other stage and world size with the same losses."""

from functools import cache
from typing import NamedTuple

import pytest

from tests.adapter.test_gather import (
    MORE,
    STEPS,
    restore_and_train,
    restore_each,
    train_and_gather,
    train_each,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.engine


class Case(NamedTuple):
    """A run, and the run that resumes from its state; `kind` is a key of KINDS."""

    world_size: int
    stage: int
    resumed_world_size: int
    resumed_stage: int
    kind: str


CASES = [
    Case(*case)
    for case in (
        # All pairs of different stages in fp32; tests/adapter/test_gather.py compares equal stages
        # bitwise. In 4 bits, three pairs suffice: the state has no tensor of the base.
        *((2, a, 2, b, "fp32") for a in (1, 2, 3) for b in (1, 2, 3) if a != b),
        *((2, a, 2, b, "nf4") for a, b in ((1, 2), (2, 3), (3, 1))),
        # other world sizes, smaller and larger
        (2, 3, 1, 2, "fp32"), (1, 2, 2, 3, "fp32"), (1, 3, 2, 1, "fp32"), (2, 3, 4, 2, "fp32"),
        (2, 2, 4, 3, "fp32"),
        (2, 3, 1, 2, "bf16"), (1, 1, 2, 3, "bf16"), (2, 2, 4, 2, "bf16"),
        (2, 2, 1, 3, "nf4"), (2, 3, 4, 1, "nf4"), (1, 3, 2, 2, "nf4"),
    )
]  # fmt: skip
KINDS = {"fp32": {}, "bf16": {"bf16": True}, "nf4": {"load_in_4bit": True}}
MAX_RELATIVE_ERROR = {"fp32": 1e-5, "nf4": 1e-5, "bf16": 2e-3}


def settings_of(stage, kind):
    return {"zero_stage": stage, "batch_size": 2} | KINDS[kind]


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """Function: case -> state and losses of the run whose state is resumed.

    The ranks start once for each world size and kind.
    """

    @cache
    def runs_by_stage(world_size, kind):
        cases = [case for case in CASES if (case.world_size, case.kind) == (world_size, kind)]
        stages = sorted({case.stage for case in cases})
        runs = [settings_of(stage, kind) for stage in stages]
        folder = tmp_path_factory.mktemp("saved")
        states = run_ranks(train_each, tiny_model, runs, tmp_path=folder, world_size=world_size)[0]
        return dict(zip(stages, states, strict=True))

    return lambda case: runs_by_stage(case.world_size, case.kind)[case.stage]


@pytest.fixture(scope="module")
def resumed(tiny_model, tmp_path_factory, saved):
    """Function: case -> the resumed run; the ranks start once for each world size and kind."""

    @cache
    def runs_by_case(world_size, kind):
        cases = [
            case for case in CASES if (case.resumed_world_size, case.kind) == (world_size, kind)
        ]
        runs = [(settings_of(case.resumed_stage, kind), saved(case)) for case in cases]
        folder = tmp_path_factory.mktemp("resumed")
        results = run_ranks(restore_each, tiny_model, runs, tmp_path=folder, world_size=world_size)[
            0
        ]
        return dict(zip(cases, results, strict=True))

    return lambda case: runs_by_case(case.resumed_world_size, case.kind)[case]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_resumed_at_another_stage_or_world_size_has_the_same_losses(saved, resumed, case):
    expected = saved(case)["losses"][STEPS:]
    assert len(expected) == MORE > 1
    assert resumed(case)["losses"] == pytest.approx(expected, rel=MAX_RELATIVE_ERROR[case.kind])


@pytest.fixture(scope="module")
def with_split_sequences(tiny_model, tmp_path_factory):
    """State and losses of a run whose two ranks share each sequence."""
    settings = {"zero_stage": 2, "batch_size": 2, "sequence_parallel_size": 2}
    folder = tmp_path_factory.mktemp("shared")
    return run_ranks(train_and_gather, tiny_model, settings, tmp_path=folder)[0]


@pytest.mark.parametrize(
    ("world_size", "sequence_parallel_size", "stage"), [(1, 1, 2), (2, 1, 3), (4, 4, 2)]
)
def test_a_run_whose_two_ranks_shared_sequences_resumes_at_any_other_sequence_parallel_size(
    tiny_model, tmp_path, with_split_sequences, world_size, sequence_parallel_size, stage
):
    saved = with_split_sequences
    settings = {
        "zero_stage": stage, "batch_size": 2, "sequence_parallel_size": sequence_parallel_size
    }  # fmt: skip
    after = run_ranks(
        restore_and_train, tiny_model, settings, saved, tmp_path=tmp_path, world_size=world_size
    )[0]
    assert after["losses"] == pytest.approx(saved["losses"][STEPS:], rel=1e-5)
