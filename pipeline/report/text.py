"""Texts of numbers and other values for the report."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.report.folder import float_or_none

GIB = 2**30


def loss(value: float) -> str:
    """A loss with three significant digits: 2.72, 0.0874."""
    return f"{value:#.3g}"


def share(value: float) -> str:
    """A fraction as percent: 98.3 %, 0.35 %, 0 %."""
    percent = 100 * value
    if 0 < abs(percent) < 1:
        return f"{percent:.2g}\u00a0%"
    return f"{percent:.1f}".removesuffix(".0") + "\u00a0%"


def amount(value: float) -> str:
    """A count with three significant digits: 135 M, 12.5 k, 640."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}\u00a0{letter}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """A number in scientific notation: 2e-4 for 0.0002."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def gib(largest: float) -> Callable[[float], str]:
    """Formatter of bytes as GiB. `largest`: largest value of the column; it sets the decimals."""
    decimals = 2 if largest >= 10 * GIB else 3
    return lambda size: f"{size / GIB:,.{decimals}f}"


def duration(seconds: float) -> str:
    """A duration in its two largest units: 1 h 23 min, 4 min 05 s, 12.3 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def or_dash(value: float | None, as_text: Callable[[float], str]) -> str:
    """The formatted value; a dash if the value is not known."""
    return "-" if value is None else as_text(value)


def seconds_between(start: Any, end: Any) -> float | None:
    """Seconds between two timestamps of a status file: ISO 8601 or seconds since 1970."""
    first, last = _timestamp_seconds(start), _timestamp_seconds(end)
    return None if first is None or last is None or last < first else last - first


def moment(value: Any) -> str:
    """A timestamp of a status file, in UTC."""
    seconds = _timestamp_seconds(value)
    if seconds is None:
        return cell(value)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def cell(value: Any) -> str:
    """A JSON or YAML value as the text of a table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return scientific(value) if 0 < abs(value) < 1e-3 else f"{value:,.6g}"
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(cell(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pretty(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Items of nested mappings, with their keys joined by " · "."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{path} · ")
        else:
            yield path, value


def _timestamp_seconds(value: Any) -> float | None:
    """Seconds since 1970 of a timestamp; one without a time zone is in UTC."""
    if (seconds := float_or_none(value)) is not None:
        return seconds
    try:
        timestamp = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)).timestamp()
