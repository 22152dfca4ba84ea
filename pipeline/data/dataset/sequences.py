"""Per-sequence statistics and the composition of an epoch: the input of data/order.

A sequence is a pack or, without packing, a document. In array shapes, S is the number of
sequences.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Sequences `start` to `end` - 1 of one source; an epoch has each of them `repeats` times.

    `source`: index of the source.
    """

    source: int
    start: int
    end: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Number of documents and supervised tokens in a global batch, over all ranks."""

    documents: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """The segments of an epoch, and statistics of each sequence, (S,) int64.

    `squares`: sum of the squared lengths of the sequence's documents. `supervised`: number of
    tokens with a label. `offsets`, (S + 1,): sequence i has the documents at `offsets[i]` to
    `offsets[i + 1]` - 1.
    """

    segments: tuple[Segment, ...]
    offsets: Integers
    tokens: Integers
    squares: Integers
    supervised: Integers
    are_packs: bool

    @property
    def per_epoch(self) -> int:
        """Number of sequences in an epoch; the weight of a source may repeat or omit some."""
        return sum(s.repeats * (s.end - s.start) for s in self.segments)

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens in an epoch."""
        return sum(s.repeats * int(self.supervised[s.start : s.end].sum()) for s in self.segments)

    def size_of(self, batch: Integers) -> StepSize:
        """Number of documents and supervised tokens in a global batch."""
        return StepSize(
            documents=int((self.offsets[batch + 1] - self.offsets[batch]).sum()),
            supervised_tokens=int(self.supervised[batch].sum()),
        )

    def of_epoch(self) -> Integers:
        """Indexes of the sequences of an epoch, source by source."""
        repeated = [np.tile(np.arange(s.start, s.end), s.repeats) for s in self.segments]
        return np.concatenate([np.zeros(0, np.int64), *repeated])
