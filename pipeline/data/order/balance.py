"""Divide things of unequal cost evenly over ranks, as many for each. Pure.

Which numbers go together is the NP-hard part; with as many for each rank, swaps of two from many
beginnings come close, and few things are divided anew between two ranks at a time. B: beginnings,
K: things a rank, R: ranks.
"""

from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset.hashing import hashes_of

Array = npt.NDArray[np.int64]
# Beginnings tried: most for 10 to 20 things, where the best of a thousand random divisions is hard
# to beat; fewer have hardly as many divisions, and of more a single beginning ends nearly even.
_FEWEST_STARTS, _MOST_STARTS, _START_BUDGET = 4, 512, 200_000
_MOST_COMPARED = 128  # things of one rank, with all of the other
_MOST_SWAPS = 1000
# `_split` is for the few things of which random divisions are hard to beat: of one rank, in all,
# and how many of the beginnings.
_MOST_SPLIT, _FEW, _SPLIT_STARTS = 6, 36, 8
_EVEN = 1e-9  # a swap that brings two ranks closer by less of their difference is none


def divide(costs: npt.NDArray[np.float64], ranks: int) -> list[Array]:
    """For each rank the things that it gets, the costliest first.

    The highest sum of a rank lies as little above the lowest as was found. Ranks get the same
    number of things, some less where that does not come out even.
    """
    count = len(costs)
    each = -(-count // ranks)
    padded = np.append(costs, 0.0)  # `count` stands for nothing
    by_cost = np.full(each * ranks, count)
    by_cost[:count] = np.argsort(-costs, kind="stable")
    things = by_cost[_starts(each, ranks)]  # (B, K, R)
    if ranks > 1:
        _swap(things, padded, side_by_side=True)
        _swap(things, padded, side_by_side=False)
        if each <= _MOST_SPLIT and each * ranks <= _FEW:
            things = things[np.argsort(_apart(padded[things]), kind="stable")[:_SPLIT_STARTS]]
            _split(things, padded)
    best = things[_apart(padded[things]).argmin()]
    order = np.argsort(-padded[best], axis=0, kind="stable")
    best = np.take_along_axis(best, order, axis=0)
    return [best[best[:, rank] < count, rank].astype(np.int64) for rank in range(ranks)]


def _apart(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From the lowest sum of a rank to the highest, (B,), of costs (B, K, R)."""
    sums = cost.sum(axis=1)
    apart: npt.NDArray[np.float64] = sums.max(axis=1) - sums.min(axis=1)
    return apart


@lru_cache(maxsize=8)
def _starts(each: int, ranks: int) -> Array:
    """Beginnings as places in the order of cost, (B, K, R).

    Half of them give each rank one of the R costliest, one of the next R, and so on, so that what
    ranks do side by side is alike; in the first they take turns at the costlier end. The others
    are any order at all.
    """
    count = each * ranks
    wanted = min(2 * count**2, _START_BUDGET // count**2)
    starts = min(max(wanted, _FEWEST_STARTS), _MOST_STARTS)
    places = np.empty((starts, each, ranks), np.int64)
    places[:] = np.arange(count).reshape(each, ranks)
    places[0, 1::2] = places[0, 1::2, ::-1]
    keys = hashes_of(starts * count).reshape(starts, each, ranks)
    half = starts // 2
    places[1:half] = np.take_along_axis(places[1:half], keys[1:half].argsort(axis=2), axis=2)
    anyhow = keys[half:].reshape(-1, count).argsort(axis=1)
    places[half:] = anyhow.reshape(-1, each, ranks)
    return places


def _swap(things: Array, costs: npt.NDArray[np.float64], *, side_by_side: bool) -> None:
    """Swap one thing of the costliest rank with one of the cheapest, while it helps, in place.

    If only those that stand side by side are swapped, they stay as alike as they are.
    """
    cost = costs[things]  # (B, K, R)
    each, active = things.shape[1], np.arange(len(things))
    step = 1 if side_by_side else -(-each // _MOST_COMPARED)
    for _ in range(_MOST_SWAPS):
        sums = cost[active].sum(axis=1)
        high, low = sums.argmax(axis=1), sums.argmin(axis=1)
        at = np.arange(len(active))
        apart = sums[at, high] - sums[at, low]
        gains = cost[active, :, high], cost[active, ::step, low]
        if side_by_side:
            misses = np.abs(gains[0] - gains[1] - apart[:, None] / 2)
            from_high = from_low = misses.argmin(axis=1)
            left = misses[at, from_high]
        else:
            misses = np.abs(gains[0][:, :, None] - gains[1][:, None] - apart[:, None, None] / 2)
            misses = misses.reshape(len(active), -1)
            best = misses.argmin(axis=1)
            left = misses[at, best]
            from_high, place = np.divmod(best, -(-each // step))
            from_low = place * step
        helps = left < apart / 2 * (1 - _EVEN)
        active = active[helps]
        if not len(active):
            return
        one = active, from_high[helps], high[helps]
        other = active, from_low[helps], low[helps]
        for table in (things, cost):
            table[one], table[other] = table[other], table[one]


def _split(things: Array, costs: npt.NDArray[np.float64]) -> None:
    """Divide anew, as evenly as can be, what two ranks have, while it helps, in place.

    One of the two is the costliest or the cheapest rank: neither the highest sum rises nor the
    lowest falls. Where no swap of two things helps, this often does.
    """
    each, ranks = things.shape[1:]
    splits, active = _splits(each), np.arange(len(things))
    for _ in range(_MOST_SWAPS):
        cost = costs[things[active]]
        sums, at = cost.sum(axis=1), np.arange(len(active))[:, None]
        ends = np.stack([sums.argmax(axis=1), sums.argmin(axis=1)], axis=1)
        one = ends.repeat(ranks, axis=1)  # (B, 2R), each of them with every rank
        other = np.tile(np.arange(ranks), (len(active), 2))
        both = np.concatenate([cost.transpose(0, 2, 1)[at, place] for place in (one, other)], 2)
        apart = np.abs(both @ splits.T)  # (B, 2R, splits)
        best = apart.argmin(axis=2)
        before = np.abs(sums[at, one] - sums[at, other])
        after = np.take_along_axis(apart, best[:, :, None], 2)[:, :, 0]
        gains = np.where(after < before * (1 - _EVEN), before**2 - after**2, 0.0)
        pair = gains.argmax(axis=1)
        helps = gains[at[:, 0], pair] > 0
        active, pair = active[helps], pair[helps]
        if not len(active):
            return
        chosen = at[helps, 0], pair
        first, second, sides = one[chosen], other[chosen], splits[best[chosen]]
        held = np.concatenate([things[active, :, first], things[active, :, second]], axis=1)
        order = np.argsort(-sides, axis=1, kind="stable")
        held = np.take_along_axis(held, order, axis=1)
        things[active, :, first], things[active, :, second] = held[:, :each], held[:, each:]


@lru_cache(maxsize=8)
def _splits(each: int) -> npt.NDArray[np.float64]:
    """All even divisions of 2 K things between two, (ways, 2 K): 1 for one, -1 for the other."""
    ways = [(0, *rest) for rest in combinations(range(1, 2 * each), each - 1)]
    sides = np.full((len(ways), 2 * each), -1.0)
    np.put_along_axis(sides, np.array(ways), 1.0, axis=1)
    return sides
