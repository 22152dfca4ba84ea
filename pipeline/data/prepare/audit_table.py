"""Terminal tables of audit.json: counts, lengths, sources and files of each split."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_BAR = 40  # characters of the longest bar
_SEPARATE = ("length", "sources")  # entries of a split that have tables of their own
_DETAIL = ": "  # between the name of a count and the name of its part
_LABELS = {  # of the entry max_length, whose counts are from before max_length is applied
    "max length: documents": "before max_length: documents",
    "max length: longer": "longer than max_length: documents",
    "max length: tokens": "before max_length: supervised tokens",
    "max length: lost": "lost by max_length: supervised tokens",
    "max length: keeps_99": "max_length that keeps 99 %",
    "max length: keeps_all": "max_length that keeps all",
}
_MAX_FILES = 20  # shown of one source; audit.json has all


def audit_table(audit: Mapping[str, Mapping[str, Any]]) -> Group:
    """Tables of all numbers in the audit. `audit`: name of the split -> entries of the split."""
    tables: list[RenderableType] = [_count_table(audit)]
    for split, values in audit.items():
        tables.append(_length_table(split, values["length"]))
        tables.append(_source_tables(split, values["sources"]))
    return Group(*tables)


def _count_table(audit: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for each split, a row for each number; details that are all 0 are left out."""
    table = Table(title="audit")
    table.add_column("")
    for split in audit:
        table.add_column(split, justify="right")
    flat = {split: dict(_flat(values)) for split, values in audit.items()}
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        cells = [values.get(name) for values in flat.values()]
        if _DETAIL in name and not any(cells):
            continue
        table.add_row(name, *("" if cell is None else _cell(name, cell) for cell in cells))
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """The name and value of each number in the audit, except those in separate tables.

    The name of a nested number is, for example, `omitted reasoning: tokens`.
    """
    for key, value in values.items():
        # Keys inside an entry may be texts of the user, such as column names; they are not changed.
        name = f"{prefix}{_DETAIL}{key}" if prefix else key.replace("_", " ")
        if isinstance(value, Mapping) and key not in _SEPARATE:
            yield from _flat(value, name)
        elif key not in _SEPARATE:
            yield _LABELS.get(name, name), value


def _cell(name: str, value: float | str) -> str:
    if isinstance(value, str | bool):
        return str(value)
    return f"{100 * value:.4g} %" if name.endswith("share") else f"{value:,}"


def _length_table(split: str, length: Mapping[str, Any]) -> Table:
    summary = ", ".join(
        f"{key} {length[key]:,.10g}" for key in ("min", "median", "mean", "p95", "max")
    )
    table = Table(title=f"tokens per document: {split}", caption=summary, box=box.SIMPLE)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    width, counts = length["histogram"]["width"], length["histogram"]["documents"]
    start = length["histogram"].get("first", 0)  # older audits count from 0
    for i, count in enumerate(counts):
        bar = "#" * round(_BAR * count / max(counts))
        first = start + i * width
        table.add_row(f"{first:,} to {first + width - 1:,}", f"{count:,}", bar)
    return table


def _source_tables(split: str, sources: list[Mapping[str, Any]]) -> Group:
    """A table of numbered sources. Their names and files follow, as columns would break paths."""
    table = Table(title=f"sources: {split}", box=box.SIMPLE)
    for heading in ("", "weight", "read", "used", "rejected", "dropped", "tokens", "format"):
        table.add_column(heading, justify="right", no_wrap=heading != "format")
    keys = ("rows_read", "rows_used", "rows_rejected", "rows_dropped", "tokens")
    names = Text(overflow="fold")
    for i, source in enumerate(sources, 1):
        numbers = (f"{source[key]:,}" for key in keys)
        formats = ", ".join(source["formats"]) or "-"
        table.add_row(str(i), f"{source['weight']:g}", *numbers, formats)
        names.append(f"{i}  {source['name']}\n")
        files = list(source["files"].items())
        for file, rows in files[:_MAX_FILES] if len(files) > 1 else []:
            names.append(f"   {file}: {rows:,} rows\n")
        if len(files) > _MAX_FILES:
            names.append(f"   and {len(files) - _MAX_FILES} more files\n")
    return Group(table, names)
