"""Files named by the run file -> rows, line by line; a bad line is one bad row. No torch."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config.settings import DataSource
from pipeline.errors import UserError

MAX_ROW_BYTES = 16 * 2**20  # some 4 million tokens: no document, but a file that is not JSONL
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Row:
    """A line that holds a JSON object."""

    file: Path
    line: int
    value: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A line that does not; `reason` holds nothing of the line itself, so that reasons count."""

    file: Path
    line: int
    reason: str


def data_files(sources: Sequence[DataSource], key: str) -> list[Path]:
    """The files of a setting, each there and not empty; else UserError that names the key."""
    files = [Path(source.path) for source in sources]
    if not files:
        raise UserError(f"{key}: names no file; give a JSONL file or a list of them")
    for file in files:
        _check_file(file, key)
    return files


def read_rows(files: Sequence[Path]) -> Iterator[Row | BadRow]:
    """Every line of every file but the blank ones, in order; lines count from 1."""
    for file in files:
        with file.open("rb") as stream:
            yield from _rows_of(file, stream)


def json_name(value: object) -> str:
    """What a JSON value is, in the words of a message."""
    if value is None:
        return "null"
    return _JSON_NAMES.get(type(value), "a number")


def _rows_of(file: Path, stream: BinaryIO) -> Iterator[Row | BadRow]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            _skip_line(stream, line)
            yield BadRow(file, number, f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield _parsed(file, number, line)


def _skip_line(stream: BinaryIO, chunk: bytes) -> None:
    while chunk and not chunk.endswith(b"\n"):
        chunk = stream.readline(MAX_ROW_BYTES)


def _parsed(file: Path, number: int, line: bytes) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow(file, number, "not valid UTF-8")
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" at").removesuffix(" starting")
        return BadRow(file, number, f"not valid JSON: {said}")
    except (ValueError, RecursionError):  # a number of thousands of digits; nesting without end
        return BadRow(file, number, "not valid JSON: nested too deep or a number too long")
    if not isinstance(value, dict):
        return BadRow(file, number, f"expected a JSON object, found {json_name(value)}")
    return Row(file, number, value)


def _check_file(file: Path, key: str) -> None:
    if file.is_dir():
        near = sorted(path.name for path in file.glob("*.jsonl"))[:3]
        raise UserError(f"{key}: {file} is a folder; name a file{_of(near, 'it holds')}")
    if not file.exists():
        raise UserError(f"{key}: {file}: no such file{_nearby(file)}")
    try:
        with file.open("rb") as stream:
            is_empty = not stream.read(1)
    except OSError as error:
        raise UserError(f"{key}: {file}: cannot be read: {error.strerror}") from None
    if is_empty:
        raise UserError(f"{key}: {file} is empty; expected one JSON object on each line")


def _nearby(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; there is no folder {file.parent} either"
    names = [path.name for path in file.parent.iterdir() if path.is_file()]
    near = difflib.get_close_matches(file.name, names, n=3)
    return _of(near or sorted(name for name in names if name.endswith(".jsonl"))[:3], "there is")


def _of(names: Sequence[str], verb: str) -> str:
    return f"; {verb} {', '.join(names)}" if names else ""
