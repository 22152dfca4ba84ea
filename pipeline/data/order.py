"""(seed, epoch) -> order of documents; (step, rank, world size) -> which of them. Pure.

The k-th global batch holds the same documents for every number of ranks, micro-batch size and
accumulation whose product is the global batch. Every rank has the same number of micro-batches in
every step; where a short last step leaves some without documents they are empty, so that
DeepSpeed's accumulation always completes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How a global batch is divided: ranks x accumulation x micro-batch."""

    world_size: int
    accumulation_steps: int
    micro_batch_size: int

    @property
    def global_batch_size(self) -> int:
        """Documents of one step."""
        return self.world_size * self.accumulation_steps * self.micro_batch_size


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one forward on one rank; `first` is their place in the global batch."""

    documents: tuple[int, ...]
    first: int


@lru_cache(maxsize=2)
def epoch_order(num_documents: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of the documents.

    Sorted by a hash of (seed, epoch, document) rather than drawn from numpy's generator, whose
    stream may change between versions: a resumed run must find the same order.
    """
    salt = _mix(np.array([_mix(np.array([seed], np.uint64))[0] + np.uint64(epoch)], np.uint64))
    keys = _mix(np.arange(num_documents, dtype=np.uint64) ^ salt)
    return np.argsort(keys, kind="stable").astype(np.int64)


def global_batch(
    step: int, *, num_documents: int, seed: int, global_batch_size: int
) -> npt.NDArray[np.int64]:
    """Documents of the step with this index (from 0, over all epochs)."""
    epoch, place = divmod(step, -(-num_documents // global_batch_size))
    start = place * global_batch_size
    return epoch_order(num_documents, seed, epoch)[start : start + global_batch_size]


def deal(
    documents: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], shape: BatchShape
) -> list[list[MicroBatch]]:
    """Divide one global batch: for each rank, its micro-batches in turn.

    Documents of like length share a micro-batch (little padding), and micro-batches that run side
    by side on the ranks are alike (little waiting). Ranks take turns at the longer one.
    """
    by_length = documents[np.lexsort((documents, -lengths[documents]))]
    size, ranks = shape.micro_batch_size, shape.world_size
    work: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for turn in range(shape.accumulation_steps):
        for place in range(ranks):
            first = (turn * ranks + place) * size
            chosen = tuple(int(i) for i in by_length[first : first + size])
            rank = place if turn % 2 == 0 else ranks - 1 - place
            work[rank].append(MicroBatch(chosen, first))
    return work


class RankWork(Sequence[MicroBatch]):
    """Micro-batches of one rank from `first_step` to the end, made when they are asked for."""

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        shape: BatchShape,
        *,
        seed: int,
        rank: int,
        first_step: int,
        total_steps: int,
    ) -> None:
        self._lengths, self._shape, self._seed = lengths, shape, seed
        self._rank, self._first_step, self._total_steps = rank, first_step, total_steps
        self._dealt: tuple[int, list[MicroBatch]] = (-1, [])

    def __len__(self) -> int:
        return (self._total_steps - self._first_step) * self._shape.accumulation_steps

    def __getitem__(self, index: Any) -> Any:
        """The `index`-th micro-batch from `first_step` on."""
        step, turn = self.step_of(index), index % self._shape.accumulation_steps
        if self._dealt[0] != step:
            documents = self.documents(step)
            self._dealt = (step, deal(documents, self._lengths, self._shape)[self._rank])
        return self._dealt[1][turn]

    def step_of(self, index: int) -> int:
        """The step that the `index`-th micro-batch belongs to."""
        return self._first_step + index // self._shape.accumulation_steps

    def documents(self, step: int) -> npt.NDArray[np.int64]:
        """All documents of a step, over all ranks."""
        return global_batch(
            step,
            num_documents=len(self._lengths),
            seed=self._seed,
            global_batch_size=self._shape.global_batch_size,
        )


def evaluation_work(
    lengths: npt.NDArray[np.int64], *, world_size: int, micro_batch_size: int
) -> list[list[MicroBatch]]:
    """Every document once, for each rank the same number of micro-batches."""
    turns = -(-len(lengths) // (world_size * micro_batch_size))
    shape = BatchShape(
        world_size=world_size, accumulation_steps=turns, micro_batch_size=micro_batch_size
    )
    return deal(np.arange(len(lengths), dtype=np.int64), lengths, shape)


def forward_seed(seed: int, step: int, first: int) -> int:
    """Seed of the dropout of one forward: nothing has to be stored to resume it."""
    words: Sequence[int] = (seed, step, first)
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix(state ^ np.uint64(word))
    return int(state[0] >> np.uint64(1))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014); overflow is meant."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
