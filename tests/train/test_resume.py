"""A checkpoint resumes at every other stage and world size with the same losses."""

import pytest

from tests.adapter.test_gather import MORE, STEPS, restore_and_train, train_and_gather
from tests.ranks import run_ranks

pytestmark = pytest.mark.engine

FP32, BF16, NF4 = {}, {"bf16": True}, {"load_in_4bit": True}
MAX_RELATIVE_ERROR = {"float32": 1e-5, "bfloat16": 2e-3}


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A function that returns the state of a run: stage, world size, kind; cached."""
    states = {}

    def at(stage: int, world_size: int, kind: dict):
        key = (stage, world_size, *kind)
        if key not in states:
            settings = {"zero_stage": stage, "batch_size": 1} | kind
            folder = tmp_path_factory.mktemp("saved")
            states[key] = run_ranks(
                train_and_gather, tiny_model, settings, tmp_path=folder, world_size=world_size
            )[0]
        return states[key]

    return at


CASES = [
    # all pairs of different stages; test_gather.py compares equal stages bitwise
    *((2, a, 2, b, kind) for kind in (FP32, NF4) for a in (1, 2, 3) for b in (1, 2, 3) if a != b),
    # other world sizes, smaller and larger
    (2, 3, 1, 2, FP32), (1, 2, 2, 3, FP32), (1, 3, 2, 1, FP32), (2, 3, 4, 2, FP32),
    (2, 2, 4, 3, FP32),
    (2, 3, 1, 2, BF16), (1, 1, 2, 3, BF16), (2, 2, 4, 2, BF16),
    (2, 2, 1, 3, NF4), (2, 3, 4, 1, NF4), (1, 3, 2, 2, NF4),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "stage", "new_size", "new_stage", "kind"), CASES)
def test_a_run_resumed_at_another_stage_or_size_has_the_same_losses(
    tiny_model, tmp_path, saved, world_size, stage, new_size, new_stage, kind
):
    before = saved(stage, world_size, kind)
    settings = {"zero_stage": new_stage, "batch_size": 1} | kind
    after = run_ranks(
        restore_and_train, tiny_model, settings, before, tmp_path=tmp_path, world_size=new_size
    )[0]
    expected = before["losses"][STEPS:]
    assert len(expected) == MORE > 1
    dtype = "bfloat16" if kind == BF16 else "float32"
    assert after["losses"] == pytest.approx(expected, rel=MAX_RELATIVE_ERROR[dtype])


# Ranks, ranks that share each sequence, and stage of the resumed run.
@pytest.mark.parametrize(("world_size", "size", "stage"), [(1, 1, 2), (2, 1, 3), (4, 4, 2)])
def test_a_run_that_shared_sequences_between_two_ranks_resumes_at_any_other_size(
    tiny_model, tmp_path, saved, world_size, size, stage
):
    before = saved(2, 2, {"sequence_parallel_size": 2})
    settings = {"zero_stage": stage, "batch_size": 1, "sequence_parallel_size": size}
    after = run_ranks(
        restore_and_train, tiny_model, settings, before, tmp_path=tmp_path, world_size=world_size
    )[0]
    assert after["losses"] == pytest.approx(before["losses"][STEPS:], rel=1e-5)
