"""Audit of the rows: counts by source, rejected rows, and the limit on them.

This file does not import torch.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.data.chat.encoder import END_WITHOUT_STOP, INNER_END_WITHOUT_STOP
from pipeline.data.dataset.reader import Array, SourceIndex, SplitIndex, read_column
from pipeline.data.prepare.truncation import LengthCounts
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.rows.sources import BadRow, Row

_SHOWN_REASONS = 3
# `without_numbers` replaces these in the reason for a rejection: an index, such as the [1] in
# `messages[1]`; a number of further paths, ` and 3 more`; and two or more paths whose indexes have
# been removed, `messages[].content, messages[].name`.
_INDEX, _MORE = re.compile(r"\[\d+\]"), re.compile(r" and \d+ more\b")
_PATHS = re.compile(r"\w+\[\][^\s,;]*(?:, \w+\[\][^\s,;]*)+")
_BARS = 16  # of the histogram of document lengths
_ROWS = ("rows_read", "rows_used", "rows_rejected", "rows_dropped")


@dataclass(frozen=True)
class Reject:
    """A row that is not used, with the reason.

    `offset`: position of its first byte in the file; None for tables such as Parquet.
    """

    file: str
    line: int
    reason: str
    offset: int | None = None

    @classmethod
    def from_row(cls, row: Row | BadRow, reason: str) -> Self:
        """The entry of an unused row."""
        return cls(str(row.file), row.line, reason, row.offset)

    def as_line(self) -> str:
        """A line of rejects.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_rejects(path: Path) -> Iterator[Reject]:
    """The entries of rejects.jsonl: rejected and dropped rows, in the order of the data."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Reject(**json.loads(line))


def without_numbers(reason: str) -> str:
    """Remove the numbers from the paths in a reason, so that equal faults are counted together.

    `messages[1].content, messages[3].content` becomes `messages[].content`.
    """

    def remove_duplicates(paths: re.Match[str]) -> str:
        return ", ".join(dict.fromkeys(paths[0].split(", ")))

    reason = _MORE.sub(" and more", _INDEX.sub("[]", reason))
    return _PATHS.sub(remove_duplicates, reason)


@dataclass
class RowCounts:
    """Counts of rows of one source; the counts of chunks and splits can be added up.

    `numbers`: counts by their name in audit.json. `formats`, `unread`: used rows by row format and
    by unread column. `files`: rows read, by file. `rejected`: rows by reason (`without_numbers`).
    `first`: "FILE:LINE" of the first row for each reason of `rejected` and for each name in
    `count_tokens`. `lengths`: counts of documents before truncation. `new_tokens`: occurrences of
    each token of the setting `new_tokens` after truncation, which may be 0.
    """

    numbers: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    lengths: LengthCounts = field(default_factory=LengthCounts)
    new_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> dict[str, int]:
        """Rows read, used, rejected and dropped: read = used + rejected + dropped."""
        parts = {name: self.numbers[name] for name in _ROWS[1:]}
        return {"rows_read": sum(parts.values()), **parts}

    def reject(self, row: Row | BadRow, reason: str) -> Reject:
        """Count a rejected row and return its entry for rejects.jsonl."""
        counted_reason = without_numbers(reason)
        self.numbers["rows_rejected"] += 1
        self.rejected[counted_reason] += 1
        self.files[str(row.file)] += 1
        self.first.setdefault(counted_reason, f"{row.file}:{row.line}")
        return Reject.from_row(row, reason)

    def count_tokens(self, row: Row, tokens: Mapping[str, int]) -> None:
        """Add the counts of a used row, `Encoded.token_counts` such as omitted_reasoning."""
        for name, number in tokens.items():
            self.numbers.update({f"{name}_rows": 1, f"{name}_tokens": number})
            self.first.setdefault(name, f"{row.file}:{row.line}")

    def token_count(self, name: str) -> dict[str, Any]:
        """The number of tokens under this name, the rows with such tokens, and the first row."""
        rows, tokens = self.numbers[f"{name}_rows"], self.numbers[f"{name}_tokens"]
        return {"rows": rows, "tokens": tokens, "first": self.first.get(name, "")}

    def ends_without_stop(self) -> dict[str, dict[str, Any]]:
        """Counts of the tokens that end trained turns although generation does not stop at them.

        The keys are the tokens. `is_last`: whether the token also ends the last turn of a
        conversation.
        """
        counts = {}
        for prefix in (END_WITHOUT_STOP, INNER_END_WITHOUT_STOP):
            for name in self.first:
                if name.startswith(prefix):
                    is_last = prefix == END_WITHOUT_STOP
                    count = {**self.token_count(name), "is_last": is_last}
                    counts[name.removeprefix(prefix)] = count
        return counts

    def add(self, other: "RowCounts") -> None:
        """Add the counts of rows that come later in the data."""
        self.numbers.update(other.numbers)
        self.formats.update(other.formats)
        self.files.update(other.files)
        self.unread.update(other.unread)
        self.rejected.update(other.rejected)
        self.first = other.first | self.first
        self.lengths.add(other.lengths)
        self.new_tokens.update(other.new_tokens)

    def as_json(self) -> dict[str, Any]:
        """The counts of a source in the form of audit.json."""
        return {
            **self.rows,
            "formats": dict(self.formats),
            "files": dict(self.files),
            "rows_mapped": self.numbers["rows_mapped"],
            "unread_columns": dict(self.unread.most_common()),
            "rejected": dict(self.rejected.most_common()),
            "first_rejected": {reason: self.first[reason] for reason in self.rejected},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The counts of used, rejected and dropped rows from the result of `as_json`."""
        counts = cls(rejected=Counter(values["rejected"]), first=dict(values["first_rejected"]))
        counts.numbers.update({name: values[name] for name in _ROWS[1:]})
        return counts


