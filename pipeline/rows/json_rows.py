"""Reader of JSON files: JSONL, one JSON list, or concatenated JSON values.

At any time one row and a buffer are in memory. Python's JSON decoder finds the end of each row.
After a row that is not valid JSON, reading continues at the next line that opens an object and is
indented no deeper than that row. If there is no such line, the start of the next row is unknown,
and a UserError names the broken row.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError
from pipeline.rows import lines as row_limits
from pipeline.rows.content import strip_byte_order_marks
from pipeline.rows.lines import Line

_CHUNK_BYTES, _MAX_INDENT = 2**20, 200
# Lines that `is_jsonl` parses, and bytes of a line that it reads to see whether it begins with {.
_NUM_SNIFFED, _SNIFFED_BYTES = 10, 2**16
# An error within this many characters of the buffer's end may only mean that a token such as `true`
# has not been read completely. Longer tokens are strings; the message of an error shows whether it
# is in a string.
_MAX_TOKEN = 16
# Limit on the text that is scanned again after broken rows, as a multiple of MAX_ROW_BYTES.
_MAX_RESCANNED = 16
_SEPARATORS = re.compile("[ \t\r\n,\ufeff]*")
_INDENT = re.compile(r"[ \t\[]*")
# A line that begins with `{`, or with `}, {`. Group 1: its indentation. Group 2: the opening brace.
_OPENS_ROW = re.compile(r"\n([ \t]*)(?:\}[ \t]*,[ \t]*)?(\{)")
_NO_END = "not valid JSON: the file ends inside the row"
_NO_LIST_END = "not valid JSON: the file ends before its list does"
_TOO_DEEP = "not valid JSON: nested too deep"
_DECODER = json.JSONDecoder()
# `int` raises ValueError for a number with thousands of digits. This decoder finds the end of that
# number; parse_line rejects the row later.
_DECODER_OF_LONG_NUMBERS = json.JSONDecoder(parse_int=str)


def jsonl_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The rows of a JSONL file, one for each line that is not blank."""
    number = offset = 0
    limit = row_limits.MAX_ROW_BYTES
    while line := stream.readline(limit + 1):
        number += 1
        start, offset = offset, offset + len(line)
        if len(line) > limit:
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
                offset += len(line)
            yield Line(file, number, start, b"", row_limits.too_long())
            continue
        line = strip_byte_order_marks(line)
        if line and not line.isspace():
            yield Line(file, number, start, line)


def is_jsonl(stream: BinaryIO) -> bool:
    """Whether the file is JSONL: each of its first nonblank lines is a complete JSON object."""
    num_objects = 0
    while num_objects < _NUM_SNIFFED and (line := stream.readline(_SNIFFED_BYTES)):
        if not (line := strip_byte_order_marks(line).lstrip()):
            continue
        if not line.startswith(b"{"):  # stop reading: a list may be one line of gigabytes
            return False
        if not line.endswith(b"\n"):
            line += stream.readline(row_limits.MAX_ROW_BYTES)
        num_objects += 1
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return False
    return num_objects > 0


