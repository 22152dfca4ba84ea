"""Documents of more than max_length tokens, as `over_length` says. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.dataset.reader import Array


@dataclass(frozen=True)
class Piece:
    """Tokens of a document from `start` on, and which of them count in the loss."""

    start: int
    ids: Array  # (T,) int32
    supervised: Array  # (T,) bool


def fit(ids: Array, supervised: Array, max_length: int, over_length: str) -> list[Piece]:
    """What is kept of a document: pieces of at most `max_length`, each with a supervised token.

    Split pieces overlap by a token: the last one of a piece is what the first of the next is
    predicted from, so that every supervised token is trained once.
    """
    if len(ids) <= max_length:
        pieces = [Piece(0, ids, supervised)]
    elif over_length == "drop":
        pieces = []
    elif over_length == "split":
        step = max(max_length - 1, 1)
        starts = range(0, len(ids) - 1, step)
        pieces = [_piece(ids, supervised, start, max_length) for start in starts]
    else:
        pieces = [_piece(ids, supervised, 0, max_length)]
    return [piece for piece in pieces if piece.supervised.any()]


def num_lost(pieces: Sequence[Piece], length: int) -> int:
    """Tokens of a document of this length that are in none of its pieces."""
    end = covered = 0
    for piece in pieces:
        start = max(piece.start, end)
        end = piece.start + len(piece.ids)
        covered += end - start
    return length - covered


def _piece(ids: Array, supervised: Array, start: int, max_length: int) -> Piece:
    mask = np.array(supervised[start : start + max_length])
    mask[0] = False  # nothing in the piece predicts it
    return Piece(start, ids[start : start + max_length], mask)
