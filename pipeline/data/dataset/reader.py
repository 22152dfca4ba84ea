"""The prepared data set on disk: written once, opened in constant time, memory-mapped.

N: documents, T: tokens of one document. A split is a folder `<split>-<key>` with ids.npy (int32)
and supervised.npy (bool), all documents end to end, offsets.npy (int64, N + 1), counts.npy (int64,
N supervised tokens), digests.npy (uint64, N, of the row that each comes from), sources.npy (int32,
N, index of its source), rejects.jsonl and index.json, all written by writing.py, and sequence_*.npy
and sequences.json, written by packing.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.config.settings import RunSettings
from pipeline.data.dataset.sequences import Round, Sequences
from pipeline.errors import UserError
from pipeline.plan.estimate import DataSize, estimate

Array = npt.NDArray[Any]
INDEX, SEQUENCES, REJECTS = "index.json", "sequences.json", "rejects.jsonl"
_PREPARE_AGAIN = "run launch/prepare.py with the run file"


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """A source of a split; `formats`: rows of each format that were used."""

    name: str
    weight: float
    formats: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """What there is to know of a prepared split without opening it.

    `sources` are in the order that sources.npy counts them in.
    """

    key: str
    folder: Path
    documents: int
    tokens: int
    supervised_tokens: int
    longest: int
    sequences: int  # of an epoch, as are the next two
    epoch_documents: int
    epoch_tokens: int
    sources: tuple[SourceIndex, ...] = ()

    @property
    def size(self) -> DataSize:
        """What the plan asks of it."""
        return DataSize(
            documents=self.epoch_documents,
            tokens=self.epoch_tokens,
            longest=self.longest,
            is_exact=True,
            sequences=self.sequences,
        )

    def as_json(self) -> dict[str, Any]:
        """JSON values; the folder by its name alone, so that a run folder can be moved."""
        return {
            **asdict(self),
            "folder": self.folder.name,
            "sources": list(map(asdict, self.sources)),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], data_dir: Path) -> Self:
        """The index that `as_json` gave, of a split in `data_dir`."""
        sources = tuple(SourceIndex(**source) for source in values["sources"])
        return cls(**{**values, "folder": data_dir / values["folder"], "sources": sources})


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


def data_size(settings: RunSettings) -> DataSize | None:
    """Size of the training set as prepare counted it, else as a sample of the files suggests."""
    data_dir = Path(settings.output_dir) / "data"
    try:
        return DataIndex.load(data_dir).train.size
    except UserError:
        return estimate(settings)


class Split:
    """Documents and sequences of a prepared split, read from disk where they are touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = _mapped(folder, "ids")
        self._supervised = _mapped(folder, "supervised")
        self._offsets = _mapped(folder, "offsets")
        self.supervised_counts: Array = _mapped(folder, "counts")  # (N,) int64
        self._in_sequences = _mapped(folder, "sequence_documents")
        said = json.loads((folder / SEQUENCES).read_text(encoding="utf-8"))
        self.sequences = Sequences(
            rounds=tuple(Round(**values) for values in said["rounds"]),
            offsets=_mapped(folder, "sequence_offsets"),
            tokens=_mapped(folder, "sequence_tokens"),
            squares=_mapped(folder, "sequence_squares"),
            supervised=_mapped(folder, "sequence_counts"),
            are_packs=said["packing"],
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __reduce__(self) -> tuple[type["Split"], tuple[Path]]:
        return Split, (self._folder,)  # a worker maps the files anew instead of getting a copy

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

    def sequence(self, i: int) -> list[tuple[Array, Array]]:
        """The documents of a sequence, each as `document` gives it."""
        offsets = self.sequences.offsets
        if not 0 <= i < len(offsets) - 1:
            raise IndexError(f"sequence {i} of {len(offsets) - 1}")
        return [self.document(j) for j in self._in_sequences[offsets[i] : offsets[i + 1]]]

    def has_all_sequences(self, epoch: int) -> bool:
        """Whether the columns of sequences are whole, as far as their lengths tell."""
        found = self.sequences
        count = max((part.end for part in found.rounds), default=0)
        columns = (found.tokens, found.squares, found.supervised)
        return (
            found.epoch == epoch
            and len(found.offsets) == count + 1
            and all(len(column) == count for column in columns)
            and len(self._in_sequences) == found.offsets[-1]
        )


def open_split(index: SplitIndex) -> Split:
    """A prepared split. Raises UserError where its files are not what the index says."""
    try:
        split = Split(index.folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index.folder}: cannot be opened ({error}); {_PREPARE_AGAIN}") from None
    found = (len(split), len(split._ids), len(split._supervised), len(split.supervised_counts))
    is_whole = found == (index.documents, index.tokens, index.tokens, index.documents)
    if not is_whole or not split.has_all_sequences(index.sequences):
        raise UserError(f"{index.folder}: not the data of its index; {_PREPARE_AGAIN}")
    return split


def read_published(folder: Path) -> tuple[SplitIndex, dict[str, Any]] | None:
    """Index and audit of a split that is there and whole, else None."""
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index = SplitIndex.from_json(values["split"], folder.parent)
        open_split(index)
        audit: dict[str, Any] = values["audit"]
        left_out = sum(audit["rejected"].values()) + audit["rows_dropped"]
        rejects = (folder / REJECTS).read_bytes()
        is_whole = rejects.count(b"\n") == left_out and rejects[-1:] in (b"", b"\n")
        return (index, audit) if is_whole else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def read_column(folder: Path, name: str) -> Array:
    """One of the columns that every split has, memory-mapped."""
    return _mapped(folder, name)


def _mapped(folder: Path, name: str) -> Array:
    found: Array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return found.view(np.ndarray)  # slices of np.memmap itself are slow to make
