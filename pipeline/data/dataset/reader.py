"""Reader of the prepared data set, which it opens in constant time and memory-maps.

A split (train or eval) is a folder such as `train-0123456789abcdef`, whose name ends with its key,
a hash of all inputs. A sequence is a pack (several documents in one sequence) or, without packing,
a document. N: documents, T: tokens of one document, S: sequences.

- ids.npy (int32) and supervised.npy (bool): all documents, concatenated
- offsets.npy (int64, N + 1): bounds of the documents in these two columns
- counts.npy (int64, N): supervised tokens of each document
- digests.npy (uint64, N): digest of the row that a document comes from
- sources.npy (int32, N): index of a document's source
- sequence_documents.npy (int64): indices of the documents, sequence by sequence
- sequence_offsets.npy (int64, S + 1): bounds of the sequences in sequence_documents.npy
- sequence_tokens.npy, sequence_counts.npy (int64, S): tokens and supervised tokens of each sequence
- sequence_squares.npy (int64, S): sum of squared document lengths, the cost of attention
- sequences.json: the segments of an epoch, under the key "rounds", their name in the first version
- rejects.jsonl: the rejected and dropped rows
- index.json: the SplitIndex and the audit
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.commands import command
from pipeline.data.dataset.sequences import Segment, Sequences
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.plan.given.data_size import DataSize, LengthLoss

Array = npt.NDArray[Any]
INDEX, SEQUENCES, REJECTS = "index.json", "sequences.json", "rejects.jsonl"
_PREPARE_AGAIN = f"run {command('prepare')} with the run file"


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """A source of a split; `formats`: used rows of each format."""

    name: str
    weight: float
    formats: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """Key, folder and sizes of a prepared split, stored in index.json.

    `longest`: tokens of the longest document. `sequences`, `epoch_documents`, `epoch_tokens`:
    numbers in an epoch, in which weights of sources repeat or omit documents. `sources` are in the
    order of the indexes in sources.npy. `made_with`: versions of the packages that tokenised the
    split. `content`: digest of token ids, loss masks and document boundaries. `length_loss`: the
    fields of LengthLoss. These last three are empty for a split of an earlier version.
    """

    key: str
    folder: Path
    documents: int
    tokens: int
    supervised_tokens: int
    longest: int
    sequences: int
    epoch_documents: int
    epoch_tokens: int
    sources: tuple[SourceIndex, ...] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)
    content: str = ""
    length_loss: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> DataSize:
        """The size that the plan needs."""
        return DataSize(
            documents=self.epoch_documents,
            tokens=self.epoch_tokens,
            longest=self.longest,
            is_exact=True,
            sequences=self.sequences,
            count_longer=self.count_longer,
            length_loss=LengthLoss(**self.length_loss) if self.length_loss else None,
        )

    def count_longer(self, tokens: int) -> int:
        """Number of documents with more than `tokens` tokens."""
        return int((np.diff(read_column(self.folder, "offsets")) > tokens).sum())

    def as_json(self) -> dict[str, Any]:
        """JSON values. `folder` has no path, so that the run folder can be moved."""
        return {
            **asdict(self),
            "folder": self.folder.name,
            "sources": list(map(asdict, self.sources)),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], data_dir: Path) -> Self:
        """The index of a split in `data_dir`, from the result of `as_json`."""
        sources = tuple(SourceIndex(**source) for source in values["sources"])
        return cls(**{**values, "folder": data_dir / values["folder"], "sources": sources})


@dataclass(frozen=True, kw_only=True)
class DataIndex:
    """The prepared splits of a run."""

    train: SplitIndex
    eval: SplitIndex | None

    @property
    def splits(self) -> dict[str, SplitIndex]:
        """The existing splits by name."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})

    def as_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return {name: split.as_json() for name, split in self.splits.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], data_dir: Path) -> Self:
        """The index of `data_dir`, from the result of `as_json`."""
        splits = {name: SplitIndex.from_json(split, data_dir) for name, split in values.items()}
        return cls(train=splits["train"], eval=splits.get("eval"))

    @classmethod
    def load(cls, data_dir: Path) -> Self:
        """Read the index of a folder. Raises UserError if it has none."""
        path = data_dir / INDEX
        try:
            return cls.from_json(read_json(path), data_dir)
        except FileNotFoundError:
            raise UserError(f"{data_dir}: no prepared data; {_PREPARE_AGAIN}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {_PREPARE_AGAIN}") from None


