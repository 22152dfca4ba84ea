"""Sections of the report about the data: counts, length histogram, sources, rejected rows."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.report import text
from pipeline.report.folder import Record, RunRecords, mapping, number

_SHOWN_REJECTS = 20
# Entries of a split's audit that have a table of their own.
_SEPARATE = ("sources", "rejected")
_SOURCE_COLUMNS = (
    "weight",
    "rows_read",
    "rows_used",
    "rows_rejected",
    "rows_dropped",
    "documents",
    "tokens",
    "supervised_tokens",
)


@dataclass(frozen=True, kw_only=True)
class SplitAudit:
    """The tables of one split: length histogram, sources and reasons for rejection."""

    name: str
    # For each bin: range of lengths as text, number of documents, width of the bar in percent.
    lengths: list[tuple[str, float, float]]
    sources: list[list[Any]]
    reasons: list[tuple[str, Any]]


def count_table(audit: Record) -> Mapping[str, Any] | None:
    """Table of the audit's counts: one column per split, or a single one if there are no splits.

    A row without any value is left out, for example the first row with reasoning if none has any.
    """
    if not audit:
        return None
    is_split = all(isinstance(values, dict) for values in audit.values())
    columns = audit if is_split else {"": audit}
    counts = {name: dict(text.flatten(_without_tables(v))) for name, v in columns.items()}
    keys = dict.fromkeys(key for values in counts.values() for key in values)
    rows = [(key, [_count(key, values.get(key)) for values in counts.values()]) for key in keys]
    return {"columns": list(counts), "rows": [row for row in rows if any(row[1])]}


def _count(key: str, value: Any) -> str:
    """A count with separators, a share in percent, or the text of another value."""
    if value is None:
        return ""
    if key.endswith("share") and (part := number(value)) is not None:
        return text.share(part)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else text.cell(value)


def length_texts(plan: Record) -> list[str]:
    """The plan's sentences about documents longer than `max_length`; none in older run folders."""
    texts = mapping(plan.get("length")).get("text")
    return [str(line) for line in texts] if isinstance(texts, list) else []


def split_audits(audit: Record) -> list[SplitAudit]:
    """The tables of each split that has tables."""
    splits = [
        SplitAudit(
            name=name,
            lengths=list(
                _length_bins(mapping(mapping(mapping(values).get("length")).get("histogram")))
            ),
            sources=_source_rows(mapping(values).get("sources")),
            reasons=list(mapping(mapping(values).get("rejected")).items()),
        )
        for name, values in audit.items()
    ]
    return [split for split in splits if split.lengths or split.sources or split.reasons]


def source_columns() -> tuple[str, ...]:
    """Headings of the columns of `SplitAudit.sources`, except the first one, the name."""
    return (*_SOURCE_COLUMNS, "formats")


def first_rejects(run: RunRecords) -> list[dict[str, Any]]:
    """File, line and reason of the first rejected rows."""
    rejects = []
    for line in islice(run.rejects, _SHOWN_REJECTS):
        try:
            reject = mapping(json.loads(line))
        except ValueError:
            continue
        rejects.append({key: reject.get(key, "") for key in ("file", "line", "reason")})
    return rejects


def _without_tables(values: Record) -> Record:
    """A split's audit without the entries that have separate tables."""
    counts = {key: value for key, value in values.items() if key not in _SEPARATE}
    if isinstance(length := counts.get("length"), dict):
        counts["length"] = {key: value for key, value in length.items() if key != "histogram"}
    rejected = values.get("rejected")
    if isinstance(rejected, dict):
        counts["rows_rejected"] = sum(number(count) or 0 for count in rejected.values())
    return counts


def _length_bins(histogram: Record) -> Iterator[tuple[str, float, float]]:
    width, documents = number(histogram.get("width")), histogram.get("documents")
    if not width or not isinstance(documents, list):
        return
    start = number(histogram.get("first")) or 0
    counts = [number(count) or 0 for count in documents]
    most = max(counts, default=0) or 1
    for i, count in enumerate(counts):
        first, following = round(start + i * width), round(start + (i + 1) * width)
        span = f"{text.cell(first)} to {text.cell(following - 1)}"
        yield span, count, 100 * count / most


def _source_rows(sources: Any) -> list[list[Any]]:
    rows = []
    for source in sources if isinstance(sources, list) else []:
        entry = mapping(source)
        formats = ", ".join(mapping(entry.get("formats"))) or "-"
        rows.append([entry.get("name", ""), *(entry.get(k, "") for k in _SOURCE_COLUMNS), formats])
    return rows
