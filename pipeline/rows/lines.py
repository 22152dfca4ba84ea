"""Line, a row of a file before it is parsed, and Row and BadRow, the results of parsing it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_ROW_BYTES = 16 * 2**20  # about 4 million tokens; a longer row suggests another file format
_NUMBER_BYTES = 8  # assumed for every value that is neither text nor bytes
NOT_UTF8 = (
    "not valid UTF-8; if the file is Windows-1252, as Excel writes CSV, convert it: "
    "iconv -f WINDOWS-1252 -t UTF-8"
)


class Line(NamedTuple):
    """A row before it is parsed. It is cheap to send to a worker process.

    `number`: line of the file at which the row begins, counted from 1; in a table (Parquet, Arrow)
    the number of the row. `offset`: first byte of the row in the decompressed file; None in a
    table. `content`: the row as JSON text in bytes, or as a dict of columns. `fault`: why the
    content could not be read; empty if it could.
    """

    file: Path
    number: int
    offset: int | None
    content: bytes | dict[str, Any]
    fault: str = ""


@dataclass(frozen=True)
class Row:
    """A parsed row: a JSON object, or the columns of a table."""

    file: Path
    line: int
    value: dict[str, Any]
    offset: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be parsed.

    The audit counts rows by `reason`; the reason therefore never quotes the row.
    """

    file: Path
    line: int
    reason: str
    offset: int | None = None


def too_long() -> str:
    """The reason for rejecting a row of more than MAX_ROW_BYTES."""
    return f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"


def size_of(value: Any) -> int:
    """Approximate size in bytes of a value of a table; text counts as UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list):
        are_numbers = bool(value) and type(value[0]) in (int, float)  # fast path for token ids
        return _NUMBER_BYTES * len(value) if are_numbers else sum(map(size_of, value))
    return len(value) if isinstance(value, bytes) else _NUMBER_BYTES
