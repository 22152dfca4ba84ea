"""Job: one pass over the sources of a setting, which writes one split, or two with hold-out."""

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.cluster.progress import show_progress
from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import SourceIndex, SplitIndex
from pipeline.data.dataset.writer import SplitWriter
from pipeline.data.prepare import lines
from pipeline.data.prepare.audit import RowCounts, make_audit, refuse_bad_row, require_usable
from pipeline.data.prepare.digests import (
    NOTHING_HELD_OUT,
    ChunkDigests,
    threshold_of_rows,
    threshold_of_share,
)
from pipeline.data.prepare.parallel import parallel_map
from pipeline.data.prepare.tokenised import ChunkTokeniser, TokenisedChunk, TokenisedRows
from pipeline.data.prepare.truncation import LengthCounts
from pipeline.errors import UserError
from pipeline.rows.sources import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sources of a setting, and the splits that are written from them in one pass.

    `setting`: train_data or eval_data. `keys`: name of each split (train, eval) -> its key, a hash
    of all its inputs. If there are two, rows of the training data are held out for `eval`.
    """

    setting: str
    sources: list[Source]
    keys: Mapping[str, str]


class JobRun:
    """Execution of a job: reads its rows, tokenises them and writes them to its splits.

    `writers`: by name of the split. `limit`: number of rows to use for each split; None for all.
    """

    def __init__(
        self,
        settings: RunSettings,
        job: Job,
        writers: Mapping[str, SplitWriter],
        limit: int | None,
    ) -> None:
        self._settings, self._job, self._limit = settings, job, limit
        unweighted = [replace(source, weight=1.0) for source in job.sources]
        self._splits: dict[str, _SplitBuilder] = {}
        for name, writer in writers.items():
            # The second split has the held-out rows, to which weights do not apply.
            sources = unweighted if self._splits else job.sources
            self._splits[name] = _SplitBuilder(writer, sources, settings)

    def run(self, processes: int | None) -> None:
        """Read, tokenise and write all rows, or as many as the limit allows."""
        settings = self._settings
        # With a limit, chunks have one row, so that no further row is read.
        rows_per_chunk = lines.CHUNK_ROWS if self._limit is None else 1
        results = parallel_map(
            lines.chunks(self._job.sources, rows_per_chunk),
            partial(ChunkTokeniser, settings, self._threshold(processes)),
            processes=processes if self._limit is None else 1,
            needs_torch=settings.trust_remote_code,
        )
        with closing(results), show_progress(f"{self._job.setting}: tokenising rows") as work:
            for chunk in results:
                work.advance(self._add(chunk))
                if self._is_full():
                    return

    def require_usable(self, max_rejected: float | None) -> None:
        """Raise UserError if a source has too many rejected rows or no used row.

        The rows of all splits count together. `max_rejected`: the largest share that is allowed.
        """
        counts = [RowCounts() for _ in self._job.sources]
        for split in self._splits.values():
            for total, counts_in_split in zip(counts, split.counts, strict=True):
                total.add(counts_in_split)
        names = [source.name for source in self._job.sources]
        require_usable(self._job.setting, list(zip(names, counts, strict=True)), max_rejected)

    def finish(self) -> dict[str, tuple[SplitIndex, dict[str, Any]]]:
        """Complete the splits. Returns the index and the audit of each."""
        documents = [len(split.writer) for split in self._splits.values()]  # number in each
        if len(documents) == 2 and not all(documents):
            raise UserError(
                f"eval_data: {self._settings.held_out} leaves {documents[0]} documents to train on "
                f"and holds out {documents[1]}; give another share or number, or more rows "
                "(equal rows are held out together)"
            )
        return {name: split.finish() for name, split in self._splits.items()}

    def _threshold(self, processes: int | None) -> int:
        """The threshold for `is_held_out`. A number of held-out rows needs a pass over all rows."""
        held_out = self._settings.held_out
        if len(self._splits) == 1 or held_out is None:
            return NOTHING_HELD_OUT
        if isinstance(held_out, float):
            return threshold_of_share(held_out)
        if self._limit is not None:
            return threshold_of_share(0.5)  # a trial on a few rows
        chunks = lines.chunks(self._job.sources, lines.CHUNK_ROWS)
        results = parallel_map(chunks, partial(ChunkDigests, self._settings), processes=processes)
        with closing(results), show_progress("choosing the held-out rows"):
            digests = np.concatenate([np.zeros(0, np.uint64), *results])
        return threshold_of_rows(digests, held_out)

    def _add(self, chunk: TokenisedChunk) -> int:
        """Add a chunk's rows to the splits that are not full. Returns the number of rows read."""
        num_read = 0
        # `chunk.splits` also has held-out rows if there is no second split; then there are none.
        for split, rows in zip(self._splits.values(), chunk.splits, strict=False):
            if self._limit is not None and split.num_used >= self._limit:
                continue
            split.add(chunk.source, rows)
            num_read += rows.counts.rows["rows_read"]
            if rows.rejects and self._settings.on_bad_row == "fail":
                first = rows.rejects[0]
                refuse_bad_row(f"{first.file}:{first.line}", first.reason)
        return num_read

    def _is_full(self) -> bool:
        """Whether a trial has enough rows: `limit` to train on and at least one held-out row."""
        if self._limit is None:
            return False
        train, *held_out = (split.num_used for split in self._splits.values())
        return train >= self._limit and all(held_out)


class _SplitBuilder:
    """Writer of one split, with the row counts of each source."""

    def __init__(self, writer: SplitWriter, sources: list[Source], settings: RunSettings) -> None:
        self.writer = writer
        self._sources, self._settings = sources, settings
        self.counts = [RowCounts() for _ in sources]

    @property
    def num_used(self) -> int:
        """Number of rows used."""
        return sum(counts.numbers["rows_used"] for counts in self.counts)

    def add(self, source: int, rows: TokenisedRows) -> None:
        self.writer.add(rows.columns, source)
        self.counts[source].add(rows.counts)
        for reject in (*rows.rejects, *rows.dropped):
            self.writer.rejects.write(reject.as_line())

    def finish(self) -> tuple[SplitIndex, dict[str, Any]]:
        sources = [
            SourceIndex(name=source.name, weight=source.weight, formats=dict(counts.formats))
            for source, counts in zip(self._sources, self.counts, strict=True)
        ]
        total = LengthCounts()
        for counts in self.counts:
            total.add(counts.lengths)
        index = self.writer.close(
            sources,
            total.length_loss(),
            max_length=self._settings.max_length,
            packing=self._settings.packing,
        )
        for source, counts in zip(self._sources, self.counts, strict=True):
            # Files without rows are listed too.
            counts.files = Counter({str(file): counts.files[str(file)] for file in source.files})
        audited = list(zip(sources, self.counts, strict=True))
        return index, make_audit(index, self.writer.folder, audited)
