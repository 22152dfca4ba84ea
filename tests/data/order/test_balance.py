"""Partition of a step over ranks: each sequence is assigned once, with nearly equal costs.

The cost of a sequence is its FLOPs. Every rank gets the same number of sequences.
"""

from math import ceil

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

    `costs`: the last axes are rank and accumulation step. In an accumulation step each rank has one
    micro-batch, and the costliest determines the time of all.
    """
    return 1 - costs.mean(axis=-2).sum(axis=-1) / costs.max(axis=-2).sum(axis=-1)


@pytest.mark.parametrize("flops", [SMALL, ATTENTIVE], ids=["small", "attentive"])
@pytest.mark.parametrize(
    ("ranks", "accumulation_steps", "micro_batch_size"),
    [(2, 4, 1), (2, 2, 2), (3, 4, 1), (4, 4, 1), (4, 2, 4), (8, 4, 1), (8, 8, 2), (64, 4, 1)],
)
def test_costs_of_ranks_are_more_equal_than_those_of_random_partitions(
    ranks, accumulation_steps, micro_batch_size, flops
):
    """Compare each step with 1000 random partitions of the same global batch."""
    sequences, random = gsm8k(packing=True), np.random.default_rng(0)
    layout = BatchLayout(
        data_parallel_size=ranks,
        accumulation_steps=accumulation_steps,
        micro_batch_size=micro_batch_size,
        flops=flops,
    )
    size, costs = layout.global_batch_size, costs_of(sequences, flops)
    spreads, random_spreads, waits, random_waits = [], [], [], []
    for step in range(min(20, sequences.per_epoch // size)):
        batch = global_batch(step, sequences, seed=0, global_batch_size=size)
        costs_of_step = np.array(
            [
                [costs[list(micro_batch.sequences)].sum() for micro_batch in rank]
                for rank in partition(batch, sequences, layout)
            ]
        )
        random_orders = random.random((1000, size)).argsort(axis=1)
        random_costs = (
            costs[batch][random_orders]
            .reshape(1000, ranks, accumulation_steps, micro_batch_size)
            .sum(axis=3)
        )
        spreads.append(spread(costs_of_step.sum(axis=1)))
        random_spreads.append(np.median(spread(random_costs.sum(axis=2))))
        waits.append(waiting_share(costs_of_step))
        random_waits.append(np.median(waiting_share(random_costs)))
    assert np.median(spreads) < 0.25 * np.median(random_spreads)
    assert np.mean(waits) < 0.7 * np.mean(random_waits)


@given(
    st.integers(2, 6),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.sampled_from(["nearly equal", "skewed", "four values"]),
)
@settings(max_examples=80, deadline=None)
def test_no_swap_between_the_costliest_and_cheapest_rank_reduces_their_difference(
    ranks, items_per_rank, seed, distribution
):
    """It follows that their sums differ by at most the range of the items' costs."""
    random = np.random.default_rng(seed)
    count = ranks * items_per_rank
    costs = {
        "nearly equal": 1 + 0.1 * random.random(count),
        "skewed": random.lognormal(0, 1, count),
        "four values": random.integers(1, 5, count).astype(float),
    }[distribution]
    parts = divide(costs, ranks)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert {len(part) for part in parts} == {items_per_rank}
    assert all((np.diff(costs[part]) <= 0).all() for part in parts)  # costliest item first
    sums = np.array([costs[part].sum() for part in parts])
    of_costliest, of_cheapest = (costs[parts[rank]] for rank in (sums.argmax(), sums.argmin()))
    difference = sums.max() - sums.min()
    rounding = 1e-6
    assert difference <= costs.max() - costs.min() + rounding
    # A swap of an item of each rank changes both sums, and so their difference twice.
    after_each_swap = np.abs(difference - 2 * (of_costliest[:, None] - of_cheapest))
    assert after_each_swap.min() >= difference * (1 - rounding)


@given(st.integers(1, 40), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_items_that_cannot_be_divided_equally_are_all_assigned(count, ranks):
    costs = np.random.default_rng(count).random(count)
    parts = divide(costs, ranks)
    assert len(parts) == ranks
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert max(map(len, parts)) <= ceil(count / ranks)


def test_thousands_of_items_are_divided_evenly():
    costs = np.random.default_rng(0).lognormal(0, 1, 2000)
    parts = divide(costs, 2)
    assert sorted(i for part in parts for i in part) == list(range(2000))
    assert spread(np.array([costs[part].sum() for part in parts])) < 1e-5
