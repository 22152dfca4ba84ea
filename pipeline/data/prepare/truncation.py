"""Documents longer than max_length, as `over_length` says. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.dataset.reader import Array


@dataclass(frozen=True)
class Window:
    """Tokens of a document from `start` on, and which of them are supervised."""

    start: int
    ids: Array  # (T,) int32
    supervised: Array  # (T,) bool


def windows(ids: Array, supervised: Array, max_length: int, over_length: str) -> list[Window]:
    """The parts of a document that are used: at most `max_length` tokens, one of them supervised.

    Windows of a split document overlap by one token: the last token of a window predicts the first
    new one of the next window, so that every supervised token is trained once.
    """
    if len(ids) <= max_length:
        parts = [Window(0, ids, supervised)]
    elif over_length == "drop":
        parts = []
    elif over_length == "split":
        starts = range(0, len(ids) - 1, max(max_length - 1, 1))
        parts = [_window(ids, supervised, start, max_length) for start in starts]
    else:
        parts = [_window(ids, supervised, 0, max_length)]
    return [window for window in parts if window.supervised.any()]


def num_dropped(windows: Sequence[Window], length: int) -> int:
    """Tokens of a document of this length that are in none of its windows."""
    end = covered = 0
    for window in windows:
        start = max(window.start, end)
        end = window.start + len(window.ids)
        covered += end - start
    return length - covered


def _window(ids: Array, supervised: Array, start: int, max_length: int) -> Window:
    mask = np.array(supervised[start : start + max_length])
    mask[0] = False  # nothing in the window predicts it
    return Window(start, ids[start : start + max_length], mask)
