"""Read the sources of the run file: find their files, split these into rows, parse the rows.

A source is an item of the setting train_data or eval_data. `read_lines` yields `Line` objects,
which are unparsed rows, and `parse_line` parses one. The two are separate so that one process can
read files while worker processes parse. A row that cannot be parsed becomes a BadRow. If the rest
of a file cannot be read, UserError is raised.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pipeline.config.data_names import DataSource
from pipeline.config.hub import HubSplit
from pipeline.errors import UserError
from pipeline.rows.content import (
    SUFFIXES,
    compression_ratio,
    detect_compression,
    detect_kind,
    open_data,
    require_line_feeds,
    require_utf8,
    strip_byte_order_marks,
)
from pipeline.rows.csv_rows import csv_rows
from pipeline.rows.files import DataFiles, check_files, find_files, has_known_suffix
from pipeline.rows.json_rows import is_jsonl, json_value_rows, jsonl_rows
from pipeline.rows.layouts import refuse_whole_table
from pipeline.rows.lines import NOT_UTF8, BadRow, Line, Row, size_of
from pipeline.rows.values import DECODER, DuplicateKeyError, json_type

_FIRST_BYTES = 1000  # read to check that a file is of the format that its name tells
# The compression ratio is measured on this multiple of the sample's bytes, because the decompressor
# reads large blocks.
_RATIO_SAMPLES = 4

__all__ = [
    "BadRow",
    "Line",
    "Row",
    "Sample",
    "Source",
    "detect_kind",
    "parse_line",
    "read_lines",
    "read_rows",
    "require_disjoint",
    "resolve_sources",
    "sample_file",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of the run file, with its files in reading order.

    `name`: the name in the run file; for a hub data set, with the commit. `notes`: messages about
    skipped files.
    """

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    limit: int | None = None
    notes: tuple[str, ...] = ()


class Sample(NamedTuple):
    """The first rows of a file, unparsed; their share (0 to 1) of the file; their size in bytes."""

    lines: list[Line]
    share: float
    num_bytes: int


def resolve_sources(sources: Sequence[DataSource], key: str) -> list[Source]:
    """Find the files of each source in the setting `key`, without a download.

    Raises UserError if a file cannot be read, or if it is in two sources.
    """
    if not sources:
        raise UserError(f"{key}: names no data; give a file, a folder, a glob, or a list of these")
    resolved = [_resolve_source(source, key) for source in sources]
    source_of_file: dict[Path, Source] = {}
    for source in resolved:
        for file in source.files:
            if (other := source_of_file.setdefault(file.resolve(), source)) is not source:
                raise UserError(
                    f"{key}: {file} is in two sources, {other.name} and {source.name}; name each "
                    "file once; a weight above 1 uses its rows more often"
                )
    return resolved


