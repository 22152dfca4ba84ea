"""Gradients are reduced once a step, in fp32, and not at all after a failure."""

import deepspeed
import pytest

from tests.ranks import run_ranks
from tests.tiny import Documents
from tests.train_tiny import build_engine, distance, train_tiny, work

pytestmark = pytest.mark.engine

COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_fn")


class Collectives:
    """Counts DeepSpeed's calls of collective operations that reduce."""

    def __init__(self):
        self.count = 0
        for name in COLLECTIVES:
            setattr(deepspeed.comm, name, self.counted(getattr(deepspeed.comm, name)))

    def counted(self, operation):
        """The operation, counted."""

        def call(*arguments, **keywords):
            self.count += 1
            return operation(*arguments, **keywords)

        return call


def reductions(session, folder, settings):
    """Collectives in the backward passes of a step."""
    plan, engine = build_engine(session, folder, settings)
    batches, supervised = work(plan, Documents(40), 0, session.placement.rank)
    engine.deepspeed.train()
    collectives = Collectives()
    engine.backward_passes(batches, supervised)
    return collectives.count


def reductions_after_a_failure(session, folder, settings):
    """Collectives after a micro-batch that could not be read."""
    plan, engine = build_engine(session, folder, settings)
    batches, supervised = work(plan, Documents(40), 0, session.placement.rank)
    engine.deepspeed.train()
    collectives, before = Collectives(), None

    def failing():
        nonlocal before
        yield batches[0]
        before = collectives.count
        raise OSError("cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        engine.backward_passes(failing(), supervised)
    return collectives.count - before


def run_at_each_stage(session, folder):
    """By stage: numbers of reductions; gradients of the first step, reduced in fp32 and in bf16."""
    return {
        stage: {
            "four": reductions(session, folder, {"zero_stage": stage, "batch_size": 1}),
            "one": reductions(session, folder, {"zero_stage": stage, "batch_size": 4}),
            "failed": reductions_after_a_failure(
                session, folder, {"zero_stage": stage, "batch_size": 1}
            ),
            "gradients": [
                train_tiny(
                    session, folder, {"zero_stage": stage, "batch_size": 1} | options, 1
                )["gradients"]
                for options in ({}, {"bf16": True}, {"bf16": True, "fast_paths": False})
            ],
        }
        for stage in (1, 2, 3)
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    """The results of `run_at_each_stage` by rank."""
    return run_ranks(run_at_each_stage, tiny_model, tmp_path=tmp_path_factory.mktemp("reduce"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_micro_batches_need_as_many_reductions_as_one(results, stage):
    assert results[0][stage]["four"] == results[0][stage]["one"] > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_reduced_after_a_failure(results, stage):
    assert [by_stage[stage]["failed"] for by_stage in results] == [0, 0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_reduction_in_bf16_is_as_exact_as_one_for_each_micro_batch(results, stage):
    exact, once, often = results[0][stage]["gradients"]
    assert distance(once, exact) < 1.1 * distance(often, exact)
