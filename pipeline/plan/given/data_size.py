"""DataSize: numbers of documents and tokens of an epoch, counted or estimated.

prepare (pipeline/data/prepare) counts them; before that, plan/estimate.py estimates them. A
document is one training example. LengthLoss: tokens that are lost because of `max_length`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LengthLoss:
    """Documents that are longer than `max_length`, and the tokens lost because of it.

    Prepare counts supervised tokens; an estimate counts all tokens. `longer`: documents of more
    than `max_length` tokens. `lost`: tokens that are not trained. `keeps_99`, `keeps_all`: smallest
    `max_length` with which 99 % and all of the tokens are trained. With `over_length: split` no
    tokens are lost; `keeps_99` and `keeps_all` are then the smallest `max_length` with which 99 %
    and all of the tokens are in documents that are not split.
    """

    documents: int
    longer: int
    tokens: int
    lost: int
    keeps_99: int
    keeps_all: int


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Numbers of an epoch: documents, and their tokens after truncation to `max_length`.

    Padding is not counted. `longest`: tokens of the longest document; None if some documents have
    not been read. `is_exact`: True if prepare counted the numbers, False if they are estimated.
    `sequences`: number of packs, or of documents without packing; None before prepare.
    `count_longer`: function that returns the number of documents with more tokens than its
    argument. `length_loss`: None for data that an older version prepared, which did not count it.
    """

    documents: int
    tokens: int
    longest: int | None
    is_exact: bool
    sequences: int | None = None
    count_longer: Callable[[int], int] | None = field(default=None, compare=False, repr=False)
    length_loss: LengthLoss | None = None

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
