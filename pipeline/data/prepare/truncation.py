"""Truncate, drop or split documents longer than max_length (setting `over_length`).

All functions are pure.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.dataset.reader import Array
from pipeline.plan.given.data_size import LengthLoss

# Lengths are counted in bins of this many tokens. The length that keeps 99 % is a multiple of it.
_BIN = 64


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document, from token `start` on, with their loss mask."""

    start: int
    ids: Array  # (T,) int32
    supervised: Array  # (T,) bool


def windows(ids: Array, supervised: Array, max_length: int, over_length: str) -> list[Window]:
    """The windows of a document to train on, of at most `max_length` tokens.

    `ids`, `supervised`: (T,). Windows without a supervised token are left out. The windows of a
    split document overlap by one token: the last token of a window begins the next window, where it
    is not trained again but predicts the token after it. So every supervised token is trained
    exactly once.
    """
    if len(ids) <= max_length:
        candidates = [Window(0, ids, supervised)]
    elif over_length == "drop":
        candidates = []
    elif over_length == "split":
        starts = range(0, len(ids) - 1, max(max_length - 1, 1))
        candidates = [_window(ids, supervised, start, max_length) for start in starts]
    else:
        candidates = [_window(ids, supervised, 0, max_length)]
    return [window for window in candidates if window.supervised.any()]


def num_dropped(windows: Sequence[Window], length: int) -> int:
    """Number of tokens of a document of this length that are in none of its windows."""
    end = covered = 0
    for window in windows:
        start = max(window.start, end)
        end = window.start + len(window.ids)
        covered += end - start
    return length - covered


def _window(ids: Array, supervised: Array, start: int, max_length: int) -> Window:
    mask = np.array(supervised[start : start + max_length])
    mask[0] = False  # the window has no token that predicts it
    return Window(start, ids[start : start + max_length], mask)


@dataclass
class LengthCounts:
    """Counts of documents before truncation, which tell what a `max_length` would truncate.

    Only documents with a supervised token count. `longer`: documents of more than `max_length`
    tokens. `supervised`: supervised tokens; `trained`: supervised tokens within `max_length`. The
    length that a token needs is the smallest `max_length` that keeps it. `bins`: number of
    supervised tokens by needed length; bin i has the lengths from 64 i + 1 to 64 (i + 1).
    `longest`: smallest `max_length` that keeps all supervised tokens.
    """

    documents: int = 0
    longer: int = 0
    supervised: int = 0
    trained: int = 0
    longest: int = 0
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, other: "LengthCounts") -> None:
        """Add the counts of other documents."""
        self.documents += other.documents
        self.longer += other.longer
        self.supervised += other.supervised
        self.trained += other.trained
        self.longest = max(self.longest, other.longest)
        self.bins.update(other.bins)

    def length_loss(self) -> LengthLoss:
        """The supervised tokens lost at the present `max_length`, and lengths that keep them."""
        keeps_99, kept = 0, 0
        for index in sorted(self.bins):
            if 100 * kept >= 99 * self.supervised:
                break
            kept += self.bins[index]
            keeps_99 = (index + 1) * _BIN
        return LengthLoss(
            documents=self.documents,
            longer=self.longer,
            tokens=self.supervised,
            lost=self.supervised - self.trained,
            keeps_99=min(keeps_99, self.longest),
            keeps_all=self.longest,
        )


def count_lengths(masks: Sequence[Array], max_length: int, over_length: str) -> LengthCounts:
    """Counts of documents with these loss masks, each (T,); `trained` is not counted.

    With `over_length: truncate` a supervised token needs a length that includes its position; with
    other values it needs the length of its document.
    """
    masks = [mask for mask in masks if mask.any()]
    if not masks:
        return LengthCounts()
    sizes = np.array([len(mask) for mask in masks])
    if over_length == "truncate":
        ends = np.cumsum(sizes)
        positions = np.flatnonzero(np.concatenate(masks))
        needed = positions + 1 - (ends - sizes)[np.searchsorted(ends, positions, side="right")]
    else:
        needed = np.repeat(sizes, [np.count_nonzero(mask) for mask in masks])
    bins = np.bincount((needed - 1) // _BIN)
    return LengthCounts(
        documents=len(masks),
        longer=int((sizes > max_length).sum()),
        supervised=len(needed),
        longest=int(needed.max()),
        bins=Counter({int(index): int(bins[index]) for index in np.flatnonzero(bins)}),
    )
