"""Per-sequence statistics and the composition of an epoch: the input of data/order.

A sequence is a pack or, without packing, a document. S: sequences.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Sequences `start` to `end`, all of one source, which an epoch has `repeats` times."""

    source: int
    start: int
    end: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Sums over a global batch, known to every rank."""

    documents: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """The segments of an epoch, and statistics of each sequence, (S,) int64.

    `squares`: sum of the squared lengths of its documents. `supervised`: tokens with a label.
    `offsets` into the documents, (S + 1,).
    """

    segments: tuple[Segment, ...]
    offsets: Integers
    tokens: Integers
    squares: Integers
    supervised: Integers
    are_packs: bool

    @property
    def per_epoch(self) -> int:
        """Sequences of an epoch; a weight can repeat a sequence or leave it out."""
        return sum(s.repeats * (s.end - s.start) for s in self.segments)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens of an epoch."""
        return sum(s.repeats * int(self.supervised[s.start : s.end].sum()) for s in self.segments)

    def size_of(self, batch: Integers) -> StepSize:
        """Documents and supervised tokens of a global batch."""
        return StepSize(
            documents=int((self.offsets[batch + 1] - self.offsets[batch]).sum()),
            supervised_tokens=int(self.supervised[batch].sum()),
        )

    def of_epoch(self) -> Integers:
        """The sequences of an epoch, source by source."""
        repeated = [np.tile(np.arange(s.start, s.end), s.repeats) for s in self.segments]
        return np.concatenate([np.zeros(0, np.int64), *repeated])
