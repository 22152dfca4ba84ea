"""Sources named by the run file -> lines -> rows; a bad row is one bad row. No torch.

`lines` only finds where rows lie, so that one process can feed many which `parse`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.data_names import DataSource
from pipeline.config.hub import HubSplit
from pipeline.errors import UserError
from pipeline.rows.csv_rows import csv_rows
from pipeline.rows.files import (
    SUFFIXES,
    check_files,
    find_files,
    has_known_suffix,
    kind_of,
    open_data,
)
from pipeline.rows.json_rows import is_line_by_line, line_rows, value_rows
from pipeline.rows.lines import BadRow, Line, Row
from pipeline.rows.values import DECODER, DuplicateKeyError, json_name

_FIRST_BYTES = 1000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

__all__ = [
    "BadRow",
    "Line",
    "Row",
    "Source",
    "kind_of",
    "lines",
    "parse",
    "read_rows",
    "require_apart",
    "resolve",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of the run file and its files, in the order in which they are read.

    `name`: as in the run file; of a hub data set with its commit.
    """

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    limit: int | None = None


def resolve(sources: Sequence[DataSource], key: str) -> list[Source]:
    """The sources of a setting with their files, each there, readable and of one source.

    Raises UserError that names the key. Nothing is fetched.
    """
    if not sources:
        raise UserError(f"{key}: names no data; give a file, a folder, a glob or a list of them")
    found = [_resolved(source, key) for source in sources]
    first: dict[Path, Source] = {}
    for source in found:
        for file in source.files:
            if (other := first.setdefault(file.resolve(), source)) is not source:
                raise UserError(
                    f"{key}: {file} is in two sources, {other.name} and {source.name}; name each "
                    "file once, with a weight to have its rows more often"
                )
    return found


def require_apart(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Raise UserError where a file is in both, as when one is in the other's folder."""
    trained = {file.resolve(): source.name for source in train for file in source.files}
    for source in held_out:
        for file in source.files:
            if (name := trained.get(file.resolve())) is not None:
                raise UserError(
                    f"eval_data: {file} is also in train_data ({name}); name files that are apart, "
                    "or hold out a share of the rows, such as eval_data: 0.05"
                )


def lines(source: Source) -> Iterator[Line]:
    """The source's lines in order, no more than its limit; blank ones are none.

    Raises UserError where a file is damaged so that what follows cannot be read, and for a source
    that has none.
    """
    every = (line for file in source.files for line in _lines_of(file))
    is_empty = True
    for line in islice(every, source.limit):
        is_empty = False
        yield line
    if is_empty:
        raise UserError(
            f"{source.name}: no row; only blank lines, an empty list, or columns without rows"
        )


def parse(line: Line) -> Row | BadRow:
    """The row of a line, or why it has none."""
    file, number, offset, content, fault = line
    if fault:
        return BadRow(file, number, fault, offset)
    if isinstance(content, dict):
        return Row(file, number, content, offset)
    found = _parsed(content)
    if isinstance(found, str):
        return BadRow(file, number, found, offset)
    return Row(file, number, found, offset)


def read_rows(sources: Iterable[Source]) -> Iterator[Row | BadRow]:
    """Every row of the sources in order, in this process."""
    return (parse(line) for source in sources for line in lines(source))


def _resolved(source: DataSource, key: str) -> Source:
    name = source.path
    split = HubSplit.parse(name)
    if split is None:
        files = find_files(name, key)
    else:
        from pipeline.rows.fetch import split_files

        files = split_files(split, key)
        check_files(files, name, key)
        snapshot = split.snapshot()
        assert snapshot is not None
        name = f"{split.name}@{snapshot.name}:{split.split}"
    return Source(name=name, files=tuple(files), weight=source.weight, limit=source.limit)


def _lines_of(file: Path) -> Iterator[Line]:
    number = 0
    try:
        kind = kind_of(file)
        if kind == "parquet" or kind == "arrow":
            from pipeline.rows.tables import table_rows

            yield from table_rows(file, kind)
            return
        if kind == "json":
            if not has_known_suffix(file):
                _require_json(file)
            with open_data(file) as stream:
                kind = "jsonl" if is_line_by_line(stream) else "json"
        elif kind == "jsonl":
            _require_lines(file)
        read = {"jsonl": line_rows, "json": value_rows, "csv": csv_rows}[kind]
        with open_data(file) as stream:
            for line in read(file, stream):
                number = line.number
                yield line
    except (OSError, EOFError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: damaged or cut off behind line {number}: {said}") from None


def _require_json(file: Path) -> None:
    """Raise UserError unless the file, whose name does not say what it is, begins like JSON."""
    with open_data(file) as stream:
        first = stream.read(_FIRST_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]
    if first not in (b"{", b"[", b""):
        raise UserError(
            f"{file}: the name does not say what it holds, and as JSON it would begin with {{ or "
            f"[; give it one of the suffixes {SUFFIXES}"
        )


def _require_lines(file: Path) -> None:
    """Raise UserError for a list over several lines in a file that is named as one row a line."""
    with open_data(file) as stream:
        begin = [line for line in stream.read(_FIRST_BYTES).split(b"\n") if line.strip()]
    first = b"".join(begin[:1]).removeprefix(_BYTE_ORDER_MARK).strip()
    if first in (b"[", b"[{") and not any(isinstance(_parsed(line), dict) for line in begin):
        raise UserError(f"{file}: a list over several lines, which is no JSONL; name it .json")


def _parsed(content: bytes) -> dict[str, Any] | str:
    """The object, or why there is none."""
    try:
        value = DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" at").removesuffix(" starting")
        return f"not valid JSON: {said}"
    except DuplicateKeyError:
        return "not valid JSON: a key is there twice"
    except (ValueError, RecursionError):  # a number of thousands of digits; nesting without end
        return "not valid JSON: nested too deep or a number too long"
    return value if isinstance(value, dict) else f"expected a JSON object, found {json_name(value)}"
