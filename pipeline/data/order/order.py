"""Data order: (seed, epoch) -> order of sequences; (step, rank) -> a rank's micro-batches.

A sequence is a pack (several documents in one sequence) or, without packing, a single document. All
functions are pure. The k-th global batch contains the same sequences for all combinations of ranks,
micro-batch size and accumulation steps whose product is the global batch size. Every rank has the
same number of micro-batches in every step: the short last step of an epoch is filled with empty
ones, so that DeepSpeed's accumulation always completes. Array shapes: N groups, G sequences per
group.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset.hashing import hash_of, hashes_of, permutation
from pipeline.data.dataset.sequences import Integers, Sequences, StepSize
from pipeline.data.order.balance import divide
from pipeline.plan.cost.per_token import SequenceFlops

# Without packing, the lengths in a group of up to _LENGTH_GROUP_SIZE documents differ by a factor
# of about 1 + _LENGTH_GROUP_WIDTH.
_LENGTH_GROUP_SIZE, _LENGTH_GROUP_WIDTH = 256, 0.1
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """Division of a global batch over ranks and micro-batches, balanced by `flops`.

    `data_parallel_size`: number of ranks; the ranks of a sequence-parallel group count as one.
    """

    data_parallel_size: int
    accumulation_steps: int
    micro_batch_size: int
    flops: SequenceFlops

    @property
    def global_batch_size(self) -> int:
        """Sequences per step."""
        return self.data_parallel_size * self.accumulation_steps * self.micro_batch_size


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass on one rank.

    `first`: offset of the first one in the global batch.
    """

    sequences: tuple[int, ...]
    first: int


@lru_cache(maxsize=2)
def epoch_order(sequences: Sequences, *, seed: int, epoch: int, global_batch_size: int) -> Integers:
    """Indices of the sequences of an epoch in order, each repeated as often as its segment says.

    Packs are shuffled. Without packing, documents of similar length form a global batch, and the
    global batches are shuffled. Documents of a source that do not fill a global batch are pooled
    with those of other sources; the remaining ones form the short last step of the epoch. Sources
    are interleaved.
    """
    size = 1 if sequences.are_packs else global_batch_size
    streams: dict[int, list[Integers]] = defaultdict(list)  # source -> its groups, each (N, G)
    remaining = [np.zeros(0, np.int64)]
    for segment in sequences.segments:
        for repeat in range(segment.repeats):
            hash_inputs = (seed, epoch, segment.start, repeat)
            shuffled = segment.start + permutation(segment.end - segment.start, *hash_inputs)
            groups, without_group = _groups(shuffled, sequences, size, hash_inputs)
            streams[segment.source].append(groups)
            remaining.append(without_group)
    pooled, hash_inputs = np.concatenate(remaining), (seed, epoch, len(sequences.tokens), 0)
    mixed_groups, last_step = _groups(
        pooled[permutation(len(pooled), *hash_inputs)], sequences, size, hash_inputs
    )
    groups_of_sources = [np.concatenate(groups) for groups in streams.values()]
    interleaved = interleave([*groups_of_sources, mixed_groups], sequences.supervised)
    return np.append(interleaved, last_step)


def _groups(
    shuffled: Integers, sequences: Sequences, size: int, hash_inputs: Sequence[int]
) -> tuple[Integers, Integers]:
    """Groups of `size` sequences, (N, G), and the sequences that do not fill a group.

    If `size` is above 1, sequences of similar length form a group. Noise is added to the log
    lengths before sorting, so that the groups differ between epochs; `hash_inputs` are its seed.
    The noise is larger for groups of more than _LENGTH_GROUP_SIZE sequences, so that a step has
    short and long documents. Sorting within the group still gives micro-batches of similar lengths.
    """
    if size == 1:
        return shuffled[:, None], shuffled[:0]
    num_grouped = len(shuffled) - len(shuffled) % size
    grouped, remaining = shuffled[:num_grouped], shuffled[num_grouped:]
    width = _LENGTH_GROUP_WIDTH * max(1.0, size / _LENGTH_GROUP_SIZE)
    noise = hashes_of(num_grouped, *hash_inputs, 1) / 2.0**64
    # Rounded: the last bits of a logarithm differ between CPUs, but all ranks need the same order.
    keys = np.round(np.log(sequences.tokens[grouped]), 6) + width * noise
    groups = grouped[np.argsort(keys, kind="stable")].reshape(-1, size)
    return groups[permutation(len(groups), *hash_inputs, 2)], remaining


