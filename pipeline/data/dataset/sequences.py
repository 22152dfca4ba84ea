"""What order knows of the sequences of a split: numbers of each, and what makes an epoch.

A sequence is a pack, or without packing a document. S: sequences.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Round:
    """Sequences `start` to `end` of a source, which an epoch sees `repeats` times."""

    source: int
    start: int
    end: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Sums over a global batch: of all ranks, and known to each of them."""

    documents: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """The rounds of each source, and numbers of each sequence, (S,) int64.

    `squares`: sum of the squared lengths of its documents. `supervised`: tokens that count.
    `offsets` of their documents, (S + 1,).
    """

    rounds: tuple[Round, ...]
    offsets: Integers
    tokens: Integers
    squares: Integers
    supervised: Integers
    are_packs: bool

    @property
    def epoch(self) -> int:
        """Sequences of an epoch: some of them several times, or not at all."""
        return sum(part.repeats * (part.end - part.start) for part in self.rounds)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of an epoch that count in the loss."""
        of_rounds = (r.repeats * int(self.supervised[r.start : r.end].sum()) for r in self.rounds)
        return sum(of_rounds)

    def size_of(self, batch: Integers) -> StepSize:
        """What is in a global batch."""
        return StepSize(
            documents=int((self.offsets[batch + 1] - self.offsets[batch]).sum()),
            supervised_tokens=int(self.supervised[batch].sum()),
        )

    def all_of_them(self) -> Integers:
        """The sequences of an epoch, source by source."""
        parts = [np.tile(np.arange(r.start, r.end), r.repeats) for r in self.rounds]
        return np.concatenate([np.zeros(0, np.int64), *parts])