def require_disjoint(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Raise UserError if a file is in both the training and the held-out data."""
    train_files = {file.resolve(): source.name for source in train for file in source.files}
    for source in held_out:
        for file in source.files:
            if (name := train_files.get(file.resolve())) is not None:
                raise UserError(
                    f"eval_data: {file} is also in train_data ({name}); name different files, or "
                    "hold out a share of the training rows, such as eval_data: 0.05"
                )


def read_lines(source: Source) -> Iterator[Line]:
    """The unparsed rows of a source in order, up to its limit; blank lines are skipped.

    Raises UserError if a file is damaged or the source has no row.
    """
    all_lines = (line for file in source.files for line in _lines_of_file(file))
    is_empty = True
    for line in islice(all_lines, source.limit):
        is_empty = False
        yield line
    if is_empty:
        raise UserError(
            f"{source.name}: has no row; it has only blank lines, an empty list or a header"
        )


def parse_line(line: Line) -> Row | BadRow:
    """Parse a row: a Row, or a BadRow with the reason why that is impossible."""
    file, number, offset, content, fault = line
    if fault:
        return BadRow(file, number, fault, offset)
    value = content if isinstance(content, dict) else _object_or_fault(content)
    if isinstance(value, str):
        return BadRow(file, number, value, offset)
    return Row(file, number, value, offset)


def read_rows(sources: Iterable[Source]) -> Iterator[Row | BadRow]:
    """All rows of the sources in order, parsed in this process."""
    return (parse_line(line) for source in sources for line in read_lines(source))


def sample_file(file: Path, num_bytes: int) -> Sample:
    """The rows that begin within the first `num_bytes` of a file, at least one.

    Raises UserError, OSError, EOFError or ValueError if these rows cannot be read. ValueError is
    also raised for a compressed table, because it would have to be decompressed completely.
    """
    kind = detect_kind(file)
    if kind == "parquet" or kind == "arrow":
        return _sample_of_table(file, kind, num_bytes)
    lines: list[Line] = []
    with open_data(file) as stream:
        for line in _text_lines(file, stream):
            assert line.offset is not None
            if line.offset >= num_bytes and lines:
                share = min(line.offset / _decompressed_size(file, stream, line.offset), 1.0)
                return Sample(lines, share, line.offset)
            lines.append(line)
    return Sample(lines, 1.0, min(num_bytes, file.stat().st_size))


def _sample_of_table(file: Path, kind: Literal["parquet", "arrow"], num_bytes: int) -> Sample:
    """The first rows of a table, of about `num_bytes`."""
    from pipeline.rows.tables import num_rows, table_rows

    total, lines, size = num_rows(file, kind), list[Line](), 0
    for line in table_rows(file, kind):
        lines.append(line)
        size += size_of(line.content)
        if size >= num_bytes:
            break
    return Sample(lines, len(lines) / max(total, 1), min(size, num_bytes))


def _decompressed_size(file: Path, stream: BinaryIO, num_read: int) -> float:
    """Estimated size of the decompressed file, from the compression ratio of its beginning.

    `num_read`: bytes already read from the stream.
    """
    num_more = 0 if detect_compression(file) is None else _RATIO_SAMPLES * num_read
    while num_more > 0 and (more := stream.read(min(num_more, 2**16))):
        num_more -= len(more)
    return file.stat().st_size * compression_ratio(stream)


def _resolve_source(source: DataSource, key: str) -> Source:
    """Find the files of an item of the setting `key`."""
    name = source.path
    split = HubSplit.parse(name)
    if split is None:
        data = find_files(name, key)
    else:
        from pipeline.rows.fetch import split_files

        data = DataFiles(split_files(split, key))
        check_files(data.files, name, key)
        snapshot = split.snapshot()
        assert snapshot is not None
        name = f"{split.name}@{snapshot.name}:{split.split}"
    return Source(
        name=name,
        files=tuple(data.files),
        weight=source.weight,
        limit=source.limit,
        notes=data.notes,
    )


def _lines_of_file(file: Path) -> Iterator[Line]:
    """The unparsed rows of a file. Raises UserError if the file is damaged."""
    number = 0
    try:
        kind = detect_kind(file)
        if kind == "parquet" or kind == "arrow":
            from pipeline.rows.tables import table_rows

            yield from table_rows(file, kind)
            return
        with open_data(file) as stream:
            for line in _text_lines(file, stream):
                number = line.number
                yield line
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: damaged or truncated after line {number}: {reason}") from None


def _text_lines(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The unparsed rows of a JSONL, JSON or CSV file.

    A file named *.json may also be JSONL; its first lines show which.
    """
    require_utf8(file)
    kind = detect_kind(file)
    if kind != "json":  # a JSON file is not read by lines
        require_line_feeds(file)
    if kind == "csv":
        return csv_rows(file, stream)
    with open_data(file) as beginning:
        refuse_whole_table(file, beginning)
    with open_data(file) as beginning:
        if kind == "jsonl":
            _require_lines(file, beginning.read(_FIRST_BYTES))
            return jsonl_rows(file, stream)
        if not has_known_suffix(file):
            _require_json(file, beginning.read(_FIRST_BYTES))
    with open_data(file) as beginning:
        read_file = jsonl_rows if is_jsonl(beginning) else json_value_rows
    return read_file(file, stream)


def _require_json(file: Path, beginning: bytes) -> None:
    """Raise UserError if a file with an unknown suffix does not begin like JSON."""
    if strip_byte_order_marks(beginning).lstrip()[:1] not in (b"{", b"[", b""):
        raise UserError(
            f"{file}: unknown format: the name has no known suffix ({SUFFIXES}), and the content "
            "does not begin with { or [, as JSON does; if it is a table of text with a header, "
            "rename it to *.csv; else convert it to JSONL, CSV or Parquet"
        )


def _require_lines(file: Path, beginning: bytes) -> None:
    """Raise UserError if a file named *.jsonl holds a JSON list on several lines."""
    lines = [line for line in beginning.split(b"\n") if line.strip()]
    first = strip_byte_order_marks(b"".join(lines[:1])).strip()
    has_object = any(isinstance(_object_or_fault(line), dict) for line in lines)
    if first in (b"[", b"[{") and not has_object:
        raise UserError(f"{file}: a JSON list on several lines, not JSONL; rename it to .json")


def _object_or_fault(content: bytes) -> dict[str, Any] | str:
    """Parse a JSON object; if the content is not one, the result is the reason as a string."""
    try:
        text = content.decode("utf-8")
        value = DECODER.decode(text)
    except UnicodeDecodeError:
        return NOT_UTF8
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            rest = text[error.pos :].strip()
            if rest == ",":
                return "not valid JSON: a comma after the row; remove it"
            if rest.startswith(("{", "[")):
                return "not valid JSON: a line with more than one value; write one row per line"
            return f"not valid JSON: text after the row, {rest[:20]!r}; remove it"
        return f"not valid JSON: {error.msg.removesuffix(' at').removesuffix(' starting')}"
    except DuplicateKeyError:
        return "not valid JSON: duplicate key"
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting
        return "not valid JSON: nested too deeply or a number too long"
    return value if isinstance(value, dict) else f"expected a JSON object, found {json_type(value)}"
