"""One reading of some sources -> the split that they become, or two if rows are held out."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.reader import SplitIndex
from pipeline.data.dataset.writer import SplitWriter
from pipeline.data.prepare.audit import Reject, SourceTally, Tally, make_audit
from pipeline.data.prepare.documents import (
    NOTHING_HELD_OUT,
    Digests,
    Lines,
    Made,
    Maker,
    Part,
    threshold_of_rows,
    threshold_of_share,
)
from pipeline.data.prepare.parallel import in_order
from pipeline.errors import UserError
from pipeline.rows.lines import size_of
from pipeline.rows.sources import Line, Source, lines

_PIECE_BYTES, _PIECE_ROWS = 2**18, 1000  # that a process is given at once
_ROWS_A_LINE = 20_000  # of what is said of a large data set


@dataclass(frozen=True, kw_only=True)
class Job:
    """One reading of some sources; `keys` of the splits that it makes, two if it holds rows out.

    The held-out one comes second.
    """

    setting: str
    sources: list[Source]
    keys: Mapping[str, str]


class Making:
    """The splits of one job, from its rows."""

    def __init__(
        self,
        settings: RunSettings,
        job: Job,
        writers: Mapping[str, SplitWriter],
        limit: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.tally = Tally()
        self._settings, self._job, self._limit, self._say = settings, job, limit, say
        once = [replace(source, weight=1.0) for source in job.sources]  # what is held out
        self._splits = [
            _Split(writer, sources, settings)
            for writer, sources in zip(writers.values(), (job.sources, once), strict=False)
        ]
        self._names = list(writers)

    def run(self, processes: int | None) -> None:
        """Read, tokenise and write all rows."""
        settings = self._settings
        rows = _PIECE_ROWS if self._limit is None else 1  # to end at the row that is the last
        make = partial(Maker, settings, self._threshold(processes))
        with closing(
            in_order(
                _pieces(self._job.sources, rows),
                make,
                processes=processes if self._limit is None else 1,
                needs_torch=settings.trust_remote_code,
            )
        ) as parts:
            for part in parts:
                self._add(part)
                if self._is_full():
                    return

    def finish(self) -> dict[str, tuple[SplitIndex, dict[str, Any]]]:
        """Index and audit of each split."""
        held_out = self._settings.held_out
        if len(self._splits) == 2 and not all(len(split.writer) for split in self._splits):
            rest, held = (len(split.writer) for split in self._splits)
            raise UserError(
                f"eval_data: {held_out} leaves {rest} documents to train on and holds out {held}; "
                "give another share or number, or more rows"
            )
        return {name: split.finish() for name, split in zip(self._names, self._splits, strict=True)}

    def _threshold(self, processes: int | None) -> int:
        held_out = self._settings.held_out
        if len(self._splits) == 1 or held_out is None:
            return NOTHING_HELD_OUT
        if isinstance(held_out, float):
            return threshold_of_share(held_out)
        if self._limit is not None:
            return threshold_of_share(0.5)  # a few rows to try the road with, not to measure by
        pieces = _pieces(self._job.sources, _PIECE_ROWS)
        work = partial(Digests, self._settings)
        with closing(in_order(pieces, work, processes=processes)) as found:
            digests = np.concatenate([np.zeros(0, np.uint64), *found])
        return threshold_of_rows(digests, held_out)

    def _add(self, part: Part) -> None:
        before = self.tally.read
        for split, made in zip(self._splits, (part.rest, part.held_out), strict=False):
            if split.num_used(self._limit) != self._limit:
                split.add(part.source, made, self.tally)
                self._stop_at_bad_row(made)
        if self.tally.read // _ROWS_A_LINE > before // _ROWS_A_LINE:
            source = self._job.sources[part.source].name
            self._say(f"{source}: {self.tally.read:,} rows tokenised")

    def _stop_at_bad_row(self, made: Made) -> None:
        if made.rejects and self._settings.on_bad_row == "fail":
            refuse(made.rejects[0])

    def _is_full(self) -> bool:
        if self._limit is None:
            return False
        rest, *held_out = (split.num_used(self._limit) for split in self._splits)
        return rest == self._limit and all(held_out)


class _Split:
    """A split that is being made, with its audit."""

    def __init__(
        self, writer: SplitWriter, sources: Sequence[Source], settings: RunSettings
    ) -> None:
        self.writer = writer
        self._settings = settings
        self._sources = [SourceTally(source.name, source.weight) for source in sources]
        self._reasons: Counter[str] = Counter()

    def num_used(self, limit: int | None) -> int:
        """Rows used, at most `limit`."""
        used = sum(source.numbers["rows_used"] for source in self._sources)
        return used if limit is None else min(used, limit)

    def add(self, source: int, made: Made, tally: Tally) -> None:
        numbers = made.numbers
        read = numbers["rows_used"] + numbers["rows_rejected"] + numbers["rows_dropped"]
        self._sources[source].numbers.update(numbers, rows_read=read)
        self._sources[source].formats.update(made.formats)
        self.writer.add(made.columns, source)
        tally.count(source, read, numbers["rows_used"])
        for reject in made.rejects:
            tally.reject(source, reject)
            self._reasons[reject.reason] += 1
            self.writer.rejects.write(reject.as_line())
        for dropped in made.dropped:
            self.writer.rejects.write(dropped.as_line())

    def finish(self) -> tuple[SplitIndex, dict[str, Any]]:
        index = self.writer.close(
            [source.index for source in self._sources],
            max_length=self._settings.max_length,
            packing=self._settings.packing,
        )
        return index, make_audit(index, self.writer.folder, self._sources, self._reasons)


def _pieces(sources: Sequence[Source], rows: int) -> Iterator[Lines]:
    """All lines, in pieces of one source and of so many rows or bytes at most."""
    for number, source in enumerate(sources):
        found: list[Line] = []
        size = 0
        for line in lines(source):
            found.append(line)
            size += _size(line)
            if len(found) == rows or size >= _PIECE_BYTES:
                yield Lines(source=number, lines=found)
                found, size = [], 0
        if found:
            yield Lines(source=number, lines=found)


def _size(line: Line) -> int:
    return len(line.content) if isinstance(line.content, bytes) else size_of(line.content)


def refuse(reject: Reject) -> None:
    """Raise UserError for a bad row where one is enough."""
    raise UserError(
        f"{reject.file}:{reject.line}: {reject.reason}; on_bad_row is fail: mend the row, or set "
        "on_bad_row to reject"
    )