def require_usable(
    key: str, sources: Sequence[tuple[str, RowCounts]], max_rejected: float | None
) -> None:
    """Raise UserError if a source has too many rejected rows or no used row.

    `key`: the setting that lists the sources. `sources`: name and row counts of each. If
    `max_rejected` is None (a trial on a few rows), one used row of any source is enough.
    """
    faults = []
    for name, counts in sources:
        rows = counts.rows
        has_too_many = (
            max_rejected is not None and rows["rows_rejected"] > max_rejected * rows["rows_read"]
        )
        if rows["rows_read"] and (has_too_many or not rows["rows_used"]):
            faults.append(_fault_message(f"{key}: {name}", counts, max_rejected))
    is_any_used = any(counts.numbers["rows_used"] for _, counts in sources)
    if faults and not (max_rejected is None and is_any_used):
        raise UserError("\n".join(faults))


def _fault_message(source: str, counts: RowCounts, max_rejected: float | None) -> str:
    """Error message for a source: the share of bad rows, a remedy, the most common reasons."""
    rows = counts.rows
    read, rejected = rows["rows_read"], rows["rows_rejected"]
    if not rejected:
        return f"{source}: all {read} rows are longer than max_length, and over_length is drop"
    share = f"{rejected} of {read} rows ({100 * rejected / read:.3g} %) are rejected"
    if rows["rows_used"]:
        share += f", more than max_rejected ({max_rejected:g}) allows"
        remedy = f"fix them, or set max_rejected to {ceil(1000 * rejected / read) / 1000:g}"
    else:
        share += " and no usable row is left"
        remedy = "fix them, or leave the source out"
    lines = [f"{source}: {share}; {remedy}"]
    for reason, count in counts.rejected.most_common(_SHOWN_REASONS):
        others = f" and {count - 1} other rows" if count > 1 else ""
        lines.append(f"{counts.first[reason]}{others}: {reason}")
    return "\n".join(lines)


def refuse_bad_row(location: str, reason: str) -> None:
    """Raise UserError for a bad row under `on_bad_row: fail`."""
    raise UserError(
        f"{location}: {reason}; on_bad_row is fail: fix the row, or set on_bad_row to reject"
    )


def make_audit(
    index: SplitIndex, folder: Path, sources: Sequence[tuple[SourceIndex, RowCounts]]
) -> dict[str, Any]:
    """The audit of one split, for audit.json; `folder` holds the arrays of the split."""
    total = RowCounts()
    for _, counts in sources:
        total.add(counts)
    lengths, numbers = np.diff(read_column(folder, "offsets")), total.numbers
    used, digests = numbers["rows_used"], read_column(folder, "digests")
    return {
        "rows_read": total.rows["rows_read"],
        "rows_used": used,
        "rejected": dict(total.rejected.most_common()),
        "rows_dropped": numbers["rows_dropped"],
        "duplicate_rows": used - len(np.unique(digests)),
        "formats": dict(total.formats),
        "unread_columns": dict(total.unread.most_common()),
        "documents": index.documents,
        "tokens": index.tokens,
        "supervised_tokens": index.supervised_tokens,
        "supervised_share": round(index.supervised_tokens / index.tokens, 4),
        "end_of_turn_share": round(numbers["rows_with_all_ends"] / used, 4),
        "truncated_rows": numbers["truncated_rows"],
        "split_rows": numbers["split_rows"],
        "tokens_lost": numbers["tokens_lost"],
        "max_length": index.length_loss,
        "omitted_reasoning": total.token_count("omitted_reasoning"),
        "special_tokens_in_text": total.token_count("special_tokens_in_text"),
        "ends_without_stop": total.ends_without_stop(),
        "new_tokens": dict(total.new_tokens),
        "length": _length_statistics(lengths),
        "sources": _source_audits(sources, folder, lengths),
    }


