"""Order and dealing, over any sizes: nothing lost, nothing twice, nobody waits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import (
    BatchShape,
    RankWork,
    deal,
    epoch_order,
    evaluation_work,
    forward_seed,
    global_batch,
)

SIZES = st.integers(1, 300)
SHAPES = st.builds(
    BatchShape,
    world_size=st.integers(1, 16),
    accumulation_steps=st.integers(1, 4),
    micro_batch_size=st.integers(1, 4),
)


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(1, 500, count)


def run_epochs(count: int, shape: BatchShape, seed: int, epochs: int) -> list[list[list]]:
    """[step][rank] -> micro-batches, through what each rank asks for by itself."""
    steps = -(-count // shape.global_batch_size) * epochs
    work = [
        RankWork(lengths_of(count), shape, seed=seed, rank=r, first_step=0, total_steps=steps)
        for r in range(shape.world_size)
    ]
    turns = shape.accumulation_steps
    assert {len(w) for w in work} == {steps * turns}
    return [[[w[s * turns + t] for t in range(turns)] for w in work] for s in range(steps)]


@given(SIZES, SHAPES, st.integers(0, 2**31), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_every_document_once_an_epoch_and_the_same_forwards_everywhere(count, shape, seed, epochs):
    seen = [
        document
        for step in run_epochs(count, shape, seed, epochs)
        for rank in step
        for micro in rank
        for document in micro.documents
    ]
    assert sorted(seen) == sorted(list(range(count)) * epochs)


@given(SIZES, st.integers(0, 2**31), st.sampled_from([8, 16, 24]))
@settings(max_examples=40, deadline=None)
def test_a_global_batch_is_the_same_set_for_every_split(count, seed, size):
    expected = None
    for ranks in (1, 2, 4):
        for micro in (1, 2):
            shape = BatchShape(
                world_size=ranks,
                accumulation_steps=size // ranks // micro,
                micro_batch_size=micro,
            )
            assert shape.global_batch_size == size
            found = [
                sorted(d for rank in step for m in rank for d in m.documents)
                for step in run_epochs(count, shape, seed, 1)
            ]
            expected = expected or found
            assert found == expected


def test_epochs_and_seeds_permute_differently_and_repeatably():
    orders = [tuple(epoch_order(1000, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(epoch_order(1000, 0, 0)) == orders[0]
    # Pinned: a run resumed after an upgrade must find the order it began with.
    assert list(epoch_order(8, 42, 0)) == PINNED


PINNED = [4, 3, 5, 0, 7, 6, 1, 2]


def test_ranks_hardly_wait_for_each_other():
    lengths = lengths_of(4096)
    shape = BatchShape(world_size=8, accumulation_steps=4, micro_batch_size=2)
    dealt, drawn = [], []
    for step in range(64):
        documents = global_batch(step, num_documents=4096, seed=0, global_batch_size=64)
        work = deal(documents, lengths, shape)
        dealt.append([[max(lengths[list(m.documents)]) for m in rank] for rank in work])
        drawn.append(lengths[documents].reshape(8, 4, 2).max(axis=2))

    def waited(costs) -> float:
        """Share of the time that ranks wait for the longest micro-batch beside theirs."""
        costs = np.array(costs)  # (step, rank, turn)
        return 1 - costs.mean(axis=1).sum() / costs.max(axis=1).sum()

    assert waited(dealt) < 0.7 * waited(drawn)


@given(SIZES, st.integers(1, 16), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_evaluation_sees_every_document_once(count, ranks, micro):
    work = evaluation_work(lengths_of(count), world_size=ranks, micro_batch_size=micro)
    assert len({len(rank) for rank in work}) == 1
    seen = sorted(d for rank in work for m in rank for d in m.documents)
    assert seen == list(range(count))


def test_seeds_of_forwards_do_not_meet():
    seeds = {forward_seed(s, t, f) for s in range(3) for t in range(50) for f in range(50)}
    assert len(seeds) == 3 * 50 * 50
