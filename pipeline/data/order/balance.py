"""Balanced number partitioning with equal cardinality: divide items by cost over ranks."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
_MAX_SWAPS = 1000
# Costs are converted to integers, the largest to this one: integer sums are equal on every CPU.
_LARGEST_COST = 2.0**32


def divide(costs: npt.NDArray[np.float64], ranks: int) -> list[Array]:
    """Indices of the items of each rank, costliest first; at most ceil(items / ranks) per rank.

    A pure function. `costs`: (items,).

    The greedy phase assigns the costliest remaining item to the rank with the lowest sum, among the
    ranks that are not full. The local search then swaps two items between the ranks with the
    highest and the lowest sum, as long as a swap reduces the difference of the two sums.
    """
    count = len(costs)
    per_rank = -(-count // ranks)
    # Indices from `count` on are padding without cost, so that every rank gets `per_rank` items.
    scaled = np.zeros(per_rank * ranks, np.int64)
    largest = max(costs.max(initial=0.0), 1e-300)  # avoids a division by 0
    scaled[:count] = np.rint(costs * (_LARGEST_COST / largest))
    items = np.empty((ranks, per_rank), np.int64)  # indices of each rank's items
    sums, sizes = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for item in np.argsort(-scaled, kind="stable"):
        rank = np.where(sizes < per_rank, sums, np.iinfo(np.int64).max).argmin()
        items[rank, sizes[rank]] = item
        sums[rank] += scaled[item]
        sizes[rank] += 1
    for _ in range(_MAX_SWAPS):
        high, low = sums.argmax(), sums.argmin()
        difference = sums[high] - sums[low]
        # (i, j): difference of the sums if item i of `high` and item j of `low` are swapped.
        swapped = np.abs(difference - 2 * (scaled[items[high]][:, None] - scaled[items[low]]))
        i, j = np.unravel_index(swapped.argmin(), swapped.shape)
        if swapped[i, j] >= difference:
            break
        items[high, i], items[low, j] = items[low, j], items[high, i]
        sums[high] = scaled[items[high]].sum()
        sums[low] = scaled[items[low]].sum()
    items = np.take_along_axis(items, np.argsort(-scaled[items], axis=1, kind="stable"), axis=1)
    return [row[row < count] for row in items]
