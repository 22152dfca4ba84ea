"""CSV files -> lines: every column is text, and a row that does not fit is one bad row.

`datasets` does not read these: one row of too many fields, or one byte that is not UTF-8, fails
its whole file, and it makes a missing value of the answer `NA` and a number of the answer `7`.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import UserError
from pipeline.rows import lines as rows
from pipeline.rows.lines import Line

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONTENT = re.compile(rb'[^",\r\n]+')


class _Record(NamedTuple):
    number: int
    offset: int
    fields: list[str]
    fault: str


def csv_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The rows below the header.

    Raises UserError for a header that names no columns, or one twice, and for quotes that do not
    match: what follows them is not guessed.
    """
    records = _records(file, stream)
    header = next(records, None)
    if header is None or header.fault:
        said = header.fault if header else "no row"
        raise UserError(f"{file}:1: expected the names of the columns; found {said}")
    names = header.fields
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file}:1: the header names {', '.join(twice[:5])} twice")
    for record in records:
        fault = record.fault
        if not fault and len(record.fields) != len(names):
            amount = "fewer" if len(record.fields) < len(names) else "more"
            fault = f"a row with {amount} fields than the header has ({len(names)})"
        columns = {} if fault else dict(zip(names, record.fields, strict=True))
        yield Line(file, record.number, record.offset, columns, fault)


def _records(file: Path, stream: BinaryIO) -> Iterator[_Record]:
    csv.field_size_limit(rows.MAX_ROW_BYTES)
    lines = _Lines(stream)
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin()
        fields = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The lines that follow may be the rest of a text: as rows they would be made up.
            if lines.has_quotes:
                raise _lost(file, lines, error) from None
            lines.fault = "not valid CSV: a carriage return inside a row"
        if fields or lines.fault:
            yield _Record(lines.number, lines.offset, fields, lines.fault)


def _lost(file: Path, lines: "_Lines", error: csv.Error) -> UserError:
    return UserError(
        f"{file}:{lines.number}: quotes do not match in the row that begins here (read to line "
        f"{lines.number + lines.count - 1}: {error}), and where the next row begins is not "
        'certain; write a quote inside a quoted text twice (""), or the rows as JSONL'
    )


class _Lines:
    """The file's lines as text, where the record begun last starts, and what is wrong with it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.number, self.offset = 1, 0
        self.count, self.fault, self.has_quotes = 0, "", False
        self._stream, self._size = stream, 0

    def begin(self) -> None:
        """A record begins with the next line."""
        self.number += self.count
        self.offset += self._size
        self.count = self._size = 0
        self.fault, self.has_quotes = "", False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(rows.MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.count += 1
        self._size += len(line)
        if self._size > rows.MAX_ROW_BYTES:
            self.fault = rows.too_long()
            line = self._squeezed(line)
        self.has_quotes = self.has_quotes or self.count > 1 or b'"' in line
        if self.offset == 0 and self.count == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.fault = self.fault or "not valid UTF-8"
            return line.decode(errors="replace")

    def _squeezed(self, line: bytes) -> bytes:
        """What says where a row ends, of a line whose row is bad: so long ones need no memory."""
        parts = [_bare(line)]
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(rows.MAX_ROW_BYTES)
            self._size += len(line)
            parts.append(_bare(line))
        bare = b"".join(parts)
        return bare if self.count == 1 or b'"' in bare else b""  # inside a text from line 2 on


def _bare(part: bytes) -> bytes:
    return _CONTENT.sub(
        b"x", part.replace(b'""', b"")
    )  # a quote that is written twice ends nothing
