"""Line: the place and unparsed content of a row in a file; Row and BadRow: its parsed result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_ROW_BYTES = 16 * 2**20  # about 4 million tokens: a file that is not JSONL
_NUMBER_BYTES = 8
NOT_UTF8 = (
    "not valid UTF-8; if the file is Windows-1252, as Excel writes CSV, convert it: "
    "iconv -f WINDOWS-1252 -t UTF-8"
)


class Line(NamedTuple):
    """A row's place and unparsed content (JSON in bytes, or columns), cheap to send to a process.

    `number`: line of the file where the row begins, from 1; in a table (Parquet, Arrow) the row.
    `offset`: its first byte in the decompressed file, None in a table. `fault`: the reason why
    there is no content.
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
    """A row that cannot be parsed; `reason` quotes nothing of it, so that equal reasons count."""

    file: Path
    line: int
    reason: str
    offset: int | None = None


def too_long() -> str:
    """The reason for a row above MAX_ROW_BYTES."""
    return f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"


def size_of(value: Any) -> int:
    """Approximate bytes of a table's value, texts in UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list):
        are_numbers = bool(value) and type(value[0]) in (
            int,
            float,
        )  # token ids
        return _NUMBER_BYTES * len(value) if are_numbers else sum(map(size_of, value))
    return len(value) if isinstance(value, bytes) else _NUMBER_BYTES
