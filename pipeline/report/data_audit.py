"""Sections of the report about the data: counts, length histogram, sources, rejected rows.

`audit` is the content of data/audit.json: for each split, `train` and `eval`, the counts of its
rows, documents and tokens.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.report import text
from pipeline.report.folder import Record, RunRecords, dict_or_empty, float_or_none

_SHOWN_REJECTS = 20
# Entries of a split's audit that are not in the table of counts, but in tables of their own.
_ENTRIES_WITH_TABLES = ("sources", "rejected")
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
    """Table of the counts in data/audit.json, with a column for each split; None if it is empty.

    `columns`: names of the splits. `rows`: pairs of a key and its texts in all splits. An audit
    without splits, of an earlier version, has one column. Keys without any value are left out.
    """
    if not audit:
        return None
    has_splits = all(isinstance(values, dict) for values in audit.values())
    splits = audit if has_splits else {"": audit}
    counts = {name: dict(text.flatten(_without_tables(values))) for name, values in splits.items()}
    keys = dict.fromkeys(key for values in counts.values() for key in values)
    rows = []
    for key in keys:
        texts = [_count(key, values.get(key)) for values in counts.values()]
        if any(texts):
            rows.append((key, texts))
    return {"columns": list(counts), "rows": rows}


def _count(key: str, value: Any) -> str:
    """A count with separators, a share in percent, or the text of another value."""
    if value is None:
        return ""
    if key.endswith("share") and (share := float_or_none(value)) is not None:
        return text.share(share)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else text.cell(value)


def length_texts(plan: Record) -> list[str]:
    """The plan's sentences about documents longer than `max_length`; none in older run folders."""
    sentences = dict_or_empty(plan.get("length")).get("text")
    return [str(sentence) for sentence in sentences] if isinstance(sentences, list) else []


def split_audits(audit: Record) -> list[SplitAudit]:
    """The tables of each split that has at least one of them."""
    split_tables = []
    for name, values in audit.items():
        split = dict_or_empty(values)
        lengths = dict_or_empty(split.get("length"))
        split_tables.append(
            SplitAudit(
                name=name,
                lengths=list(_length_bins(dict_or_empty(lengths.get("histogram")))),
                sources=_source_rows(split.get("sources")),
                reasons=list(dict_or_empty(split.get("rejected")).items()),
            )
        )
    return [tables for tables in split_tables if tables.lengths or tables.sources or tables.reasons]


def source_columns() -> tuple[str, ...]:
    """Headings of the columns of `SplitAudit.sources` after the first column, the name."""
    return (*_SOURCE_COLUMNS, "formats")


def first_rejects(run: RunRecords) -> list[dict[str, Any]]:
    """File, line and reason of the first rejected rows."""
    rejects = []
    for line in islice(run.rejects, _SHOWN_REJECTS):
        try:
            reject = dict_or_empty(json.loads(line))
        except ValueError:
            continue
        rejects.append({key: reject.get(key, "") for key in ("file", "line", "reason")})
    return rejects


def _without_tables(values: Record) -> Record:
    """A split's audit without the entries that have separate tables."""
    counts = {key: value for key, value in values.items() if key not in _ENTRIES_WITH_TABLES}
    if isinstance(length := counts.get("length"), dict):
        counts["length"] = {key: value for key, value in length.items() if key != "histogram"}
    rejected = values.get("rejected")
    if isinstance(rejected, dict):
        counts["rows_rejected"] = sum(float_or_none(count) or 0 for count in rejected.values())
    return counts


def _length_bins(histogram: Record) -> Iterator[tuple[str, float, float]]:
    """For each bin: range of lengths as text, number of documents, width of the bar in percent.

    `histogram`: `documents`, the number of documents in each bin; `width`, tokens of a bin;
    `first`, the smallest length in the first bin (0 in older audits).
    """
    width, documents = float_or_none(histogram.get("width")), histogram.get("documents")
    if not width or not isinstance(documents, list):
        return
    start = float_or_none(histogram.get("first")) or 0
    counts = [float_or_none(count) or 0 for count in documents]
    largest_count = max(counts, default=0) or 1
    for i, count in enumerate(counts):
        first, next_first = round(start + i * width), round(start + (i + 1) * width)
        length_range = f"{text.cell(first)} to {text.cell(next_first - 1)}"
        yield length_range, count, 100 * count / largest_count


def _source_rows(sources: Any) -> list[list[Any]]:
    """A row for each source: its name, and the values of `source_columns`."""
    rows = []
    for entry in sources if isinstance(sources, list) else []:
        source = dict_or_empty(entry)
        counts = [source.get(key, "") for key in _SOURCE_COLUMNS]
        formats = ", ".join(dict_or_empty(source.get("formats"))) or "-"
        rows.append([source.get("name", ""), *counts, formats])
    return rows