def _length_statistics(lengths: Array) -> dict[str, Any]:
    """Statistics of the documents' lengths in tokens, (N,)."""
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


def _source_audits(
    sources: Sequence[tuple[SourceIndex, RowCounts]], folder: Path, lengths: Array
) -> list[dict[str, Any]]:
    """The row counts of each source, with its documents and tokens. `lengths`: of documents."""
    source_of_document, size = read_column(folder, "sources"), len(sources)
    documents = np.bincount(source_of_document, minlength=size)
    tokens = np.bincount(source_of_document, weights=lengths, minlength=size)
    counts = read_column(folder, "counts")
    supervised = np.bincount(source_of_document, weights=counts, minlength=size)
    return [
        {
            "name": source.name,
            "weight": source.weight,
            **rows.as_json(),
            "documents": int(documents[i]),
            "tokens": int(tokens[i]),
            "supervised_tokens": int(supervised[i]),
        }
        for i, (source, rows) in enumerate(sources)
    ]


def ends_without_stop(data_dir: Path) -> list[str]:
    """A message for each token that ends trained turns although generation does not stop at it.

    Empty if there is no audit, or if an older version wrote it.
    """
    try:
        train = read_json(data_dir / "audit.json")["train"]
    except OSError:
        return []
    texts = []
    for token, count in train.get("ends_without_stop", {}).items():
        remedy = (
            "add its id to eos_token_id in generation_config.json of the model, for training and "
            "for serving"
            if count["is_last"]
            else "split_turns: true ends each turn with the token of the last turn"
        )
        texts.append(
            f"{token} ends turns of {count['rows']:,} rows (first: {count['first']}), but it is "
            "neither eos_token nor in generation_config.json, so generation would not stop there; "
            f"{remedy}"
        )
    return texts


def audit_summary(data_dir: Path) -> str:
    """The summary of audit.json that a run logs at its start."""
    audit = read_json(data_dir / "audit.json")
    train = audit["train"]
    rejected = sum(train["rejected"].values())
    share = 100 * train["supervised_share"]
    lines = [
        f"data       {train['rows_used']:,} of {train['rows_read']:,} rows, {rejected:,} rejected, "
        f"{train['truncated_rows']:,} truncated; {train['tokens']:,} tokens, {share:.0f} % "
        "supervised"
    ]
    if unread := train["unread_columns"]:
        columns = ", ".join(f"{name} ({rows:,} rows)" for name, rows in unread.items())
        lines.append(f"not read   {columns}")
    # Data prepared before 0.2 has the count under another name.
    if (omitted := train.get("omitted_reasoning") or train["omitted_thoughts"])["rows"]:
        lines.append(
            f"reasoning  the chat template omits {omitted['tokens']:,} tokens of reasoning in "
            f"{omitted['rows']:,} rows (first: {omitted['first']}); split_turns: true trains "
            "each turn as the last one, with its reasoning"
        )
    if (special := train["special_tokens_in_text"])["rows"]:
        lines.append(
            f"special    {special['tokens']:,} special tokens inside texts of {special['rows']:,} "
            f"rows (first: {special['first']}); special_tokens_in_text sets whether they act as "
            "special tokens"
        )
    lines += [f"turn ends  {text}" for text in ends_without_stop(data_dir)]
    if unused := [token for token, count in train.get("new_tokens", {}).items() if not count]:
        lines.append(
            f"new tokens {', '.join(map(repr, unused))}: in no document of the training data, so "
            "the embeddings of these tokens are not trained"
        )
    if shared := audit.get("eval", {}).get("rows_also_in_train"):
        lines.append(f"eval set   {shared:,} documents are also in the training set")
    return "\n".join(lines)
