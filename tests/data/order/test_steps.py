"""Ranks that share sequences have the same batches, and together those of a run without groups."""

import pytest
import torch

from pipeline.data.order.steps import training_steps
from tests.tiny import Documents, make_plan

pytestmark = pytest.mark.tensor


def work_of(tiny_model, rank, ranks, size):
    """Batches and seeds of a rank's first two steps."""
    keys = {"batch_size": 2, "sequence_parallel_size": size, "max_steps": 2}
    plan = make_plan(tiny_model, ranks, 40, **keys)
    steps = training_steps(plan, Documents(40), rank=rank, first_step=0)
    return [item for step in steps for item in step.batches]


def test_ranks_of_a_group_have_the_batches_of_one_rank_and_different_seeds(tiny_model):
    for group in range(2):
        alone = work_of(tiny_model, group, 2, 1)
        first, second = (work_of(tiny_model, 2 * group + place, 4, 2) for place in range(2))
        assert len(alone) == 2 * 2
        for own, one, other in zip(alone, first, second, strict=True):
            assert torch.equal(one.batch.input_ids, own.batch.input_ids)
            assert torch.equal(other.batch.input_ids, own.batch.input_ids)
            assert one.seed == own.seed != other.seed
