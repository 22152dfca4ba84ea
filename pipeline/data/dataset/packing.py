"""Documents -> the sequences that are trained on, once, in prepare.

A sequence is a pack, documents laid end to end, or without packing one document. Those of a source
stand together: first all its documents, then those that the fraction of its weight takes. Columns
of S sequences: sequence_documents.npy (int64, sequence by sequence), sequence_offsets.npy (int64,
S + 1, into it), sequence_tokens.npy, sequence_squares.npy (sum of squared document lengths, for the
cost of attention) and sequence_counts.npy (supervised tokens), all int64; sequences.json says what
an epoch is made of.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset.hashing import hash_of, mix
from pipeline.data.dataset.reader import SEQUENCES
from pipeline.data.dataset.sequences import Round
from pipeline.files import dump_json, sync, write_text

Array = npt.NDArray[Any]
# Lengths that are tried for the last but two documents of a pack. 16 instead of 64 leaves 0.1 %
# more of the GSM8K training set's packs empty.
_TRIES = 64
_FILLERS = 3  # documents that fill the last gap, where lengths are looked for in earnest
_SALT = int.from_bytes(b"weights")  # what is held out by the same digests must not decide this too


@dataclass(frozen=True, kw_only=True)
class EpochSize:
    """How much an epoch is, with what weights repeat or leave out."""

    sequences: int
    documents: int
    tokens: int


def write_sequences(
    folder: Path, max_length: int, *, packing: bool, weights: Sequence[float]
) -> EpochSize:
    """Lay the documents of a closed split in sequences and write them beside its columns.

    `weights` of its sources: a document is seen as often an epoch as the whole part says, and once
    more where it belongs to the fraction: so many of the source's documents, the first by a hash of
    their content, at least one.
    """
    offsets, sources = _read(folder, "offsets"), _read(folder, "sources")
    lengths, digests = np.diff(offsets), _read(folder, "digests")
    laid: list[Array] = []  # documents of the sequences
    sizes: list[Array] = []  # documents in each of them
    rounds: list[Round] = []
    start = 0
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        for documents, repeats in _parts(own, digests, weight):
            if packing:
                order, bounds = make_packs(lengths[documents], max_length)
                laid.append(documents[order])
                sizes.append(np.diff(bounds))
            else:
                laid.append(documents)
                sizes.append(np.ones(len(documents), np.int64))
            end = start + len(sizes[-1])
            rounds.append(Round(source=source, start=start, end=end, repeats=repeats))
            start = end
    return _write(folder, lengths, laid, sizes, rounds, packing=packing)


def _parts(own: Array, digests: Array, weight: float) -> Iterator[tuple[Array, int]]:
    """Documents of a source that are seen together, and how often."""
    if not len(own):
        return
    repeats = int(weight)
    if repeats:
        yield own, repeats
    chosen = round((weight - repeats) * len(own))
    if not repeats:
        chosen = max(1, chosen)
    if chosen:
        keys = mix(digests[own] ^ hash_of(_SALT))
        yield own[np.sort(np.argsort(keys, kind="stable")[:chosen])], 1


def _write(
    folder: Path,
    lengths: Array,
    laid: list[Array],
    sizes: list[Array],
    rounds: list[Round],
    *,
    packing: bool,
) -> EpochSize:
    documents = np.concatenate(laid) if laid else np.zeros(0, np.int64)
    offsets = np.zeros(sum(len(part) for part in sizes) + 1, np.int64)
    np.cumsum(np.concatenate(sizes) if sizes else [], out=offsets[1:])
    of_documents = lengths[documents]
    columns = {
        "documents": documents,
        "offsets": offsets,
        "tokens": _sums(of_documents, offsets),
        "squares": _sums(of_documents**2, offsets),
        "counts": _sums(_read(folder, "counts")[documents], offsets),
    }
    for name, column in columns.items():
        path = folder / f"sequence_{name}.npy"
        np.save(path, column, allow_pickle=False)
        sync(path)
    epoch = {"packing": packing, "rounds": [asdict(part) for part in rounds]}
    write_text(folder / SEQUENCES, dump_json(epoch), durable=True)
    return EpochSize(
        sequences=sum(r.repeats * (r.end - r.start) for r in rounds),
        documents=sum(r.repeats * int(offsets[r.end] - offsets[r.start]) for r in rounds),
        tokens=sum(r.repeats * int(columns["tokens"][r.start : r.end].sum()) for r in rounds),
    )


def _sums(values: Array, offsets: Array) -> Array:
    """Sums over the parts between offsets, none of which is empty."""
    return np.add.reduceat(values, offsets[:-1]) if len(values) else values


def _read(folder: Path, name: str) -> Array:
    found: Array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return found.view(np.ndarray)


def make_packs(lengths: Array, max_length: int) -> tuple[Array, Array]:
    """Documents laid pack by pack, and the bounds of the packs in them (packs + 1), both int64.

    Lengths are 1 to `max_length` tokens. Documents of one length are alike, so packs are sought
    among counts of lengths: the longest that is left, then what fills the pack best, as often as
    the counts allow. Each such pattern uses up a length, so there are hardly more patterns than
    lengths, however many documents.
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    assert lengths.min() >= 1, "an empty document"
    assert lengths.max() <= max_length, "a document that no pack can hold"
    counts = np.bincount(lengths, minlength=max_length + 1)
    by_length = np.argsort(lengths.astype(np.min_scalar_type(max_length)), kind="stable")
    starts = np.cumsum(counts) - counts  # of the documents of each length that are left
    laid: list[Array] = []
    sizes: list[Array] = []
    for pattern, times in _patterns(counts, max_length):
        parts = []
        for length, number in pattern.items():
            taken = by_length[starts[length] : starts[length] + number * times]
            starts[length] += number * times
            parts.append(taken.reshape(times, number))
        laid.append(np.hstack(parts).reshape(-1))
        sizes.append(np.full(times, pattern.total()))
    bounds = np.append(0, np.cumsum(np.concatenate(sizes)))
    return np.concatenate(laid).astype(np.int64), bounds.astype(np.int64)


