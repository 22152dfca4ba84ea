"""Truncate, drop or split documents longer than max_length (setting `over_length`). Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.dataset.reader import Array


@dataclass(frozen=True)
class Window:
    """A part of a document, from token `start` on, with its loss mask."""

    start: int
    ids: Array  # (T,) int32
    supervised: Array  # (T,) bool


def windows(ids: Array, supervised: Array, max_length: int, over_length: str) -> list[Window]:
    """The parts of a document to train on: at most `max_length` tokens, with a supervised one.

    The windows of a split document overlap by one token, which predicts the second token of the
    later window. Every supervised token is therefore trained exactly once.
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
