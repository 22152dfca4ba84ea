"""Reader of CSV files: every value is text, and a malformed row is one bad row.

`datasets` and pyarrow are not used. With them, a row with too many fields or with invalid UTF-8
fails the whole file. An unclosed quote consumes the rest of the file, and the text `NA` becomes a
missing value.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import UserError
from pipeline.rows import lines as row_limits
from pipeline.rows.content import strip_byte_order_marks
from pipeline.rows.lines import Line

_CONTENT = re.compile(rb'[^",;\t\r\n]+')  # everything except quotes, delimiters and line ends
_DELIMITERS = (",", ";", "\t")
_DELIMITER_LINE = re.compile(rb'"?sep=(.)"?\s*')  # first line of a file from Excel, such as sep=;


class _Record(NamedTuple):
    """A CSV record. `number`, `offset`: line and byte of its start.

    `fault`: why it is bad; empty if it is not.
    """

    number: int
    offset: int
    fields: list[str]
    fault: str


def csv_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The rows of a CSV file after its header.

    The delimiter of the header applies to all rows. Raises UserError for a missing header and for a
    duplicate column name. It is also raised for unmatched quotes, because the start of the next row
    is then unknown.
    """
    records = _records(file, stream)
    header = next(records, None)
    if header is None or header.fault:
        reason = header.fault if header else "no row"
        raise UserError(
            f"{file}:1: expected a header with the names of the columns; found {reason}"
        )
    names = header.fields
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file}:1: the header names {', '.join(duplicates[:5])} twice")
    for record in records:
        fault = record.fault
        if not fault and len(record.fields) != len(names):
            amount = "fewer" if len(record.fields) < len(names) else "more"
            fault = f"a row with {amount} fields than the header has ({len(names)})"
        elif not fault and record.fields == names:
            fault = "a second header, as in concatenated files"
        columns = {} if fault else dict(zip(names, record.fields, strict=True))
        yield Line(file, record.number, record.offset, columns, fault)


def _records(file: Path, stream: BinaryIO) -> Iterator[_Record]:
    """The records of a CSV file, the header included."""
    csv.field_size_limit(row_limits.MAX_ROW_BYTES)
    lines = _LineReader(stream)
    reader = csv.reader(lines, strict=True, delimiter=lines.delimiter())
    while True:
        lines.start_record()
        fields = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # If the row has a quote, the next lines may belong to its quoted text.
            if lines.has_quotes:
                raise _unmatched_quotes(file, lines, error) from None
            lines.fault = "not valid CSV: a carriage return in the middle of a row"
        if fields or lines.fault:
            yield _Record(lines.number, lines.offset, fields, lines.fault)


def _unmatched_quotes(file: Path, lines: "_LineReader", error: csv.Error) -> UserError:
    """The error for a record whose end is unknown."""
    return UserError(
        f"{file}:{lines.number}: the row that begins here has unmatched quotes (read up to line "
        f"{lines.number + lines.count - 1}: {error}), so the start of the next row is unknown; "
        'write each quote within a quoted text as "", or convert the file to JSONL'
    )


class _LineReader:
    """Iterator over the lines of a file, for `csv.reader`, with the state of the current record.

    `number`, `offset`: line and byte at which the record begins. `count`: its lines read so far.
    `fault`: why the record is bad. `has_quotes`: whether it contains a quote.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.number, self.offset = 1, 0
        self.count, self.fault, self.has_quotes = 0, "", False
        self._stream, self._size = stream, 0  # bytes of the record that have been read so far
        self._ahead: list[bytes] = []  # lines that `delimiter` has read

    def delimiter(self) -> str:
        """The delimiter, detected from the first line that is not blank (`sep=;` or the header)."""
        while not self._ahead or self._ahead[-1].isspace():
            self._ahead.append(self._stream.readline(row_limits.MAX_ROW_BYTES + 1))
        if named := _DELIMITER_LINE.fullmatch(strip_byte_order_marks(self._ahead[-1])):
            self.count, self._size = len(self._ahead), sum(map(len, self._ahead))
            self._ahead.clear()
            return named[1].decode(errors="replace")
        header = self._ahead[-1].decode(errors="replace")
        return next((delimiter for delimiter in _DELIMITERS if delimiter in header), ",")

    def start_record(self) -> None:
        """Start a new record at the next line."""
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
            line = self._stream.readline(row_limits.MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.count += 1
        self._size += len(line)
        if self._size > row_limits.MAX_ROW_BYTES:
            self.fault = row_limits.too_long()
            line = self._drop_content(line)
        self.has_quotes = self.has_quotes or self.count > 1 or b'"' in line
        if self.count == 1:
            line = strip_byte_order_marks(line)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.fault = self.fault or row_limits.NOT_UTF8
            return line.decode(errors="replace")

    def _drop_content(self, line: bytes) -> bytes:
        """The line reduced to its quotes and delimiters, so that a long bad row needs no memory.

        `line`: at most MAX_ROW_BYTES of the line; the rest of it is read here.
        """
        chunks = [_quotes_and_delimiters(line)]
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(row_limits.MAX_ROW_BYTES)
            self._size += len(line)
            chunks.append(_quotes_and_delimiters(line))
        reduced = b"".join(chunks)
        # All lines of a record but the first begin inside a quoted text. Without a quote such a
        # line also ends inside of it, so its delimiters do not count.
        return reduced if self.count == 1 or b'"' in reduced else b""


def _quotes_and_delimiters(chunk: bytes) -> bytes:
    """The chunk with each run of other characters replaced by one `x`."""
    without_escaped = chunk.replace(b'""', b"")  # a doubled quote does not end the quoted text
    return _CONTENT.sub(b"x", without_escaped)
