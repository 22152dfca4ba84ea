"""Sources take turns, so that of each the same share is done with at any time. Pure.

Shares are of supervised tokens. A group is what is done at once: a pack, or without packing the
documents of a global batch. N: groups, G: sequences of one.
"""

from heapq import heapify, heappop, heappush

import numpy as np

from pipeline.data.dataset.sequences import Integers, Sequences


def take_turns(streams: list[Integers], supervised: Integers) -> Integers:
    """Sequences of all streams, each (N, G), the groups of a stream in the order they have there.

    The two smallest streams are made one, and so on (Huffman, 1952). In two, groups are sorted by
    the share of their own stream that is done half-way in them, so that neither is ever further
    from its share than half of the largest group. A stream counts for at most all, all, 1/2, 1/3,
    1/5, ... of those it becomes a part of, which adds up to less than 1.7 of the largest group.
    """
    groups = np.concatenate(streams)
    counts = supervised[groups].sum(axis=1)
    ends = np.cumsum([len(stream) for stream in streams])
    places = [part for part in np.split(np.arange(len(groups)), ends[:-1]) if len(part)]
    heap = [(int(counts[part].sum()), number, part) for number, part in enumerate(places)]
    heapify(heap)
    for number in range(len(places), 2 * len(places) - 1):
        two = heappop(heap), heappop(heap)
        half_way = [(np.cumsum(counts[part]) - counts[part] / 2) / total for total, _, part in two]
        order = np.argsort(np.concatenate(half_way), kind="stable")  # two sorted runs: linear
        both = np.concatenate([part for _, _, part in two])[order]
        heappush(heap, (two[0][0] + two[1][0], number, both))
    return groups[heap[0][2]].reshape(-1) if heap else groups.reshape(-1)


def spread_sources(groups: Integers, sequences: Sequences) -> Integers:
    """Groups of several sources, (N, G), in an order in which each keeps near its share of them.

    The next one is that after which the source furthest from its share is least so. That is N
    steps over at most N groups and all sources: for few groups.
    """
    first = np.array(sorted((part.start, part.source) for part in sequences.rounds)).reshape(-1, 2)
    source = first[np.searchsorted(first[:, 0], groups, side="right") - 1, 1]
    done = np.zeros((len(groups), int(first[:, 1].max(initial=0)) + 1))
    np.add.at(done, (np.arange(len(groups))[:, None], source), sequences.supervised[groups])
    shares = done.sum(axis=0) / max(done.sum(), 1)
    moves = done - done.sum(axis=1, keepdims=True) * shares
    left, off, order = np.arange(len(groups)), np.zeros(len(shares)), []
    while len(left):
        best = np.abs(off + moves[left]).max(axis=1).argmin()
        off = off + moves[left[best]]
        order.append(left[best])
        left = np.delete(left, best)
    return groups[np.array(order, np.int64)]
