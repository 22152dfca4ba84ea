"""The prepared data set on disk: written once, opened in constant time, memory-mapped.

N: documents, T: tokens of one document. A split is a folder `<split>-<key>` with ids.npy (int32)
and supervised.npy (bool), all documents end to end, offsets.npy (int64, N + 1), counts.npy (int64,
N supervised tokens), digests.npy (uint64, N rows), rejects.jsonl and index.json. It is written
under another name and renamed when complete, so what bears the name is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

Array = npt.NDArray[Any]
_COLUMNS: Mapping[str, str] = {
    "ids": "<i4",
    "supervised": "|b1",
    "offsets": "<i8",
    "counts": "<i8",
    "digests": "<u8",
}
INDEX = "index.json"
REJECTS = "rejects.jsonl"
_PREPARE_AGAIN = "run launch/prepare.py with the run file"


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """What there is to know of a prepared split without opening it."""

    key: str
    folder: Path
    documents: int
    tokens: int
    supervised_tokens: int
    longest: int

    def as_json(self) -> dict[str, Any]:
        """JSON values; the folder by its name alone, so that a run folder can be moved."""
        return {**asdict(self), "folder": self.folder.name}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], data_dir: Path) -> Self:
        """The index that `as_json` gave, of a split in `data_dir`."""
        return cls(**{**values, "folder": data_dir / values["folder"]})


@dataclass(frozen=True, kw_only=True)
class DataIndex:
    """The prepared splits of a run."""

    train: SplitIndex
    eval: SplitIndex | None

    @property
    def splits(self) -> dict[str, SplitIndex]:
        """Those that there are, by name."""
        found = {"train": self.train, "eval": self.eval}
        return {name: split for name, split in found.items() if split is not None}

    def as_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return {name: split.as_json() for name, split in self.splits.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], data_dir: Path) -> Self:
        """The index that `as_json` gave, of `data_dir`."""
        found = {name: SplitIndex.from_json(split, data_dir) for name, split in values.items()}
        return cls(train=found["train"], eval=found.get("eval"))

    @classmethod
    def load(cls, data_dir: Path) -> Self:
        """The index of a folder, however large its data is. Raises UserError without one."""
        path = data_dir / INDEX
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")), data_dir)
        except FileNotFoundError:
            raise UserError(f"{data_dir}: no prepared data; {_PREPARE_AGAIN}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not readable ({error}); {_PREPARE_AGAIN}") from None


class Split:
    """The documents of a prepared split, read from disk where they are touched."""

    def __init__(self, folder: Path) -> None:
        self._ids = _mapped(folder, "ids")
        self._supervised = _mapped(folder, "supervised")
        self._offsets = _mapped(folder, "offsets")
        self.supervised_counts: Array = _mapped(folder, "counts")  # (N,) int64

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each document, (N,) int64."""
        return np.diff(self._offsets)

    def document(self, i: int) -> tuple[Array, Array]:
        """Ids (T,) int32 and which are supervised (T,) bool, both read-only."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        start, end = self._offsets[i], self._offsets[i + 1]
        return self._ids[start:end], self._supervised[start:end]


def open_split(index: SplitIndex) -> Split:
    """A prepared split. Raises UserError where its files are not what the index says."""
    try:
        split = Split(index.folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{index.folder}: cannot be opened ({error}); {_PREPARE_AGAIN}") from None
    found = (len(split), len(split._ids), len(split._supervised), len(split.supervised_counts))
    if found != (index.documents, index.tokens, index.tokens, index.documents):
        raise UserError(f"{index.folder}: not the data of its index; {_PREPARE_AGAIN}")
    return split


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
        self.lengths.append(len(ids))

    def close(self) -> SplitIndex:
        """Complete the columns on disk."""
        for column in self._columns.values():
            column.close()
        _sync_and_close(self.rejects)
        counts = np.load(self.folder / "counts.npy", mmap_mode="r")
        self.index = SplitIndex(
            key=self._key,
            folder=self._place,
            documents=len(self.lengths),
            tokens=self._columns["ids"].length,
            supervised_tokens=int(counts.sum()),
            longest=max(self.lengths, default=0),
        )
        return self.index

    def publish(self, audit: Mapping[str, Any]) -> None:
        """Write the index and give the folder its name; from here on it exists."""
        assert self.index is not None, "close first"
        write_json(self.folder / INDEX, {"split": self.index.as_json(), "audit": audit})
        sync_folder(self.folder)
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


def read_published(folder: Path) -> tuple[SplitIndex, dict[str, Any]] | None:
    """Index and audit of a split that is there, else None."""
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return SplitIndex.from_json(values["split"], folder.parent), values["audit"]


def read_digests(folder: Path) -> Array:
    """Digest of the row of each document, (N,) uint64."""
    return _mapped(folder, "digests")


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


def _mapped(folder: Path, name: str) -> Array:
    path = folder / f"{name}.npy"
    found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return found
