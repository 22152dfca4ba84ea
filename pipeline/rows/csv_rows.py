"""CSV files -> Lines: every column is text, and a row that does not fit is one bad row.

`datasets` and pyarrow do not read these: one row of too many fields, or one byte that is not UTF-8,
fails the whole file, an open quote swallows the rest of it, and an answer `NA` becomes missing.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import UserError
from pipeline.rows import lines as rows
from pipeline.rows.content import without_marks
from pipeline.rows.lines import Line

_CONTENT = re.compile(rb'[^",;\t\r\n]+')
_DELIMITERS = (",", ";", "\t")
_NAMED_DELIMITER = re.compile(rb'"?sep=(.)"?\s*')  # Excel reads and writes such a first line


class _Record(NamedTuple):
    number: int
    offset: int
    fields: list[str]
    fault: str


def csv_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The rows below the header, separated by commas, semicolons or tabs as the header is.

    Raises UserError for a header that names no columns, or one twice, and for quotes that do not
    match: the rows behind them cannot be told from text.
    """
    records = _records(file, stream)
    header = next(records, None)
    if header is None or header.fault:
        found = header.fault if header else "no row"
        raise UserError(f"{file}:1: expected the names of the columns; found {found}")
    names = header.fields
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file}:1: the header names {', '.join(twice[:5])} twice")
    for record in records:
        fault = record.fault
        if not fault and len(record.fields) != len(names):
            amount = "fewer" if len(record.fields) < len(names) else "more"
            fault = f"a row with {amount} fields than the header has ({len(names)})"
        elif not fault and record.fields == names:
            fault = "the header again, as where files were joined"
        columns = {} if fault else dict(zip(names, record.fields, strict=True))
        yield Line(file, record.number, record.offset, columns, fault)


def _records(file: Path, stream: BinaryIO) -> Iterator[_Record]:
    csv.field_size_limit(rows.MAX_ROW_BYTES)
    lines = _Lines(stream)
    reader = csv.reader(lines, strict=True, delimiter=lines.delimiter())
    while True:
        lines.begin()
        fields = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The lines that follow may be the rest of a quoted text.
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
    """The file's lines as text, with the place and the fault of the current record."""

    def __init__(self, stream: BinaryIO) -> None:
        self.number, self.offset = 1, 0
        self.count, self.fault, self.has_quotes = 0, "", False
        self._stream, self._size = stream, 0
        self._ahead: list[bytes] = []

    def delimiter(self) -> str:
        """The delimiter of the header, which is the first line that is not blank."""
        while not self._ahead or self._ahead[-1].isspace():
            self._ahead.append(self._stream.readline(rows.MAX_ROW_BYTES + 1))
        if named := _NAMED_DELIMITER.fullmatch(without_marks(self._ahead[-1])):
            self.count, self._size = len(self._ahead), sum(map(len, self._ahead))
            self._ahead.clear()
            return named[1].decode(errors="replace")
        header = self._ahead[-1].decode(errors="replace")
        return next((delimiter for delimiter in _DELIMITERS if delimiter in header), ",")

    def begin(self) -> None:
        """A record begins with the next line."""
        self.number += self.count
        self.offset += self._size
        self.count = self._size = 0
        self.fault, self.has_quotes = "", False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ahead:
            line = self._ahead.pop(0)
        else:
            line = self._stream.readline(rows.MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.count += 1
        self._size += len(line)
        if self._size > rows.MAX_ROW_BYTES:
            self.fault = rows.too_long()
            line = self._squeezed(line)
        self.has_quotes = self.has_quotes or self.count > 1 or b'"' in line
        if self.count == 1:
            line = without_marks(line)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.fault = self.fault or rows.NOT_UTF8
            return line.decode(errors="replace")

    def _squeezed(self, line: bytes) -> bytes:
        """The quotes and delimiters of a line whose row is bad: a long one needs no memory."""
        parts = [_bare(line)]
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(rows.MAX_ROW_BYTES)
            self._size += len(line)
            parts.append(_bare(line))
        bare = b"".join(parts)
        return bare if self.count == 1 or b'"' in bare else b""  # from line 2 on within quotes


def _bare(part: bytes) -> bytes:
    without_escaped = part.replace(b'""', b"")  # a quote that is written twice ends nothing
    return _CONTENT.sub(b"x", without_escaped)