def json_value_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The rows of a JSON list or of concatenated JSON values; a row may span several lines.

    Raises UserError if the start of the row after a broken row cannot be found.
    """
    return _ValueScanner(file, stream).lines()


class _BrokenError(Exception):
    """Raised for a row that is not valid JSON.

    `fault`: the reason, for the BadRow. `position`: index of the error in the buffer.
    """

    def __init__(self, fault: str, position: int) -> None:
        super().__init__(fault)
        self.fault, self.position = fault, position


class _ValueScanner:
    """Scanner for the rows of one file, with a buffer of decoded text and a position in it."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream, self._has_ended = file, stream, False
        # Invalid UTF-8 is decoded to lone surrogates, which are encoded back to the same bytes.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._position = "", 0
        self._offset, self._number = 0, 1  # byte and line number in the file at the position
        self._line_start = ""  # the current line up to the position, at most _MAX_INDENT characters
        self._num_rescanned = 0  # characters that are scanned again because of broken rows

    def lines(self) -> Iterator[Line]:
        """The rows of the file; a broken row is a Line with a fault."""
        is_in_list = False
        while self._skip_separators():
            if self._text[self._position] == ("]" if is_in_list else "["):
                is_in_list = not is_in_list
                self._advance(self._position + 1)
                continue
            row = Line(self._file, self._number, self._offset, b"")
            try:
                content = self._advance(self._value_end())
            except _BrokenError as error:
                yield row._replace(fault=error.fault)
                self._skip_broken_row(row, error, is_in_list=is_in_list)
                continue
            is_long = len(content) > row_limits.MAX_ROW_BYTES
            yield (
                row._replace(fault=row_limits.too_long())
                if is_long
                else row._replace(content=content)
            )
        if is_in_list:
            yield Line(self._file, self._number, self._offset, b"", _NO_LIST_END)

    def _skip_separators(self) -> bool:
        """Advance to the next value or bracket; False at the end of the file."""
        while True:
            separators = _SEPARATORS.match(self._text, self._position)
            assert separators is not None
            if separators.end() > self._position:
                self._advance(separators.end())
            if self._position < len(self._text):
                return True
            if not self._read_more():
                return False

    def _value_end(self) -> int:
        """The end of the value at the current position; more of the file is read if needed.

        Raises _BrokenError if the value is not valid JSON.
        """
        decoder = _DECODER
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                position, is_in_string = error.pos, error.msg.startswith("Unterminated string")
                reason = error.msg.removesuffix(" at").removesuffix(" starting")
            except ValueError:
                decoder = _DECODER_OF_LONG_NUMBERS
                continue
            except RecursionError:
                raise _BrokenError(_TOO_DEEP, self._position) from None
            else:
                # A number at the end of the buffer may have more digits.
                is_complete = isinstance(value, dict | list | str) or end < len(self._text)
                if is_complete or not self._read_more():
                    return end
                continue
            if not is_in_string and position < len(self._text) - _MAX_TOKEN:
                raise _BrokenError(f"not valid JSON: {reason}", position)
            if len(self._text) - self._position > row_limits.MAX_ROW_BYTES:
                raise _BrokenError(row_limits.too_long(), len(self._text))
            if not self._read_more():
                is_at_end = position >= len(self._text.rstrip())
                is_truncated = is_in_string or (is_at_end and reason.startswith("Expecting"))
                fault = _NO_END if is_truncated else f"not valid JSON: {reason}"
                raise _BrokenError(fault, position)

    def _skip_broken_row(self, row: Line, error: _BrokenError, *, is_in_list: bool) -> None:
        """Advance to the row after a broken row, or to the end of the file if no row can follow.

        Raises UserError if a row may follow and its start cannot be found.
        """
        self._num_rescanned += error.position - self._position
        if self._num_rescanned > _MAX_RESCANNED * row_limits.MAX_ROW_BYTES:
            raise UserError(
                f"{self._file}:{row.number}: brackets or quotes do not match, in this row and in "
                "many rows before it; is the file JSON?"
            )
        text = self._text.rstrip()
        # If the file ends inside the row and its last character is `]`, that bracket closes the
        # list of rows. The decoder has then read all later rows as values in this one.
        is_open = error.fault == _NO_END and error.position >= len(text)
        includes_later_rows = is_in_list and is_open and text.endswith("]")
        rows_may_follow = includes_later_rows or self._text.find("{", error.position) >= 0
        indent = _INDENT.match(self._line_start)
        assert indent is not None
        while not self._move_to_next_row(indent.end()):
            self._drop_searched_lines()
            num_searched = len(self._text) - self._position
            if not self._read_more():
                break
            rows_may_follow |= self._text.find("{", num_searched) >= 0
        else:  # the next row was found
            return
        if rows_may_follow:
            raise UserError(
                f"{self._file}:{row.number}: (byte {row.offset}) {error.fault}, and the start of "
                "the next row cannot be found; fix the row, or write one row per line (JSONL)"
            )
        # The file has no further row: advance to its end, or to the bracket that closes the list.
        end = len(self._text.rstrip())
        if is_in_list and self._text[:end].endswith("]"):
            end -= 1
        self._advance(max(end, self._position))

    def _move_to_next_row(self, indent: int) -> bool:
        """Advance to the next line that opens an object with at most this indentation.

        False if the buffer has no such line.
        """
        match = _OPENS_ROW.search(self._text, self._position)
        while match is not None and len(match[1]) > indent:
            match = _OPENS_ROW.search(self._text, match.end())
        if match is not None:
            self._advance(match.start(2))
        return match is not None

    def _drop_searched_lines(self) -> None:
        """Advance over the searched text, up to its last character or its incomplete last line.

        The last character may be the bracket that closes the list of rows.
        """
        end = len(self._text.rstrip()) - 1
        last_line = self._text.rfind("\n", max(len(self._text) - _MAX_INDENT, 0))
        if last_line >= 0:
            end = min(end, last_line)
        self._advance(max(end, self._position))

    def _advance(self, end: int) -> bytes:
        """Move the position to `end` and return the bytes between the two positions."""
        text = self._text[self._position : end]
        content = text.encode("utf-8", "surrogateescape")
        self._position = end
        self._offset += len(content)
        if (last := text.rfind("\n")) < 0:
            self._line_start = (self._line_start + text[:_MAX_INDENT])[:_MAX_INDENT]
        else:
            self._number += text.count("\n")
            self._line_start = text[last + 1 :][:_MAX_INDENT]
        return content

    def _read_more(self) -> bool:
        """Read more text into the buffer; False at the end of the file.

        As much is read as the buffer has of the current row, so that the time for a long row grows
        with its length, not with the square of its length.
        """
        if self._has_ended:
            return False
        row = self._text[self._position :]
        content = self._stream.read(min(max(_CHUNK_BYTES, len(row)), row_limits.MAX_ROW_BYTES))
        self._has_ended = not content
        self._text = row + self._decoder.decode(content, final=self._has_ended)
        self._position = 0
        return True
