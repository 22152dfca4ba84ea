"""Training steps of a rank: those of its group, each document once, and the rest after a resume."""

from collections import Counter

import pytest
import torch

from pipeline.data.order.steps import training_steps
from tests.tiny import Documents, make_plan

pytestmark = pytest.mark.tensor


def batches_of_rank(tiny_model, rank, *, num_ranks, group_size):
    """Batches and seeds of a rank's first two steps."""
    settings = {"batch_size": 2, "sequence_parallel_size": group_size, "max_steps": 2}
    plan = make_plan(tiny_model, num_ranks, 40, **settings)
    steps = training_steps(plan, Documents(40), rank=rank, first_step=0)
    return [seeded_batch for step in steps for seeded_batch in step.batches]


@pytest.mark.parametrize("group", [0, 1])
def test_ranks_of_a_group_have_the_batches_of_one_rank_and_different_seeds(tiny_model, group):
    """Compare groups of two ranks with the rank of the same index in a run without groups."""
    without_groups = batches_of_rank(tiny_model, group, num_ranks=2, group_size=1)
    first_rank, second_rank = (
        batches_of_rank(tiny_model, 2 * group + rank_in_group, num_ranks=4, group_size=2)
        for rank_in_group in range(2)
    )
    assert len(without_groups) == 2 * 2
    for alone, first, second in zip(without_groups, first_rank, second_rank, strict=True):
        assert torch.equal(first.batch.input_ids, alone.batch.input_ids)
        assert torch.equal(second.batch.input_ids, alone.batch.input_ids)
        assert first.seed == alone.seed != second.seed


def test_the_ranks_of_an_epoch_have_together_each_document_once(tiny_model):
    plan = make_plan(tiny_model, 2, 40, batch_size=2, max_steps=5)
    documents, trained = Documents(40), Counter()
    for rank in range(2):
        for step in training_steps(plan, documents, rank=rank, first_step=0):
            for each in step.batches:
                rows = each.batch.input_ids.tolist()
                trained.update(
                    tuple(token for token in row if token) for row in rows
                )  # 0 is padding
    assert trained == Counter(tuple(documents.document(i)[0].tolist()) for i in range(40))


@pytest.mark.parametrize("first_step", [1, 5, 9])
def test_a_resumed_run_has_the_remaining_steps_of_the_uninterrupted_run(tiny_model, first_step):
    """An epoch has 5 steps, so the steps cross into the second epoch."""
    plan = make_plan(tiny_model, 2, 40, batch_size=2, max_steps=10)

    def steps_from(first):
        steps = training_steps(plan, Documents(40), rank=1, first_step=first)
        return [
            (step.index, step.size, [(each.seed, each.batch.input_ids) for each in step.batches])
            for step in steps
        ]

    whole, resumed = steps_from(0)[first_step:], steps_from(first_step)
    assert len(whole) == len(resumed) == 10 - first_step
    for (index, size, batches), (resumed_index, resumed_size, resumed_batches) in zip(
        whole, resumed, strict=True
    ):
        assert (resumed_index, resumed_size) == (index, size)
        for (seed, ids), (resumed_seed, resumed_ids) in zip(batches, resumed_batches, strict=True):
            assert resumed_seed == seed
            assert torch.equal(resumed_ids, ids)