class Split:
    """Documents and sequences of a prepared split, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = read_column(folder, "ids")
        self._supervised = read_column(folder, "supervised")
        self._offsets = read_column(folder, "offsets")
        self.supervised_counts: Array = read_column(folder, "counts")  # (N,) int64
        self._sequence_documents = read_column(folder, "sequence_documents")
        epoch = read_json(folder / SEQUENCES)
        self.sequences = Sequences(
            segments=tuple(Segment(**values) for values in epoch["rounds"]),
            offsets=read_column(folder, "sequence_offsets"),
            tokens=read_column(folder, "sequence_tokens"),
            squares=read_column(folder, "sequence_squares"),
            supervised=read_column(folder, "sequence_counts"),
            are_packs=epoch["packing"],
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __reduce__(self) -> tuple[type["Split"], tuple[Path]]:
        return Split, (self._folder,)  # a worker process maps the files instead of getting a copy

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each document, (N,) int64."""
        return np.diff(self._offsets)

    def document(self, i: int) -> tuple[Array, Array]:
        """Token ids (T,) int32 and supervision mask (T,) bool, both read-only."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        start, end = self._offsets[i], self._offsets[i + 1]
        return self._ids[start:end], self._supervised[start:end]

    def sequence(self, i: int) -> list[tuple[Array, Array]]:
        """The documents of a sequence, each as `document` returns it."""
        offsets = self.sequences.offsets
        if not 0 <= i < len(offsets) - 1:
            raise IndexError(f"sequence {i} of {len(offsets) - 1}")
        return [self.document(j) for j in self._sequence_documents[offsets[i] : offsets[i + 1]]]

    def has_complete_sequences(self, per_epoch: int) -> bool:
        """Whether the lengths of all sequence arrays match the segments and the index.

        `per_epoch`: number of sequences in an epoch according to the index.
        """
        sequences = self.sequences
        count = max((segment.end for segment in sequences.segments), default=0)
        columns = (sequences.tokens, sequences.squares, sequences.supervised)
        return (
            sequences.per_epoch == per_epoch
            and len(sequences.offsets) == count + 1
            and all(len(column) == count for column in columns)
            and len(self._sequence_documents) == sequences.offsets[-1]
        )


def open_split(index: SplitIndex) -> Split:
    """Open a prepared split. Raises UserError if its files do not match the index."""
    try:
        split = Split(index.folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index.folder}: cannot be opened ({error}); {_PREPARE_AGAIN}") from None
    sizes = (len(split), len(split._ids), len(split._supervised), len(split.supervised_counts))
    is_complete = sizes == (index.documents, index.tokens, index.tokens, index.documents)
    if not is_complete or not split.has_complete_sequences(index.sequences):
        raise UserError(f"{index.folder}: does not match its index; {_PREPARE_AGAIN}")
    return split


def read_published(folder: Path) -> tuple[SplitIndex, dict[str, Any]] | None:
    """Index and audit of the split in a folder; None if the split is missing or incomplete."""
    try:
        values = read_json(folder / INDEX)
        index = SplitIndex.from_json(values["split"], folder.parent)
        open_split(index)
        audit: dict[str, Any] = values["audit"]
        num_unused = sum(audit["rejected"].values()) + audit["rows_dropped"]
        rejects = (folder / REJECTS).read_bytes()
        is_complete = rejects.count(b"\n") == num_unused and rejects[-1:] in (b"", b"\n")
        return (index, audit) if is_complete else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def read_column(folder: Path, name: str) -> Array:
    """An array of a split, memory-mapped. `name`: its file's name without `.npy`."""
    column: Array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return column.view(np.ndarray)  # slices of an np.memmap are slow to create
