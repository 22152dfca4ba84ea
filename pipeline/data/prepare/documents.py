"""Lines of the data -> documents that fit, each piece by itself: what worker processes do.

What comes of a line depends on nothing but the line, so that it is the same however lines are
divided into pieces and pieces among processes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import Document, Encoder, load_tokenizer
from pipeline.data.dataset.reader import Array
from pipeline.data.dataset.writer import Columns
from pipeline.data.prepare.audit import Reject
from pipeline.data.prepare.truncation import Piece, fit, num_lost
from pipeline.errors import UserError
from pipeline.rows.formats import (
    Completion,
    Conversation,
    Example,
    RowError,
    Text,
    format_of,
    to_example,
)
from pipeline.rows.sources import BadRow, Line, Row, parse

NOTHING_HELD_OUT, _ALL = 0, 2**64
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that it maps digests one to one; 2**64 / golden ratio


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Some lines of the source with this number."""

    source: int
    lines: list[Line]


@dataclass(kw_only=True)
class Made:
    """What became of rows: documents, numbers of the audit, rows by format, rows left out.

    `dropped` are too long and left out because the user asked for it; they are not bad.
    """

    columns: Columns
    numbers: Counter[str]
    formats: Counter[str]
    rejects: list[Reject]
    dropped: list[Reject]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What became of some lines of the source with this number."""

    source: int
    rest: Made
    held_out: Made


def parsed_example(line: Line, settings: RunSettings) -> tuple[Row | BadRow, Example | str]:
    """The example of a line, or the reason why it has none."""
    row = parse(line)
    if isinstance(row, BadRow):
        return row, row.reason
    try:
        return row, to_example(row, settings.data_format, settings.columns)
    except RowError as error:
        return row, str(error)


def reject_of(row: Row | BadRow, reason: str) -> Reject:
    """A row that is left out, by its place."""
    return Reject(str(row.file), row.line, reason, row.offset)


def digest(example: Example) -> int:
    """64 bits of an example: rows that differ in their spelling as JSON alone are the same."""
    parts = [type(example).__name__]
    if isinstance(example, Conversation):
        for message in example.messages:
            parts += [message.role, message.content, str(message.is_trained)]
            parts.append(_sorted_json(message.others))
        parts += map(_sorted_json, example.tools)
    elif isinstance(example, Completion):
        parts += [example.prompt, example.completion]
    elif isinstance(example, Text):
        parts.append(example.text)
    else:
        parts += [*map(str, example.ids), *map(str, example.supervised)]
    spelled = "".join([f"{len(part)}:{part}" for part in parts])
    number = hashlib.blake2b(spelled.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(number)


def _sorted_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str) if value else ""


def threshold_of_share(share: float) -> int:
    """`is_held_out`'s threshold for a share of all rows."""
    return int(share * _ALL)


def threshold_of_rows(digests: Array, rows: int) -> int:
    """`is_held_out`'s threshold for this many of the rows with these digests, (N,) uint64.

    Equal rows stay together: where the last one has doubles there are more.
    """
    spread = np.sort(digests * np.uint64(_SPREAD))
    return int(spread[min(rows, len(spread)) - 1]) + 1 if len(spread) else NOTHING_HELD_OUT


def is_held_out(digest: int, threshold: int) -> bool:
    """Whether a row belongs to the held-out split; a function of its content alone.

    Spread first: whoever else goes by the digest (a source's weight) must choose independently.
    """
    return (digest * _SPREAD) % _ALL < threshold


