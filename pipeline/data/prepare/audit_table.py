"""audit.json for the terminal: numbers, lengths and sources of each split."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_BAR = 40  # characters of the longest bar
_APART = ("length", "sources")  # what has a table of its own


def audit_table(audit: Mapping[str, Mapping[str, Any]]) -> Group:
    """All of the audit that a person looks at before training."""
    parts: list[RenderableType] = [_numbers(audit)]
    for split, values in audit.items():
        parts.append(_lengths(split, values["length"]))
        if len(values["sources"]) > 1:
            parts.append(_sources(split, values["sources"]))
    return Group(*parts)


def _numbers(audit: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column a split, a line a number."""
    table = Table(title="audit")
    table.add_column("")
    for split in audit:
        table.add_column(split, justify="right")
    flat = {split: dict(_flat(values)) for split, values in audit.items()}
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        cells = (values.get(name) for values in flat.values())
        table.add_row(name, *("" if cell is None else _cell(name, cell) for cell in cells))
    return table


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = key.replace("_", " ")
        if key in _APART:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}: {inner}", number) for inner, number in value.items())
        else:
            yield name, value


def _cell(name: str, value: float) -> str:
    return f"{100 * value:.4g} %" if name.endswith("share") else f"{value:,}"


def _lengths(split: str, length: Mapping[str, Any]) -> Table:
    said = ", ".join(
        f"{key} {length[key]:,.10g}" for key in ("min", "median", "mean", "p95", "max")
    )
    table = Table(title=f"tokens of a document: {split}", caption=said, box=box.SIMPLE)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    width, counts = length["histogram"]["width"], length["histogram"]["documents"]
    start = length["histogram"].get("first", 0)  # older data is counted from 0
    for i, count in enumerate(counts):
        bar = "#" * round(_BAR * count / max(counts))
        first = start + i * width
        table.add_row(f"{first:,} to {first + width - 1:,}", f"{count:,}", bar)
    return table


def _sources(split: str, sources: list[Mapping[str, Any]]) -> Group:
    """Numbered, with the names beneath: a path in a narrow column would be cut in pieces."""
    table = Table(title=f"sources: {split}", box=box.SIMPLE)
    heads = ("", "weight", "read", "used", "rejected", "dropped", "tokens", "format")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=head != "format")
    keys = ("rows_read", "rows_used", "rows_rejected", "rows_dropped", "tokens")
    names = Text(overflow="fold")
    for i, source in enumerate(sources, 1):
        numbers = (f"{source[key]:,}" for key in keys)
        formats = ", ".join(source["formats"]) or "-"
        table.add_row(str(i), f"{source['weight']:g}", *numbers, formats)
        names.append(f"{i}  {source['name']}\n")
    return Group(table, names)
