"""Gradients are reduced over ranks once a step, and not at all after a failed micro-batch."""

import deepspeed
import pytest

from tests.ranks import run_ranks
from tests.tiny import Documents
from tests.train_tiny import batches_of_step, build_engine, distance, train_tiny

pytestmark = pytest.mark.engine

REDUCING_FUNCTIONS = ("all_reduce", "reduce", "reduce_scatter_fn")  # of deepspeed.comm


class ReductionCounter:
    """Counts DeepSpeed's calls of collective operations that reduce."""

    def __init__(self):
        self.count = 0
        for name in REDUCING_FUNCTIONS:
            setattr(deepspeed.comm, name, self.counting(getattr(deepspeed.comm, name)))

    def counting(self, operation):
        """A function that counts its call and calls the operation."""

        def call(*arguments, **keywords):
            self.count += 1
            return operation(*arguments, **keywords)

        return call


def reductions(session, folder, settings):
    """Number of reductions in the backward passes of a step."""
    plan, engine = build_engine(session, folder, settings)
    batches, supervised = batches_of_step(plan, Documents(40), 0, session.placement.rank)
    engine.deepspeed.train()
    counter = ReductionCounter()
    engine.backward_passes(batches, supervised)
    return counter.count


def reductions_after_a_failure(session, folder, settings):
    """Number of reductions after the second micro-batch of a step could not be read."""
    plan, engine = build_engine(session, folder, settings)
    batches, supervised = batches_of_step(plan, Documents(40), 0, session.placement.rank)
    engine.deepspeed.train()
    counter, count_at_failure = ReductionCounter(), None

    def failing_batches():
        nonlocal count_at_failure
        yield batches[0]
        count_at_failure = counter.count
        raise OSError("cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        engine.backward_passes(failing_batches(), supervised)
    return counter.count - count_at_failure


def run_at_each_stage(session, folder):
    """ZeRO stage -> numbers of reductions, and gradients of the first step of three runs.

    The runs: in fp32; in bf16 with one reduction a step; in bf16 with one for each micro-batch.
    """
    results = {}
    for stage in (1, 2, 3):
        four_micro_batches = {"zero_stage": stage, "batch_size": 1}
        one_micro_batch = {"zero_stage": stage, "batch_size": 4}
        results[stage] = {
            "of four micro-batches": reductions(session, folder, four_micro_batches),
            "of one micro-batch": reductions(session, folder, one_micro_batch),
            "after a failure": reductions_after_a_failure(session, folder, four_micro_batches),
            "gradients": [
                train_tiny(session, folder, four_micro_batches | options, 1)["gradients"]
                for options in ({}, {"bf16": True}, {"bf16": True, "fast_paths": False})
            ],
        }
    return results


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """The results of `run_at_each_stage` by rank."""
    return run_ranks(run_at_each_stage, tiny_model, tmp_path=tmp_path_factory.mktemp("reduce"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_micro_batches_need_as_many_reductions_as_one(results, stage):
    counts = results[0][stage]
    assert counts["of four micro-batches"] == counts["of one micro-batch"] > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_reduced_after_a_failure(results, stage):
    assert [by_stage[stage]["after a failure"] for by_stage in results] == [0, 0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_reduction_in_bf16_is_as_exact_as_one_for_each_micro_batch(results, stage):
    exact, one_reduction, four_reductions = results[0][stage]["gradients"]
    # At most 10 % less exact.
    assert distance(one_reduction, exact) < 1.1 * distance(four_reductions, exact)