def _patterns(counts: Array, max_length: int) -> Iterator[tuple[Counter[int], int]]:
    """Lengths of a pack, and how many packs have them, until no length is left; counts go to 0."""
    present = np.flatnonzero(counts).tolist()
    while present:
        pattern = Counter(_pack(counts, present, max_length))
        times = min(int(counts[length]) // number for length, number in pattern.items())
        for length, number in pattern.items():
            counts[length] -= number * times
            if not counts[length]:
                present.remove(length)
        yield pattern, times


def _pack(counts: Array, present: list[int], max_length: int) -> list[int]:
    """Lengths of one pack: the longest first, and of short ones many, until a few fill the rest.

    Leaves `counts` as they were, as the functions below do.
    """
    taken = Counter({present[-1]: 1})
    counts[present[-1]] -= 1
    gap = max_length - present[-1]
    while (length := _longest(counts, present, gap)) and gap > _FILLERS * length:
        number = min(int(counts[length]), gap // length - _FILLERS + 1)
        taken[length] += number
        counts[length] -= number
        gap -= number * length
    filled = _fill(counts, present, gap, _TRIES)
    for length, number in taken.items():
        counts[length] += number
    return [*taken.elements(), *filled]


def _longest(counts: Array, present: list[int], gap: int) -> int:
    """The longest length that is left and fits, or 0."""
    left = reversed(present[: bisect_right(present, gap)])
    return next((length for length in left if counts[length]), 0)


def _fill(counts: Array, present: list[int], gap: int, tries: int) -> list[int]:
    """Lengths that fill a gap: exactly if one, two, or one and what fills the rest can.

    Of `tries` lengths for the one, the longest come first.
    """
    smallest = present[0]
    if gap < smallest:
        return []
    if counts[gap]:
        return [gap]
    if pair := _pair(counts, gap, smallest):
        return pair
    best: list[int] = []
    tried = 0
    for length in reversed(present[: bisect_right(present, gap - smallest)]):
        if tried == tries or sum(best) == gap:
            break
        if counts[length]:
            tried += 1
            counts[length] -= 1
            found = [length, *_fill(counts, present, gap - length, tries // 4)]
            counts[length] += 1
            best = max(best, found, key=sum)
    return best or [length for length in [_longest(counts, present, gap)] if length]


def _pair(counts: Array, gap: int, smallest: int) -> list[int]:
    """Two lengths that fill a gap exactly, the pair of which most are left; none if none does."""
    half = gap // 2
    both = np.minimum(counts[smallest : half + 1], counts[gap - smallest : gap - half - 1 : -1])
    if len(both) and gap % 2 == 0:
        both[-1] //= 2  # the length that is paired with itself
    if not both.any():
        return []
    shorter = smallest + int(both.argmax())
    return [gap - shorter, shorter]
