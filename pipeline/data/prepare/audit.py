"""What happened to every row: rejects by reason, the judgement over them, the audit. No torch."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.data.dataset.reader import Array, SourceIndex, SplitIndex, read_column
from pipeline.errors import UserError

_SHOWN_REASONS = 3
_BARS = 16  # of a histogram


@dataclass(frozen=True)
class Reject:
    """A row that is not used, and why; `offset`: its first byte, where rows share a line."""

    file: str
    line: int
    reason: str
    offset: int | None = None

    def as_line(self) -> str:
        """A line of rejects.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_rejects(path: Path) -> Iterator[Reject]:
    """The rows of a rejects.jsonl, bad and dropped ones, in the order of the data."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Reject(**json.loads(line))


@dataclass
class Tally:
    """Rows read and rejected so far, with one reject for each reason.

    `read_of`, `used_of`: of each source, by its number; `first_of`: its first reject.
    """

    read_of: Counter[int] = field(default_factory=Counter)
    used_of: Counter[int] = field(default_factory=Counter)
    first_of: dict[int, Reject] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Reject] = field(default_factory=dict)

    @classmethod
    def of(cls, audits: Sequence[Mapping[str, Any]], rejects: Sequence[Path]) -> Self:
        """The tally of splits that were prepared earlier."""
        tally = cls()
        for audit in audits:
            for number, source in enumerate(audit["sources"]):
                tally.count(number, source["rows_read"], source["rows_used"])
            tally.reasons.update(audit["rejected"])
        wanted = {reason for reason, _ in tally.reasons.most_common(_SHOWN_REASONS)}
        for path in rejects:
            for found in read_rejects(path):
                if not wanted:
                    return tally
                if found.reason in wanted:
                    tally.examples[found.reason] = found
                    wanted.remove(found.reason)
        return tally

    @property
    def read(self) -> int:
        """Rows of all sources."""
        return self.read_of.total()

    @property
    def used(self) -> int:
        """Those that are used."""
        return self.used_of.total()

    @property
    def lost_sources(self) -> list[int]:
        """Sources with rows of which none is used."""
        return [
            source for source, read in self.read_of.items() if read and not self.used_of[source]
        ]

    def count(self, source: int, read: int, used: int) -> None:
        """Count rows of a source."""
        self.read_of[source] += read
        self.used_of[source] += used

    def reject(self, source: int, reject: Reject) -> None:
        """Note why a row is rejected."""
        self.first_of.setdefault(source, reject)
        self.reasons[reject.reason] += 1
        self.examples.setdefault(reject.reason, reject)

    def judge(self, key: str, max_rejected: float) -> None:
        """Raise UserError for more rejected rows than allowed, or none left."""
        rejected = self.reasons.total()
        if rejected <= max_rejected * self.read and self.used:
            return
        if not self.read:
            raise UserError(f"{key}: no row, only blank lines")
        common = self.reasons.most_common(_SHOWN_REASONS)
        shown = [self.examples[reason] for reason, _ in common]
        lines = [f"{reject.file}:{reject.line}: {reject.reason}" for reject in shown]
        said = "; ".join(f"{count} x {reason}" for reason, count in common)
        share = f"{rejected} of {self.read} rows ({100 * rejected / self.read:.3g} %) are bad"
        if self.used:
            verdict = f"more than max_rejected ({max_rejected:g}) allows"
            enough = ceil(1000 * rejected / self.read) / 1000
            remedy = f"mend them, or set max_rejected to {enough:g}"
        elif rejected:
            verdict, remedy = "no usable row is left", "mend them"
        else:
            raise UserError(
                f"{key}: all {self.read} rows are longer than max_length, and over_length is drop"
            )
        lines.append(f"{key}: {share}, {verdict}; most common: {said}; {remedy}")
        raise UserError("\n".join(lines))

    def require_all_sources(self, key: str, names: Sequence[str]) -> None:
        """Raise UserError for a source that would be lost as a whole, however small it is."""
        for source in self.lost_sources:
            first = self.first_of.get(source)
            why = "" if first is None else f" ({first.file}:{first.line}: {first.reason})"
            raise UserError(
                f"{key}: {names[source]}: none of its {self.read_of[source]} rows is used{why}; "
                "mend them, or leave the source out"
            )


@dataclass
class SourceTally:
    """Numbers of one source in one split, by the names that the audit has for them."""

    name: str
    weight: float
    numbers: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def index(self) -> SourceIndex:
        """What the split's index says of it."""
        return SourceIndex(name=self.name, weight=self.weight, formats=dict(self.formats))


_ROWS = ("rows_read", "rows_used", "rows_rejected", "rows_dropped")


def make_audit(
    index: SplitIndex,
    folder: Path,
    sources: Sequence[SourceTally],
    reasons: Counter[str],
) -> dict[str, Any]:
    """The numbers of one split with columns in `folder`, for audit.json.

    Every row read is used, rejected, or dropped because it is long and the user asked for that.
    """
    numbers = sum((source.numbers for source in sources), Counter[str]())
    lengths = np.diff(read_column(folder, "offsets"))
    used, digests = numbers["rows_used"], read_column(folder, "digests")
    return {
        "rows_read": numbers["rows_read"],
        "rows_used": used,
        "rejected": dict(reasons.most_common()),
        "rows_dropped": numbers["rows_dropped"],
        "duplicate_rows": used - len(np.unique(digests)),
        "formats": dict(sum((source.formats for source in sources), Counter[str]())),
        "documents": index.documents,
        "tokens": index.tokens,
        "supervised_tokens": index.supervised_tokens,
        "supervised_share": round(index.supervised_tokens / index.tokens, 4),
        "end_of_turn_share": round(numbers["ended_rows"] / used, 4),
        "truncated_rows": numbers["truncated_rows"],
        "split_rows": numbers["split_rows"],
        "tokens_lost": numbers["tokens_lost"],
        "length": _lengths(lengths),
        "sources": _sources(sources, folder, lengths),
    }


def _lengths(lengths: Array) -> dict[str, Any]:
    first = int(lengths.min())
    width = ceil((int(lengths.max()) - first + 1) / _BARS)
    counts = np.bincount((lengths - first) // width)
    return {
        "min": first,
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "p95": float(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
        "histogram": {"first": first, "width": width, "documents": counts.tolist()},
    }


def _sources(sources: Sequence[SourceTally], folder: Path, lengths: Array) -> list[dict[str, Any]]:
    of_source, size = read_column(folder, "sources"), len(sources)
    documents = np.bincount(of_source, minlength=size)
    tokens = np.bincount(of_source, weights=lengths, minlength=size)
    counts = read_column(folder, "counts")
    supervised = np.bincount(of_source, weights=counts, minlength=size)
    return [
        {
            "name": source.name,
            "weight": source.weight,
            **{key: source.numbers[key] for key in _ROWS},
            "formats": dict(source.formats),
            "documents": int(documents[i]),
            "tokens": int(tokens[i]),
            "supervised_tokens": int(supervised[i]),
        }
        for i, source in enumerate(sources)
    ]


def audit_line(data_dir: Path) -> str:
    """What happened to the training rows, in a line of the terminal."""
    said = json.loads((data_dir / "audit.json").read_text(encoding="utf-8"))["train"]
    rejected = sum(said["rejected"].values())
    share = 100 * said["supervised_share"]
    return (
        f"data       {said['rows_used']:,} of {said['rows_read']:,} rows, {rejected:,} rejected, "
        f"{said['truncated_rows']:,} truncated; {said['tokens']:,} tokens, {share:.0f} % supervised"
    )
