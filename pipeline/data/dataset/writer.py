"""Writer of prepared splits. reader.py reads them and describes their files.

Several processes, also on several machines, may write the same split at once. Each writes to a
temporary sibling folder. The first to finish renames its folder; the others find a split with the
same content and discard theirs. The file system only needs an atomic rename of folders.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.data.dataset.hashing import hash_of, mix
from pipeline.data.dataset.packing import make_packs
from pipeline.data.dataset.reader import (
    INDEX,
    REJECTS,
    SEQUENCES,
    Array,
    SourceIndex,
    SplitIndex,
    read_column,
    read_published,
)
from pipeline.data.dataset.sequences import Segment
from pipeline.errors import RankZeroError
from pipeline.files import atomic_file, dump_json, sync, temporary_sibling, write_text
from pipeline.plan.given.data_size import LengthLoss

# Array files with their numpy dtypes.
_COLUMNS: Mapping[str, str] = {
    "ids": "<i4",
    "supervised": "|b1",
    "offsets": "<i8",
    "counts": "<i8",
    "digests": "<u8",
    "sources": "<i4",
}
# Arrays that SplitIndex.content is the digest of, and the number of its hex digits.
_CONTENT, _DIGITS = ("ids", "supervised", "offsets"), 16
# Attempts. A damaged split at the path is removed before the next one; other processes may do the
# same.
_MAX_RENAMES = 10
# With weight 2.3 an epoch has each document of a source twice, and 30 % of them a third time. These
# are selected by a hash of the row's digest and this salt. Without a salt the selection would
# depend on which rows are held out, because held-out rows are selected by the digest too.
_SALT = int.from_bytes(b"weights")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """D documents, concatenated."""

    ids: Array  # (tokens,) int32
    supervised: Array  # (tokens,) bool
    lengths: Array  # (D,) int64
    counts: Array  # (D,) int64, supervised tokens
    digests: Array  # (D,) uint64, digest of the row that a document comes from


@dataclass(frozen=True, kw_only=True)
class EpochSize:
    """Size of an epoch, in which weights repeat documents or omit them."""

    sequences: int
    documents: int
    tokens: int


class SplitWriter:
    """Writes a split to a temporary sibling folder, chunk by chunk; `publish` renames it.

    As a context manager it removes the temporary folder, unless `publish` has renamed it.
    `published`: the final path. The attribute `folder` is the temporary folder.
    """

    def __init__(self, published: Path, key: str) -> None:
        self._published, self._key = published, key
        self.folder = temporary_sibling(published)
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
            rejects = self.folder / REJECTS
            self.rejects = rejects.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.rejects, *(column.stream for column in self._columns.values())):
            with suppress(OSError):  # on a full disk closing fails too
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __len__(self) -> int:
        return self._columns["counts"].length

    def add(self, documents: Columns, source: int) -> None:
        """Append documents. `source`: index of their source."""
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
        """Flush the file of rejected rows and return its path."""
        self.rejects.flush()
        return self.folder / REJECTS

    def close(
        self,
        sources: Sequence[SourceIndex],
        length_loss: LengthLoss,
        *,
        max_length: int,
        packing: bool,
    ) -> SplitIndex:
        """Complete the arrays on disk and write the sequences.

        `length_loss`: the tokens that are lost because of `max_length`. `packing`: pack documents
        to sequences.
        """
        for column in self._columns.values():
            column.close()
        self.rejects.close()
        sync(self.folder / REJECTS)
        weights = [source.weight for source in sources]
        epoch = write_sequences(self.folder, max_length, packing=packing, weights=weights)
        self.index = SplitIndex(
            key=self._key,
            folder=self._published,
            documents=len(self),
            tokens=self._columns["ids"].length,
            supervised_tokens=int(read_column(self.folder, "counts").sum()),
            longest=self._longest,
            sequences=epoch.sequences,
            epoch_documents=epoch.documents,
            epoch_tokens=epoch.tokens,
            sources=tuple(sources),
            made_with=tokenising_versions(),
            content=self._content(),
            length_loss=asdict(length_loss),
        )
        return self.index

    def _content(self) -> str:
        """Digest of token ids, loss masks and document boundaries."""
        digests = "".join(self._columns[name].sha256.hexdigest() for name in _CONTENT)
        return hashlib.sha256(digests.encode()).hexdigest()[:_DIGITS]

    def publish(self, audit: Mapping[str, Any]) -> None:
        """Write the index and rename the folder, so that readers find the split.

        If another process was faster, its split of the same content is kept.
        """
        assert self.index is not None, "close first"
        index = {"split": self.index.as_json(), "audit": audit}
        write_text(self.folder / INDEX, dump_json(index), is_durable=True)
        for _ in range(_MAX_RENAMES):
            try:
                self.folder.rename(self._published)
            except OSError:
                if not self._published.exists():
                    raise
                if read_published(self._published) is not None:
                    return
                _remove_damaged(self._published)
            else:
                sync(self._published.parent)
                return
        raise RankZeroError(f"{self._published}: cannot be replaced; remove it and start again")


def tokenising_versions() -> dict[str, str]:
    """Installed versions of the packages that render and tokenise rows."""
    return {name: version(name) for name in ("transformers", "tokenizers", "jinja2")}


class _Column:
    """A one-dimensional .npy file to which values are appended.

    The header with the final length replaces the first one. numpy pads headers, so it fits.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.stream = path.open("wb")
        self.length, self.sha256 = 0, hashlib.sha256()
        self._path, self._dtype = path, dtype
        self._write_header()

    def extend(self, values: Sequence[int] | Array) -> None:
        content = np.asarray(values, dtype=self._dtype).tobytes()
        self.stream.write(content)
        self.sha256.update(content)
        self.length += len(values)

    def close(self) -> None:
        self.stream.seek(0)
        self._write_header()
        self.stream.close()
        sync(self._path)

    def _write_header(self) -> None:
        header = {"descr": self._dtype, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.stream, header)


