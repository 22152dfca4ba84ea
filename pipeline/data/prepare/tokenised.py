"""ChunkTokeniser: tokenises a chunk of lines in a worker process.

The result for a line depends only on that line, not on the division into chunks and processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.chat.encoder import Document, Encoder
from pipeline.data.chat.tokenizer import run_tokenizer
from pipeline.data.dataset.reader import Array
from pipeline.data.dataset.writer import Columns
from pipeline.data.prepare.audit import Reject, RowCounts
from pipeline.data.prepare.digests import digest, is_held_out
from pipeline.data.prepare.lines import Chunk, read_line
from pipeline.data.prepare.truncation import Window, count_lengths, num_dropped, windows
from pipeline.errors import UserError
from pipeline.rows.examples import ReadExample, RowError
from pipeline.rows.sources import BadRow, Row


@dataclass(kw_only=True)
class TokenisedRows:
    """Documents from the rows of one split, the counts of these rows, and the unused rows."""

    columns: Columns
    counts: RowCounts
    rejects: list[Reject]  # bad rows
    dropped: list[Reject]  # rows that are too long, with over_length: drop


@dataclass(frozen=True, kw_only=True)
class TokenisedChunk:
    """The rows of a chunk, by split. `source`: index of the source."""

    source: int
    splits: tuple[TokenisedRows, TokenisedRows]  # training rows, held-out rows


class ChunkTokeniser:
    """Tokenises chunks in a worker process.

    `threshold`: rows whose digest is below it are held out (`is_held_out`).
    """

    def __init__(self, settings: RunSettings, threshold: int) -> None:
        self._settings, self._threshold = settings, threshold
        tokenizer = run_tokenizer(settings)
        self._encoder = Encoder(tokenizer, settings)
        new_ids: Any = tokenizer.convert_tokens_to_ids(settings.new_tokens)
        self._new_ids: dict[str, int] = dict(zip(settings.new_tokens, new_ids, strict=True))

    def __call__(self, chunk: Chunk) -> TokenisedChunk:
        """Tokenise a chunk.

        Raises UserError if the chat template cannot be used, and with `over_length: fail` if a
        document is too long.
        """
        rows = [read_line(line, self._settings) for line in chunk.lines]
        examples = [read.example for _, read in rows if not isinstance(read, str)]
        encoded = iter(self._encoder.encode_many(examples))
        train, held_out = (_RowCollector(self._settings, self._new_ids) for _ in range(2))
        for row, read in rows:  # `read`: the example, or the reason why the row is bad
            if isinstance(read, str):
                train.reject(row, read)
                continue
            result, row_digest = next(encoded), digest(read.example)
            split = held_out if is_held_out(row_digest, self._threshold) else train
            if isinstance(result, RowError):
                split.reject(row, str(result))
            else:
                assert isinstance(row, Row)
                if self._add(split, row, read, result.documents, row_digest):
                    split.counts.count_tokens(row, result.token_counts)
        return TokenisedChunk(source=chunk.source, splits=(train.result(), held_out.result()))

    def _add(
        self,
        split: "_RowCollector",
        row: Row,
        read: ReadExample,
        documents: Sequence[Document],
        row_digest: int,
    ) -> bool:
        """Add the documents of a row to a split; returns whether the row is used."""
        length, over_length = self._settings.max_length, self._settings.over_length
        used: list[Window] = []
        tokens_lost, has_all_ends = 0, True
        split.masks += [document.supervised for document in documents]
        for document in documents:
            size = len(document.ids)
            if over_length == "fail" and size > length:
                raise UserError(
                    f"{row.file}:{row.line}: {size} tokens, more than max_length ({length}), "
                    "and over_length is fail; raise max_length, or set over_length to truncate, "
                    "drop or split"
                )
            document_windows = windows(document.ids, document.supervised, length, over_length)
            used += document_windows
            tokens_lost += num_dropped(document_windows, size)
            # Each document needs supervised end tokens, all of them in its windows.
            num_ends = self._num_ends(document)
            num_kept = sum(map(self._num_ends, document_windows)) if size > length else num_ends
            has_all_ends &= 0 < num_ends == num_kept
        if not used:
            if not any(document.supervised.any() for document in documents):
                split.reject(row, "no supervised token")
            elif over_length == "drop":
                split.drop(row, f"longer than max_length ({length}), and over_length is drop")
            else:
                split.reject(row, f"no supervised token within max_length ({length})")
            return False
        has_several_windows = over_length == "split" and len(used) > len(documents)
        split.counts.numbers.update(
            rows_used=1,
            truncated_rows=int(tokens_lost > 0),
            tokens_lost=tokens_lost,
            split_rows=int(has_several_windows),
            rows_with_all_ends=int(has_all_ends),
        )
        split.use(row, read, used, row_digest)
        return True

    def _num_ends(self, tokens: Document | Window) -> int:
        """Number of supervised end-of-turn and end-of-sequence tokens."""
        return self._encoder.num_end_tokens(tokens.ids[tokens.supervised])


class _RowCollector:
    """Collects the training rows, or the held-out rows. `new_ids`: id of each new token."""

    def __init__(self, settings: RunSettings, new_ids: Mapping[str, int]) -> None:
        self._settings, self._new_ids = settings, new_ids
        self.counts = RowCounts()
        self.masks: list[Array] = []  # of all documents, before truncation
        self._rejects: list[Reject] = []
        self._dropped: list[Reject] = []
        self._windows: list[Window] = []
        self._digests: list[int] = []

    def reject(self, row: Row | BadRow, reason: str) -> None:
        self._rejects.append(self.counts.reject(row, reason))

    def drop(self, row: Row, reason: str) -> None:
        self._dropped.append(Reject.from_row(row, reason))
        self.counts.numbers["rows_dropped"] += 1
        self.counts.files[str(row.file)] += 1

    def use(self, row: Row, read: ReadExample, windows: Sequence[Window], row_digest: int) -> None:
        self.counts.files[str(row.file)] += 1
        self.counts.formats[read.data_format] += 1
        self.counts.numbers["rows_mapped"] += read.has_renamed_columns
        self.counts.unread.update(read.unread)
        self._windows += windows
        self._digests += [row_digest] * len(windows)

    def result(self) -> TokenisedRows:
        ids, supervised = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for window in self._windows:
            ids.append(window.ids)
            supervised.append(window.supervised)
        columns = Columns(
            ids=np.concatenate(ids),
            supervised=np.concatenate(supervised),
            lengths=np.array([len(window.ids) for window in self._windows], np.int64),
            counts=np.array([np.count_nonzero(mask) for mask in supervised[1:]], np.int64),
            digests=np.array(self._digests, np.uint64),
        )
        settings = self._settings
        lengths = count_lengths(self.masks, settings.max_length, settings.over_length)
        lengths.trained = int(columns.counts.sum())
        self.counts.lengths = lengths
        if self._new_ids:
            occurrences = np.bincount(columns.ids, minlength=max(self._new_ids.values()) + 1)
            for token, token_id in self._new_ids.items():
                self.counts.new_tokens[token] += int(occurrences[token_id])
        return TokenisedRows(
            columns=columns, counts=self.counts, rejects=self._rejects, dropped=self._dropped
        )