class Digests:
    """Lines -> digests of those that have an example, (N,) uint64. Needs no tokenizer."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings

    def __call__(self, piece: Lines) -> Array:
        """Digests in the order of the lines."""
        examples = (parsed_example(line, self._settings)[1] for line in piece.lines)
        found = [digest(example) for example in examples if not isinstance(example, str)]
        return np.array(found, np.uint64)


class Maker:
    """Lines -> documents; `threshold` says what is held out."""

    def __init__(self, settings: RunSettings, threshold: int) -> None:
        self._settings, self._threshold = settings, threshold
        tokenizer = load_tokenizer(settings.model_folder, settings.trust_remote_code)
        self._encoder = Encoder(tokenizer, settings)

    def __call__(self, piece: Lines) -> Part:
        """Raises UserError for a template that can never be right, and for `over_length: fail`."""
        parsed = [parsed_example(line, self._settings) for line in piece.lines]
        examples = [example for _, example in parsed if not isinstance(example, str)]
        encoded = iter(self._encoder.encode_many(examples))
        rest, held_out = _Collected(), _Collected()
        for row, example in parsed:
            if isinstance(example, str):
                rest.reject(row, example)
                continue
            found, number = next(encoded), digest(example)
            into = held_out if is_held_out(number, self._threshold) else rest
            assert isinstance(row, Row)
            if isinstance(found, RowError):
                into.reject(row, str(found))
            else:
                self._add(row, found, number, into)
        return Part(source=piece.source, rest=rest.made(), held_out=held_out.made())

    def _add(
        self, row: Row, documents: Sequence[Document], number: int, into: "_Collected"
    ) -> None:
        length, over_length = self._settings.max_length, self._settings.over_length
        kept: list[Piece] = []
        lost, is_ended = 0, True
        for document in documents:
            size = len(document.ids)
            if over_length == "fail" and size > length:
                raise UserError(
                    f"{row.file}:{row.line}: {size} tokens, more than max_length ({length}), "
                    "and over_length is fail; raise max_length, or set over_length to truncate, "
                    "drop or split"
                )
            pieces = fit(document.ids, document.supervised, length, over_length)
            kept += pieces
            lost += num_lost(pieces, size)
            ends = self._num_ends(document)
            is_ended &= ends > 0 and (size <= length or ends == sum(map(self._num_ends, pieces)))
        if not kept:
            _leave_out(row, documents, into, self._settings)
            return
        into.numbers["rows_used"] += 1
        into.numbers["truncated_rows"] += lost > 0
        into.numbers["tokens_lost"] += lost
        into.numbers["split_rows"] += over_length == "split" and len(kept) > len(documents)
        into.numbers["ended_rows"] += is_ended
        into.formats[format_of(row, self._settings.data_format, self._settings.columns)] += 1
        for piece in kept:
            into.add(piece, number)

    def _num_ends(self, tokens: Document | Piece) -> int:
        return self._encoder.num_ends(tokens.ids[tokens.supervised])


class _Collected:
    """Rows of one split, until they are columns."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self._rejects: list[Reject] = []
        self._dropped: list[Reject] = []
        self._pieces: list[Piece] = []
        self._digests: list[int] = []

    def reject(self, row: Row | BadRow, reason: str) -> None:
        self._rejects.append(reject_of(row, reason))
        self.numbers["rows_rejected"] += 1

    def drop(self, row: Row, reason: str) -> None:
        self._dropped.append(reject_of(row, reason))
        self.numbers["rows_dropped"] += 1

    def add(self, piece: Piece, number: int) -> None:
        self._pieces.append(piece)
        self._digests.append(number)

    def made(self) -> Made:
        pieces = self._pieces
        ids = [np.zeros(0, np.int32), *(piece.ids for piece in pieces)]
        masks = [np.zeros(0, np.bool_), *(piece.supervised for piece in pieces)]
        counts = [np.count_nonzero(piece.supervised) for piece in pieces]
        columns = Columns(
            ids=np.concatenate(ids),
            supervised=np.concatenate(masks),
            lengths=np.array([len(piece.ids) for piece in pieces], np.int64),
            counts=np.array(counts, np.int64),
            digests=np.array(self._digests, np.uint64),
        )
        return Made(
            columns=columns,
            numbers=self.numbers,
            formats=self.formats,
            rejects=self._rejects,
            dropped=self._dropped,
        )


def _leave_out(
    row: Row, documents: Sequence[Document], into: _Collected, settings: RunSettings
) -> None:
    """Count a row of which nothing is kept."""
    length = settings.max_length
    if not any(document.supervised.any() for document in documents):
        into.reject(row, "no supervised token")
    elif settings.over_length == "drop":
        into.drop(row, f"longer than max_length ({length}), and over_length is drop")
    else:
        into.reject(row, f"no supervised token within max_length ({length})")