def interleave(streams: list[Integers], supervised: Integers) -> Integers:
    """Interleave streams of groups, each (N, G), so that all progress at the same rate.

    A group's sort key is the fraction of its stream's supervised tokens that come before a point in
    the group, such as its middle. The point differs between streams (multiples of the golden
    ratio), so that streams of one group each are spread over the epoch. For up to a thousand
    streams, the deviation of a stream from its share is at most (streams + 2) / 2 times the largest
    group (docs/data.md).
    """
    streams = [stream for stream in streams if len(stream)]
    if not streams:
        return np.zeros(0, np.int64)
    fractions = []
    for number, stream in enumerate(streams):
        counts = supervised[stream].sum(axis=1)
        after_point = (number + 0.5) * _GOLDEN_RATIO % 1  # fraction of the group after the point
        fractions.append((np.cumsum(counts) - after_point * counts) / counts.sum())
    order = np.argsort(np.concatenate(fractions), kind="stable")
    return np.concatenate(streams)[order].reshape(-1)


def global_batch(step: int, sequences: Sequences, *, seed: int, global_batch_size: int) -> Integers:
    """Sequences of the step with index `step`, which counts from 0 over all epochs."""
    steps_per_epoch = -(-sequences.per_epoch // global_batch_size)  # rounded up
    epoch, step_of_epoch = divmod(step, steps_per_epoch)
    start = step_of_epoch * global_batch_size
    order = epoch_order(sequences, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
    return order[start : start + global_batch_size]


def partition(batch: Integers, sequences: Sequences, layout: BatchLayout) -> list[list[MicroBatch]]:
    """The micro-batches of each rank for one global batch, costliest first.

    The ranks' total costs are nearly equal. Every rank starts with its costliest micro-batch, so
    that micro-batches that run at the same time have similar costs. Packs are assigned to ranks one
    by one. Documents are assigned as micro-batches of similar lengths.
    """
    return [
        _micro_batches(groups, rank, sequences, layout)
        for rank, groups in enumerate(_rank_groups(batch, sequences, layout))
    ]


def _rank_groups(
    batch: Integers, sequences: Sequences, layout: BatchLayout
) -> list[list[Integers]]:
    """For each rank its packs, as groups of one, or its micro-batches of documents."""
    by_length = batch[np.lexsort((batch, -sequences.tokens[batch]))]
    size = 1 if sequences.are_packs else layout.micro_batch_size
    groups = [by_length[first : first + size] for first in range(0, len(batch), size)]
    divided = divide(_costs(groups, sequences, layout.flops), layout.data_parallel_size)
    return [[groups[i] for i in indices] for indices in divided]


def _micro_batches(
    groups: list[Integers], rank: int, sequences: Sequences, layout: BatchLayout
) -> list[MicroBatch]:
    """A rank's micro-batches, filled up with empty ones.

    `groups`: the rank's packs or micro-batches of documents. Packs are combined to micro-batches of
    nearly equal costs.
    """
    size = layout.micro_batch_size
    if sequences.are_packs and size > 1 and groups:
        packs = np.concatenate(groups)
        num_micro_batches = -(-len(packs) // size)  # rounded up
        divided = divide(_costs(groups, sequences, layout.flops), num_micro_batches)
        groups = [packs[indices] for indices in divided]
        costs = _costs(groups, sequences, layout.flops)
        groups = [groups[i] for i in np.argsort(-costs, kind="stable")]
    empty = [np.zeros(0, np.int64)] * (layout.accumulation_steps - len(groups))
    return [
        MicroBatch(tuple(group.tolist()), (number * layout.data_parallel_size + rank) * size)
        for number, group in enumerate([*groups, *empty])
    ]


def _costs(
    groups: list[Integers], sequences: Sequences, flops: SequenceFlops
) -> npt.NDArray[np.float64]:
    """FLOPs of each group of sequences; documents are padded to the longest of their group."""
    indices, sizes = np.concatenate(groups), np.array([len(group) for group in groups])
    starts = np.cumsum(sizes) - sizes
    tokens, squares = sequences.tokens[indices], sequences.squares[indices]
    if not sequences.are_packs:
        tokens = np.repeat(np.maximum.reduceat(tokens, starts), sizes)
        squares = tokens**2
    costs = (
        flops.per_token * tokens
        + flops.per_square * squares
        + flops.per_logit * sequences.supervised[indices]
    )
    summed: npt.NDArray[np.float64] = np.add.reduceat(costs, starts)
    return summed


class HasSequences(Protocol):
    """A prepared split (dataset/reader.py). A worker process that gets one maps its files."""

    sequences: Sequences


class RankWork(Sequence[MicroBatch]):
    """The micro-batches of one rank over a range of steps, computed on access."""

    def __init__(
        self, split: HasSequences, layout: BatchLayout, *, seed: int, rank: int, steps: range
    ) -> None:
        self._split, self._layout, self._seed = split, layout, seed
        self._rank, self._steps = rank, steps
        self._cached: tuple[int, list[MicroBatch]] = (-1, [])  # a step and its micro-batches

    def __len__(self) -> int:
        return len(self._steps) * self._layout.accumulation_steps

    def __getitem__(self, index: Any) -> Any:
        """The micro-batch with this index, counted from the first step of the range."""
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        step = self.step_of(index)
        if self._cached[0] != step:
            sequences = self._split.sequences
            groups = _rank_groups(self.batch(step), sequences, self._layout)[self._rank]
            self._cached = step, _micro_batches(groups, self._rank, sequences, self._layout)
        return self._cached[1][index % self._layout.accumulation_steps]

    def step_of(self, index: int) -> int:
        """The step of the micro-batch with this index."""
        return self._steps[index // self._layout.accumulation_steps]

    def batch(self, step: int) -> Integers:
        """The sequences of a step over all ranks."""
        return global_batch(
            step,
            self._split.sequences,
            seed=self._seed,
            global_batch_size=self._layout.global_batch_size,
        )

    def size_of(self, step: int) -> StepSize:
        """Documents and supervised tokens of a step over all ranks."""
        return self._split.sequences.size_of(self.batch(step))


def evaluation_work(
    sequences: Sequences, *, data_parallel_size: int, micro_batch_size: int
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank for one pass over the sequences; each rank has equally many.

    Micro-batches have sequences of similar length and are assigned to ranks longest first, in
    alternating direction, which balances the ranks.
    """
    indices = sequences.of_epoch()
    size = micro_batch_size
    by_length = indices[np.argsort(-sequences.tokens[indices], kind="stable")]
    groups = [by_length[first : first + size] for first in range(0, len(indices), size)]
    micro_batches: list[list[MicroBatch]] = [[] for _ in range(data_parallel_size)]  # by rank
    ranks = list(range(data_parallel_size))
    for start in range(0, len(groups), data_parallel_size):
        for index, rank in enumerate(ranks, start):
            # The last micro-batches may be empty.
            group = tuple(groups[index].tolist()) if index < len(groups) else ()
            micro_batches[rank].append(MicroBatch(group, index * size))
        ranks.reverse()
    return micro_batches


def forward_seed(seed: int, step: int, first: int, rank_in_group: int = 0) -> int:
    """Dropout seed of one forward pass: a function of its position, so resume needs no state.

    `first`: offset of its first sequence in the global batch. `rank_in_group`: index of the rank in
    its sequence-parallel group. The ranks of a group have different tokens of the sequences, so
    they need different dropout masks. 0 is not hashed, so that without groups the seeds are those
    of earlier versions.
    """
    inputs = (seed, step, first, rank_in_group) if rank_in_group else (seed, step, first)
    return int(hash_of(*inputs) >> np.uint64(1))  # 63 bits
