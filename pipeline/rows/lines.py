"""What is read of a file: lines, as they lie there, and the rows that they hold. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_ROW_BYTES = 16 * 2**20  # some 4 million tokens: no document, but a file that is not JSONL
_NUMBER_BYTES = 8
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


class Line(NamedTuple):
    """A row's place and content, not yet parsed: JSON in bytes, or columns. Cheap to send on.

    `number`: line of the file where the row begins, from 1; of a table (Parquet, Arrow) the row.
    `offset`: byte of the decompressed file, None in a table. `fault`: why there is no content.
    """

    file: Path
    number: int
    offset: int | None
    content: bytes | dict[str, Any]
    fault: str = ""


@dataclass(frozen=True)
class Row:
    """A line that holds a JSON object, or a table's row."""

    file: Path
    line: int
    value: dict[str, Any]
    offset: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A line that does not; `reason` holds nothing of the line itself, so that reasons count."""

    file: Path
    line: int
    reason: str
    offset: int | None = None


def json_name(value: object) -> str:
    """What a JSON value is, in the words of a message."""
    if value is None:
        return "null"
    if isinstance(value, int | float):
        return _JSON_NAMES.get(type(value), "a number")
    return _JSON_NAMES.get(type(value), f"of type {type(value).__name__}")


def too_long() -> str:
    """Why a row over the limit is bad."""
    return f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"


def size_of(value: Any) -> int:
    """Bytes that a table's value holds, about; texts in UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list):
        of_numbers = bool(value) and type(value[0]) in (int, float)  # ids: no need to look at all
        return _NUMBER_BYTES * len(value) if of_numbers else sum(map(size_of, value))
    return len(value) if isinstance(value, bytes) else _NUMBER_BYTES
