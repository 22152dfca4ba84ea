"""Partition of a step: each item is assigned once, with equal counts and nearly equal costs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.balance import divide
from pipeline.data.order.order import BatchLayout, global_batch, partition
from tests.data.order.test_order import ATTENTIVE, SMALL, gsm8k

pytestmark = pytest.mark.tensor


def costs_of(sequences, flops):
    return (
        flops.per_token * sequences.tokens
        + flops.per_square * sequences.squares
        + flops.per_logit * sequences.supervised
    )


def spread(costs):
    """Difference of the highest and the lowest cost of a rank (last axis), relative to the mean."""
    return (costs.max(axis=-1) - costs.min(axis=-1)) / costs.mean(axis=-1)


def waiting_share(costs):
    """Fraction of time that ranks wait for the costliest of the micro-batches that run together.

    `costs`: last axes are rank and turn; a turn is one micro-batch on each rank.
    """
    return 1 - costs.mean(axis=-2).sum(axis=-1) / costs.max(axis=-2).sum(axis=-1)


@pytest.mark.parametrize("flops", [SMALL, ATTENTIVE], ids=["small", "attentive"])
@pytest.mark.parametrize(
    ("ranks", "turns", "micro"),
    [(2, 4, 1), (2, 2, 2), (3, 4, 1), (4, 4, 1), (4, 2, 4), (8, 4, 1), (8, 8, 2), (64, 4, 1)],
)
def test_costs_of_ranks_are_more_equal_than_those_of_random_partitions(ranks, turns, micro, flops):
    sequences, random = gsm8k(packing=True), np.random.default_rng(0)
    shape = BatchLayout(
        data_parallel_size=ranks, accumulation_steps=turns, micro_batch_size=micro, flops=flops
    )
    size, costs = shape.global_batch_size, costs_of(sequences, flops)
    spreads, random_spreads, waits, random_waits = [], [], [], []
    for step in range(min(20, sequences.per_epoch // size)):
        batch = global_batch(step, sequences, seed=0, global_batch_size=size)
        divided = [[list(m.sequences) for m in r] for r in partition(batch, sequences, shape)]
        each = np.array([[costs[chosen].sum() for chosen in rank] for rank in divided])
        order = random.random((1000, size)).argsort(axis=1)
        drawn = costs[batch][order].reshape(1000, ranks, turns, micro).sum(axis=3)
        spreads.append(spread(each.sum(axis=1)))
        random_spreads.append(np.median(spread(drawn.sum(axis=2))))
        waits.append(waiting_share(each))
        random_waits.append(np.median(waiting_share(drawn)))
    assert np.median(spreads) < 0.25 * np.median(random_spreads)
    assert np.mean(waits) < 0.7 * np.mean(random_waits)


@given(
    st.integers(2, 6),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.sampled_from(["even", "skewed", "few"]),
)
@settings(max_examples=80, deadline=None)
def test_no_swap_between_the_costliest_and_cheapest_rank_reduces_their_difference(
    ranks, each, seed, kind
):
    """It follows that their sums differ by at most the range of the items' costs."""
    random = np.random.default_rng(seed)
    count = ranks * each
    costs = {
        "even": 1 + 0.1 * random.random(count),
        "skewed": random.lognormal(0, 1, count),
        "few": random.integers(1, 5, count).astype(float),
    }[kind]
    parts = divide(costs, ranks)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert {len(part) for part in parts} == {each}
    assert all((np.diff(costs[part]) <= 0).all() for part in parts)
    sums = np.array([costs[part].sum() for part in parts])
    high, low = (costs[parts[rank]] for rank in (sums.argmax(), sums.argmin()))
    difference = sums.max() - sums.min()
    assert difference <= costs.max() - costs.min() + 1e-6
    swapped = np.abs(difference - 2 * (high[:, None] - low))
    assert swapped.min() >= difference * (1 - 1e-6)


@given(st.integers(1, 40), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_items_that_cannot_be_divided_equally_are_all_assigned(count, ranks):
    costs = np.random.default_rng(count).random(count)
    parts = divide(costs, ranks)
    assert len(parts) == ranks
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert max(map(len, parts)) <= -(-count // ranks)


def test_thousands_of_items_are_divided_evenly():
    costs = np.random.default_rng(0).lognormal(0, 1, 2000)
    parts = divide(costs, 2)
    assert sorted(i for part in parts for i in part) == list(range(2000))
    assert spread(np.array([costs[part].sum() for part in parts])) < 1e-5
