"""(seed, epoch) -> order of sequences; (step, rank, world size) -> which of them. Pure.

The k-th global batch holds the same sequences for every number of ranks, micro-batch size and
accumulation whose product is the global batch. Every rank has the same number of micro-batches in
every step; where a short last step leaves some without sequences they are empty, so that
DeepSpeed's accumulation always completes. S: sequences, G: those of a global batch.
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
from pipeline.data.order.interleave import spread_sources, take_turns
from pipeline.plan.cost.per_token import SequenceFlops

# Without packing the documents of a micro-batch of up to this size are drawn from those within a
# tenth of each other's length, as far as there are so many.
_ALIKE_SIZE, _ALIKE_WIDTH = 256, 0.1


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How a global batch is divided: ranks x accumulation x micro-batch."""

    world_size: int
    accumulation_steps: int
    micro_batch_size: int

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step."""
        return self.world_size * self.accumulation_steps * self.micro_batch_size


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward on one rank; `first` is their place in the global batch."""

    sequences: tuple[int, ...]
    first: int


@lru_cache(maxsize=2)
def epoch_order(sequences: Sequences, *, seed: int, epoch: int, global_batch_size: int) -> Integers:
    """The sequences of an epoch in turn, each as often as its round says.

    Packs are shuffled. Without packing documents of like length make a global batch, and the global
    batches are shuffled; those that are left over are shared by the sources, and the last step is
    short. Sources take turns (`interleave.py`).
    """
    size = 1 if sequences.are_packs else global_batch_size
    streams: dict[int, list[Integers]] = defaultdict(list)
    left = [np.zeros(0, np.int64)]
    for part in sequences.rounds:
        for again in range(part.repeats):
            words = (seed, epoch, part.start, again)
            shuffled = part.start + permutation(part.end - part.start, *words)
            groups, rest = _groups(shuffled, sequences, size, words)
            streams[part.source].append(groups)
            left.append(rest)
    pooled, words = np.concatenate(left), (seed, epoch, len(sequences.tokens), 0)
    groups, rest = _groups(pooled[permutation(len(pooled), *words)], sequences, size, words)
    mixed = spread_sources(groups, sequences)
    merged = [np.concatenate(parts) for parts in streams.values()] + [mixed]
    return np.append(take_turns(merged, sequences.supervised), rest)


def _groups(
    shuffled: Integers, sequences: Sequences, size: int, words: Sequence[int]
) -> tuple[Integers, Integers]:
    """Groups of `size` sequences, of like length where there are several; and the few left over.

    Lengths are blurred before they are sorted, so that every epoch has other groups. The blur grows
    with groups larger than a micro-batch: sorted again inside, they still give alike micro-batches,
    and a step has short and long documents.
    """
    if size == 1:
        return shuffled[:, None], shuffled[:0]
    whole = len(shuffled) - len(shuffled) % size
    chosen, rest = shuffled[:whole], shuffled[whole:]
    width = _ALIKE_WIDTH * max(1.0, size / _ALIKE_SIZE)
    blur = hashes_of(whole, *words, 1) / 2.0**64
    # Rounded: the last bits of a logarithm differ from CPU to CPU, and ranks must not.
    alike = np.round(np.log(sequences.tokens[chosen]), 6) + width * blur
    by_length = chosen[np.argsort(alike, kind="stable")]
    groups = by_length.reshape(-1, size)
    return groups[permutation(len(groups), *words, 2)], rest


