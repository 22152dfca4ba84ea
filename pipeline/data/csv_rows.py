"""CSV files -> lines: every column is text, and a row that does not fit is one bad row.

`datasets` does not read these: one row of too many fields, or one byte that is not UTF-8, fails
its whole file, and it makes a missing value of the answer `NA` and a number of the answer `7`.
"""

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.data import rows
from pipeline.data.rows import Line
from pipeline.errors import UserError

_MAX_IN_VAIN = 16  # times the longest row, read twice because of quotes: no CSV takes more
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Record(NamedTuple):
    number: int
    offset: int
    fields: list[str]
    fault: str


def csv_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The rows below the header. Raises UserError for a header that names no columns, or twice."""
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
    lines = _Lines(file, stream)
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin()
        fields, fault = [], ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _TooLong:
            fault = rows.too_long()
        except csv.Error:
            fault = "not valid CSV: quotes that do not match"
        if fault:
            lines.go_back()
            reader = csv.reader(lines, strict=True)
        if fields or fault or lines.fault:
            yield _Record(lines.number, lines.offset, fields, fault or lines.fault)


class _TooLong(Exception):
    """A record went over the limit: a long one, or a quote that nothing closes."""


class _Lines:
    """The file's lines as text, where the record begun last starts, and what is wrong with it."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.number, self.offset, self.fault = 1, 0, ""
        self._file, self._stream = file, stream
        self._again: deque[bytes] = deque()
        self._record: list[bytes] = []
        self._size = self._in_vain = 0

    def begin(self) -> None:
        """A record begins with the next line."""
        self.number += len(self._record)
        self.offset += self._size
        self._record, self._size, self.fault = [], 0, ""

    def go_back(self) -> None:
        """Give the record's lines again but for the first, which is bad."""
        self._again.extendleft(reversed(self._record[1:]))
        first = self._record[:1]
        self._in_vain += self._size
        self._record, self._size = first, sum(map(len, first))
        if self._size > rows.MAX_ROW_BYTES:
            self._end_line()
        if self._in_vain > _MAX_IN_VAIN * rows.MAX_ROW_BYTES:
            raise UserError(
                f"{self._file}:{self.number}: quotes do not match, here and in many rows before; "
                "is the file CSV?"
            )

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._stream.readline(self._limit)
        if not line:
            raise StopIteration
        self._record.append(line)
        self._size += len(line)
        if self._size > rows.MAX_ROW_BYTES:
            raise _TooLong
        if self.offset == 0 and len(self._record) == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.fault = "not valid UTF-8"
            return line.decode(errors="replace")

    @property
    def _limit(self) -> int:
        return rows.MAX_ROW_BYTES + 1

    def _end_line(self) -> None:
        """Pass over the rest of a line that is too long by itself."""
        line = self._record[0]
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(self._limit)
            self._size += len(line)
