"""What happened to every row: rejects by reason, the judgement over them, the audit. No torch."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.table import Table

from pipeline.data.prepared import SplitIndex
from pipeline.errors import UserError

_SHOWN_ROWS, _SHOWN_REASONS = 3, 3


@dataclass(frozen=True)
class Reject:
    """A row that is not used, and why."""

    file: str
    line: int
    reason: str


@dataclass
class Tally:
    """Rows read and rejected so far; the first few rejects are kept to be shown."""

    read: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[Reject] = field(default_factory=list)

    @classmethod
    def of(cls, audit: Mapping[str, Any], rejects: Path) -> Self:
        """The tally of a split that was prepared earlier."""
        with rejects.open(encoding="utf-8") as lines:
            first = [Reject(**json.loads(line)) for line in islice(lines, _SHOWN_ROWS)]
        return cls(audit["rows_read"], Counter(audit["rejected"]), first)

    def reject(self, file: Path, line: int, reason: str) -> Reject:
        """Count a row as rejected."""
        rejected = Reject(str(file), line, reason)
        self.reasons[reason] += 1
        if len(self.first) < _SHOWN_ROWS:
            self.first.append(rejected)
        return rejected

    @property
    def used(self) -> int:
        """Rows that were not rejected."""
        return self.read - self.reasons.total()

    def judge(self, key: str, max_rejected: float) -> None:
        """Raise UserError for more rejected rows than allowed, or none left."""
        rejected = self.reasons.total()
        if rejected <= max_rejected * self.read and self.used:
            return
        if not self.read:
            raise UserError(f"{key}: no row, only blank lines")
        lines = [f"{reject.file}:{reject.line}: {reject.reason}" for reject in self.first]
        common = self.reasons.most_common(_SHOWN_REASONS)
        said = "; ".join(f"{count} x {reason}" for reason, count in common)
        share = f"{rejected} of {self.read} rows ({100 * rejected / self.read:.3g} %) are bad"
        if self.used:
            verdict = f"more than max_rejected ({max_rejected:g}) allows"
            enough = ceil(1000 * rejected / self.read) / 1000
            remedy = f"mend them, or set max_rejected to {enough:g}"
        else:
            verdict, remedy = "no usable row is left", "mend them"
        lines.append(f"{key}: {share}, {verdict}; most common: {said}; {remedy}")
        raise UserError("\n".join(lines))


def make_audit(
    tally: Tally,
    index: SplitIndex,
    lengths: Sequence[int],
    *,
    truncated_rows: int,
    tokens_lost: int,
    duplicate_rows: int,
) -> dict[str, Any]:
    """The numbers of one split, for audit.json; all rows read are used or rejected."""
    return {
        "rows_read": tally.read,
        "rows_used": tally.used,
        "rejected": dict(tally.reasons.most_common()),
        "tokens": index.tokens,
        "supervised_tokens": index.supervised_tokens,
        "supervised_share": round(index.supervised_tokens / index.tokens, 4),
        "length": {"min": min(lengths), "median": median(lengths), "max": max(lengths)},
        "truncated_rows": truncated_rows,
        "tokens_lost": tokens_lost,
        "duplicate_rows": duplicate_rows,
    }


def audit_table(audit: Mapping[str, Mapping[str, Any]]) -> Table:
    """audit.json for the terminal: a column a split, a line a number."""
    table = Table(title="audit")
    table.add_column("")
    for split in audit:
        table.add_column(split, justify="right")
    flat = {split: _flat(values) for split, values in audit.items()}
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        cells = (values.get(name, "") for values in flat.values())
        table.add_row(name, *(f"{cell:,}" if cell != "" else "" for cell in cells))
    return table


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            found |= {f"{name}: {inner}": number for inner, number in value.items()}
        else:
            found[name] = value
    return found


def audit_line(data_dir: Path) -> str:
    """What happened to the training rows, in a line of the terminal."""
    said = json.loads((data_dir / "audit.json").read_text(encoding="utf-8"))["train"]
    rejected = sum(said["rejected"].values())
    share = 100 * said["supervised_share"]
    return (
        f"data       {said['rows_used']:,} of {said['rows_read']:,} rows, {rejected:,} rejected, "
        f"{said['truncated_rows']:,} truncated; {said['tokens']:,} tokens, {share:.0f} % supervised"
    )