def global_batch(step: int, sequences: Sequences, *, seed: int, global_batch_size: int) -> Integers:
    """Sequences of the step with this index (from 0, over all epochs)."""
    epoch, place = divmod(step, -(-sequences.epoch // global_batch_size))
    start = place * global_batch_size
    order = epoch_order(sequences, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
    return order[start : start + global_batch_size]


def deal(
    batch: Integers, sequences: Sequences, flops: SequenceFlops, shape: BatchShape
) -> list[list[MicroBatch]]:
    """Divide one global batch: for each rank its micro-batches in turn, the costliest first.

    Each rank gets the same share of the cost, as nearly as can be found, and since all begin with
    what costs most, micro-batches that run side by side are alike. Packs are dealt one by one.
    Documents are dealt by the micro-batch, so that those of like length share one.
    """
    shares = _shares(batch, sequences, flops, shape)
    return [_in_turn(share, rank, sequences, flops, shape) for rank, share in enumerate(shares)]


def _shares(
    batch: Integers, sequences: Sequences, flops: SequenceFlops, shape: BatchShape
) -> list[list[Integers]]:
    """What each rank gets of a global batch: packs one by one, documents by the micro-batch."""
    by_length = batch[np.lexsort((batch, -sequences.tokens[batch]))]
    size = 1 if sequences.are_packs else shape.micro_batch_size
    cut = [by_length[first : first + size] for first in range(0, len(batch), size)]
    dealt = divide(_costs(cut, sequences, flops), shape.world_size)
    return [[cut[place] for place in places] for places in dealt]


def _in_turn(
    share: list[Integers],
    rank: int,
    sequences: Sequences,
    flops: SequenceFlops,
    shape: BatchShape,
) -> list[MicroBatch]:
    """A rank's micro-batches, those of packs as equal as can be found; empty ones to the end."""
    size = shape.micro_batch_size
    if sequences.are_packs and size > 1 and share:
        packs = np.concatenate(share)
        divided = divide(_costs(share, sequences, flops), -(-len(packs) // size))
        share = [packs[places] for places in divided]
        share = [share[i] for i in np.argsort(-_costs(share, sequences, flops), kind="stable")]
    none = [np.zeros(0, np.int64)] * (shape.accumulation_steps - len(share))
    return [
        MicroBatch(tuple(micro.tolist()), (turn * shape.world_size + rank) * size)
        for turn, micro in enumerate([*share, *none])
    ]


def _costs(
    groups: list[Integers], sequences: Sequences, flops: SequenceFlops
) -> npt.NDArray[np.float64]:
    """FLOPs of groups of sequences, documents padded to the longest of their group."""
    every, sizes = np.concatenate(groups), np.array([len(group) for group in groups])
    starts = np.cumsum(sizes) - sizes
    tokens, squares = sequences.tokens[every], sequences.squares[every]
    if not sequences.are_packs:
        tokens = np.repeat(np.maximum.reduceat(tokens, starts), sizes)
        squares = tokens**2
    costs = (
        flops.per_token * tokens
        + flops.per_square * squares
        + flops.per_logit * sequences.supervised[every]
    )
    summed: npt.NDArray[np.float64] = np.add.reduceat(costs, starts)
    return summed


class Sequenced(Protocol):
    """A split; sent to a worker it maps its files anew, where its sequences would be a copy."""

    sequences: Sequences


class RankWork(Sequence[MicroBatch]):
    """Micro-batches of one rank from `first_step` to the end, made when they are asked for."""

    def __init__(
        self,
        split: Sequenced,
        flops: SequenceFlops,
        shape: BatchShape,
        *,
        seed: int,
        rank: int,
        first_step: int,
        total_steps: int,
    ) -> None:
        self._split, self._flops, self._shape = split, flops, shape
        self._seed, self._rank = seed, rank
        self._first_step, self._total_steps = first_step, total_steps
        self._dealt: tuple[int, list[MicroBatch]] = (-1, [])

    def __len__(self) -> int:
        return (self._total_steps - self._first_step) * self._shape.accumulation_steps

    def __getitem__(self, index: Any) -> Any:
        """The `index`-th micro-batch from `first_step` on."""
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        step, turn = self.step_of(index), index % self._shape.accumulation_steps
        if self._dealt[0] != step:
            given = self._split.sequences, self._flops, self._shape
            share = _shares(self.batch(step), *given)[self._rank]
            self._dealt = (step, _in_turn(share, self._rank, *given))
        return self._dealt[1][turn]

    def step_of(self, index: int) -> int:
        """The step that the `index`-th micro-batch belongs to."""
        return self._first_step + index // self._shape.accumulation_steps

    def batch(self, step: int) -> Integers:
        """All sequences of a step, over all ranks."""
        return global_batch(
            step,
            self._split.sequences,
            seed=self._seed,
            global_batch_size=self._shape.global_batch_size,
        )

    def size_of(self, step: int) -> StepSize:
        """What the ranks do in a step together."""
        return self._split.sequences.size_of(self.batch(step))


def evaluation_work(
    sequences: Sequences, *, world_size: int, micro_batch_size: int
) -> list[list[MicroBatch]]:
    """The sequences of an epoch; for each rank the same number of micro-batches.

    Those of like length share a micro-batch, and ranks take turns at the longer one.
    """
    every = sequences.all_of_them()
    size = micro_batch_size
    by_length = every[np.argsort(-sequences.tokens[every], kind="stable")]
    cut = [by_length[first : first + size] for first in range(0, len(every), size)]
    work: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for turn in range(-(-len(cut) // world_size)):
        for place in range(world_size):
            index = turn * world_size + place
            chosen = tuple(cut[index].tolist()) if index < len(cut) else ()
            rank = place if turn % 2 == 0 else world_size - 1 - place
            work[rank].append(MicroBatch(chosen, index * size))
    return work


def forward_seed(seed: int, step: int, first: int) -> int:
    """Seed of the dropout of one forward: nothing has to be stored to resume it."""
    return int(hash_of(seed, step, first) >> np.uint64(1))
