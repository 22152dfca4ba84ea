"""DataSize: numbers of documents and tokens of an epoch, counted by prepare or estimated."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Numbers of an epoch: documents, and their tokens after truncation to `max_length`.

    Padding is not counted. `longest`: tokens of the longest document; None if some documents have
    not been read. `is_exact`: True if prepare counted the numbers, False if they are estimated.
    `sequences`: number of packs, or of documents without packing; None before prepare.
    `count_longer`: function that returns the number of documents with more tokens than its
    argument.
    """

    documents: int
    tokens: int
    longest: int | None
    is_exact: bool
    sequences: int | None = None
    count_longer: Callable[[int], int] | None = field(default=None, compare=False, repr=False)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens per document."""
        return self.tokens / self.documents

    def num_sequences(self, max_length: int, *, is_packed: bool) -> int:
        """Number of packs, or of documents without packing.

        Until prepare has made the packs, they are assumed to be full; they are about 99 % full.
        """
        if self.sequences is not None:
            return self.sequences
        return math.ceil(self.tokens / max_length) if is_packed else self.documents

    def longer_than(self, tokens: int) -> int | None:
        """Number of documents with more tokens; None if lengths have not been counted."""
        return None if self.count_longer is None else self.count_longer(tokens)