def write_sequences(
    folder: Path, max_length: int, *, packing: bool, weights: Sequence[float]
) -> EpochSize:
    """Write the sequences of a split whose arrays are complete: packs, or single documents.

    The sequences of a source are contiguous: first those of all its documents, if its weight is at
    least 1, then those of the documents that are selected for the fraction of its weight.
    `weights`: one for each source.
    """
    sources, digests = read_column(folder, "sources"), read_column(folder, "digests")
    lengths = np.diff(read_column(folder, "offsets"))
    ordered: list[Array] = [np.zeros(0, np.int64)]  # indices of documents, sequence by sequence
    sizes: list[Array] = [np.zeros(0, np.int64)]  # numbers of documents in sequences
    segments: list[Segment] = []
    start = 0
    for source, weight in enumerate(weights):
        documents_of_source = np.flatnonzero(sources == source)
        for documents, repeats in _repeated_groups(documents_of_source, digests, weight):
            if packing:
                order, bounds = make_packs(lengths[documents], max_length)
                ordered.append(documents[order])
                sizes.append(np.diff(bounds))
            else:
                ordered.append(documents)
                sizes.append(np.ones(len(documents), np.int64))
            end = start + len(sizes[-1])
            segments.append(Segment(source=source, start=start, end=end, repeats=repeats))
            start = end
    documents = np.concatenate(ordered)
    offsets = np.append(0, np.cumsum(np.concatenate(sizes)))
    columns = {
        "documents": documents,
        "offsets": offsets,
        "tokens": _sums(lengths[documents], offsets),
        "squares": _sums(lengths[documents] ** 2, offsets),
        "counts": _sums(read_column(folder, "counts")[documents], offsets),
    }
    for name, column in columns.items():
        path = folder / f"sequence_{name}.npy"
        np.save(path, column, allow_pickle=False)
        sync(path)
    epoch = {"packing": packing, "rounds": [asdict(segment) for segment in segments]}
    write_text(folder / SEQUENCES, dump_json(epoch), is_durable=True)
    return EpochSize(
        sequences=sum(s.repeats * (s.end - s.start) for s in segments),
        documents=sum(s.repeats * int(offsets[s.end] - offsets[s.start]) for s in segments),
        tokens=sum(s.repeats * int(columns["tokens"][s.start : s.end].sum()) for s in segments),
    )


def _repeated_groups(
    documents: Array, digests: Array, weight: float
) -> Iterator[tuple[Array, int]]:
    """Groups of a source's documents, each with its number of repeats in an epoch.

    `documents`: their indices in the split. `digests`: of all documents of the split. With a
    weight of 2.3 each document occurs twice, and a fixed 30 %, selected by a hash, a third time.
    With a weight below 1 at least one document occurs.
    """
    if not len(documents):
        return
    repeats = int(weight)
    if repeats:
        yield documents, repeats
    num_selected = round((weight - repeats) * len(documents))
    if not repeats:
        num_selected = max(1, num_selected)
    if num_selected:
        keys = mix(digests[documents] ^ hash_of(_SALT))
        selected = np.argsort(keys, kind="stable")[:num_selected]
        yield documents[np.sort(selected)], 1


def _sums(values: Array, offsets: Array) -> Array:
    """Sums of `values[offsets[i]:offsets[i + 1]]` for each i; no interval may be empty."""
    return np.add.reduceat(values, offsets[:-1]) if len(values) else values


def join_files(path: Path, parts: Sequence[Path]) -> None:
    """Replace a file by the concatenation of others."""
    with atomic_file(path, is_durable=True) as temporary, temporary.open("wb") as stream:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, stream)


def _remove_damaged(folder: Path) -> None:
    """Rename a folder to a temporary name, then delete it; another process may do the same."""
    renamed = temporary_sibling(folder.with_name(f"{folder.name}.damaged"))
    try:
        folder.rename(renamed)
    except FileNotFoundError:
        return
    shutil.rmtree(renamed, ignore_errors=True)
