"""Writes what prepared.py reads: a split, piece by piece, whole or not at all.

Several processes, also on several machines, may write the same split at once: each writes beside
the place in a folder of its own, the first to be done gives it the name, and the others find a
split that holds the same and keep it. Renaming a folder is all that the file system must do.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.data.dataset.packing import write_sequences
from pipeline.data.dataset.reader import (
    INDEX,
    REJECTS,
    Array,
    SourceIndex,
    SplitIndex,
    read_published,
)
from pipeline.errors import RankZeroError
from pipeline.files import atomic_file, dump_json, sync, temporary_sibling, write_text

_COLUMNS: Mapping[str, str] = {
    "ids": "<i4",
    "supervised": "|b1",
    "offsets": "<i8",
    "counts": "<i8",
    "digests": "<u8",
    "sources": "<i4",
}
_TRIES = 10  # at a name for which others may compete


@dataclass(frozen=True, kw_only=True)
class Columns:
    """D documents end to end."""

    ids: Array  # (tokens,) int32
    supervised: Array  # (tokens,) bool
    lengths: Array  # (D,) int64
    counts: Array  # (D,) int64, supervised tokens
    digests: Array  # (D,) uint64, of the row that each comes from


class SplitWriter:
    """Writes a split beside its place, in pieces; `publish` puts it there.

    Ends without a trace unless published.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._place, self._key = folder, key
        self.folder = temporary_sibling(folder)
        self._longest = 0
        self.index: SplitIndex | None = None
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            self._columns = {
                name: _Column(self.folder / f"{name}.npy", dtype)
                for name, dtype in _COLUMNS.items()
            }
            self._columns["offsets"].extend([0])
            self.rejects = (self.folder / REJECTS).open("w", encoding="utf-8")
        except OSError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.rejects, *(column.stream for column in self._columns.values())):
            with suppress(OSError):  # of a full disk, once more
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __len__(self) -> int:
        return self._columns["counts"].length

    def add(self, documents: Columns, source: int) -> None:
        """Append documents of the source with this number."""
        if not len(documents.lengths):
            return
        columns = self._columns
        columns["offsets"].extend(columns["ids"].length + np.cumsum(documents.lengths))
        columns["ids"].extend(documents.ids)
        columns["supervised"].extend(documents.supervised)
        columns["counts"].extend(documents.counts)
        columns["digests"].extend(documents.digests)
        columns["sources"].extend(np.full(len(documents.lengths), source))
        self._longest = max(self._longest, int(documents.lengths.max()))

    def flushed_rejects(self) -> Path:
        """The file of the rejects so far, for a reader."""
        self.rejects.flush()
        return self.folder / REJECTS

    def close(
        self, sources: Sequence[SourceIndex], *, max_length: int, packing: bool
    ) -> SplitIndex:
        """Complete the columns on disk and lay the documents in sequences."""
        for column in self._columns.values():
            column.close()
        self.rejects.close()
        sync(self.folder / REJECTS)
        weights = [source.weight for source in sources]
        epoch = write_sequences(self.folder, max_length, packing=packing, weights=weights)
        counts = np.load(self.folder / "counts.npy", mmap_mode="r")
        self.index = SplitIndex(
            key=self._key,
            folder=self._place,
            documents=len(self),
            tokens=self._columns["ids"].length,
            supervised_tokens=int(counts.sum()),
            longest=self._longest,
            sequences=epoch.sequences,
            epoch_documents=epoch.documents,
            epoch_tokens=epoch.tokens,
            sources=tuple(sources),
        )
        return self.index

    def publish(self, audit: Mapping[str, Any]) -> None:
        """Write the index and give the folder its name; from here on the split exists.

        Where another process was quicker, its split, made from the same, stays.
        """
        assert self.index is not None, "close first"
        index = {"split": self.index.as_json(), "audit": audit}
        write_text(self.folder / INDEX, dump_json(index), durable=True)
        for _ in range(_TRIES):
            try:
                self.folder.rename(self._place)
            except OSError:
                if not self._place.exists():
                    raise
                if read_published(self._place) is not None:
                    return
                _remove(self._place)  # damaged: no reader takes it
            else:
                sync(self._place.parent)
                return
        raise RankZeroError(f"{self._place}: cannot be replaced; remove it and start again")


class _Column:
    """A one-dimensional .npy file that grows; numpy pads its header for that."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.stream = path.open("wb")
        self.length = 0
        self._dtype = dtype
        self._write_header()

    def extend(self, values: Sequence[int] | Array) -> None:
        self.stream.write(np.asarray(values, dtype=self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.stream.seek(0)
        self._write_header()
        self.stream.close()
        sync(Path(self.stream.name))

    def _write_header(self) -> None:
        header = {"descr": self._dtype, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.stream, header)


def join_files(path: Path, parts: Sequence[Path]) -> None:
    """Replace a file by the concatenation of others."""
    with atomic_file(path, durable=True) as temporary, temporary.open("wb") as stream:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, stream)


def _remove(folder: Path) -> None:
    """Take a folder out of its place at once, then delete it; another process may do the same."""
    aside = temporary_sibling(folder.with_name(f"{folder.name}.damaged"))
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
