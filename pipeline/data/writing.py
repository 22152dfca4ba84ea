"""Writes what prepared.py reads: a split, document by document, whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.data.packing import write_sequences
from pipeline.data.prepared import INDEX, SplitIndex

REJECTS = "rejects.jsonl"
_COLUMNS: Mapping[str, str] = {
    "ids": "<i4",
    "supervised": "|b1",
    "offsets": "<i8",
    "counts": "<i8",
    "digests": "<u8",
    "sources": "<i4",
}


class SplitWriter:
    """Writes a split beside its place, document by document; `publish` puts it there.

    Ends without a trace unless published.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._place, self._key = folder, key
        self.folder = temporary(folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._columns = {
            name: _Column(self.folder / f"{name}.npy", dtype) for name, dtype in _COLUMNS.items()
        }
        self._columns["offsets"].extend([0])
        self.rejects = (self.folder / REJECTS).open("w", encoding="utf-8")
        self.lengths: list[int] = []
        self.index: SplitIndex | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for column in self._columns.values():
            column.stream.close()
        self.rejects.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, ids: Sequence[int], supervised: Sequence[bool], digest: int) -> None:
        """Append a document and the digest of the row that it came from."""
        columns = self._columns
        columns["ids"].extend(ids)
        columns["supervised"].extend(supervised)
        columns["offsets"].extend([columns["ids"].length])
        columns["counts"].extend([sum(supervised)])
        columns["digests"].extend([digest])
        columns["sources"].extend([0])
        self.lengths.append(len(ids))

    def close(self, *, max_length: int, packing: bool) -> SplitIndex:
        """Complete the columns on disk and lay the documents in sequences."""
        for column in self._columns.values():
            column.close()
        _sync_and_close(self.rejects)
        epoch = write_sequences(self.folder, max_length, packing=packing, weights=[1.0])
        counts = np.load(self.folder / "counts.npy", mmap_mode="r")
        self.index = SplitIndex(
            key=self._key,
            folder=self._place,
            documents=len(self.lengths),
            tokens=self._columns["ids"].length,
            supervised_tokens=int(counts.sum()),
            longest=max(self.lengths, default=0),
            sequences=epoch.sequences,
            epoch_documents=epoch.documents,
            epoch_tokens=epoch.tokens,
        )
        return self.index

    def publish(self, audit: Mapping[str, Any]) -> None:
        """Write the index and give the folder its name; from here on it exists."""
        assert self.index is not None, "close first"
        write_json(self.folder / INDEX, {"split": self.index.as_json(), "audit": audit})
        sync_folder(self.folder)
        shutil.rmtree(self._place, ignore_errors=True)  # only what is not whole can be there
        self.folder.rename(self._place)
        sync_folder(self._place.parent)


class _Column:
    """A one-dimensional .npy file that grows; numpy pads its header for that."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.stream = path.open("wb")
        self.length = 0
        self._dtype = dtype
        self._write_header()

    def extend(self, values: Sequence[int]) -> None:
        self.stream.write(np.asarray(values, dtype=self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.stream.seek(0)
        self._write_header()
        _sync_and_close(self.stream)

    def _write_header(self) -> None:
        header = {"descr": self._dtype, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.stream, header)


def temporary(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def write_json(path: Path, value: object) -> None:
    """Write beside, sync, rename."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside, sync, rename."""
    with temporary(path).open("w", encoding="utf-8") as stream:
        stream.write(text)
        _sync_and_close(stream)
    temporary(path).replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
