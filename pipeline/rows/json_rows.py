"""JSON files -> Lines: JSONL, one list, or concatenated values; one row and a buffer in memory.

The JSON decoder finds the end of a row. After a broken row, reading continues at the next line that
opens an object and is indented no deeper than the row. If there is no such line, it is unknown
where the next row begins, and UserError names the broken row.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError
from pipeline.rows import lines as rows
from pipeline.rows.content import without_marks
from pipeline.rows.lines import Line

_CHUNK_BYTES, _MAX_INDENT = 2**20, 200
_NUM_SNIFFED, _SNIFFED_BYTES = 10, 2**16
# An error this close to the end of the buffer may come from a token that the buffer cuts off.
_MAX_TOKEN = 16  # characters; only strings can be longer
# Limit on the text scanned again because of broken rows, as a multiple of the longest row.
_MAX_RESCANNED = 16
_BETWEEN = re.compile("[ \t\r\n,\ufeff]*")
_INDENT = re.compile(r"[ \t\[]*")
_OPENS_ROW = re.compile(r"\n([ \t]*)(?:\}[ \t]*,[ \t]*)?(\{)")
_NO_END = "not valid JSON: the file ends inside the row"
_NO_LIST_END = "not valid JSON: the file ends before its list does"
_TOO_DEEP = "not valid JSON: nested too deep"
_DECODER = json.JSONDecoder()
# `int` refuses thousands of digits, which parse() reports for the row.
_ANY_NUMBER = json.JSONDecoder(parse_int=str)


def line_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """JSONL: a Line for each line of the file that is not blank."""
    number = offset = 0
    limit = rows.MAX_ROW_BYTES
    while line := stream.readline(limit + 1):
        number += 1
        start, offset = offset, offset + len(line)
        if len(line) > limit:
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
                offset += len(line)
            yield Line(file, number, start, b"", rows.too_long())
            continue
        line = without_marks(line)
        if line and not line.isspace():
            yield Line(file, number, start, line)


def is_line_by_line(stream: BinaryIO) -> bool:
    """Whether the file is JSONL: its first lines that are not blank are complete objects."""
    num_seen = 0
    while num_seen < _NUM_SNIFFED and (line := stream.readline(_SNIFFED_BYTES)):
        if not (line := without_marks(line).lstrip()):
            continue
        if not line.startswith(b"{"):  # a list may be one line of gigabytes
            return False
        if not line.endswith(b"\n"):
            line += stream.readline(rows.MAX_ROW_BYTES)
        num_seen += 1
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return False
    return num_seen > 0


def value_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The elements of a JSON list, or concatenated JSON values, over any number of lines.

    Raises UserError after a broken row if the beginning of the next one cannot be found.
    """
    return _Values(file, stream).lines()


class _BrokenError(Exception):
    """The row is not valid JSON; `position`: of the error in the buffer."""

    def __init__(self, fault: str, position: int) -> None:
        super().__init__(fault)
        self.fault, self.position = fault, position


class _Values:
    """The scan of one file: a buffer of decoded text, and the position up to which it is read."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream, self._has_ended = file, stream, False
        # Bytes that are not UTF-8 are decoded to lone surrogates, and encoded back in the content.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._position = "", 0
        self._offset, self._number = 0, 1  # byte of the file, and its line, at the position
        self._line_start = ""  # the first characters of that line up to the position
        self._rescanned = 0

    def lines(self) -> Iterator[Line]:
        is_in_list = False
        while self._skip_separators():
            if self._text[self._position] == ("]" if is_in_list else "["):
                is_in_list = not is_in_list
                self._take(self._position + 1)
                continue
            here = Line(self._file, self._number, self._offset, b"")
            try:
                content = self._take(self._value_end())
            except _BrokenError as error:
                yield here._replace(fault=error.fault)
                self._resume(here, error, is_in_list=is_in_list)
                continue
            is_long = len(content) > rows.MAX_ROW_BYTES
            yield (
                here._replace(fault=rows.too_long()) if is_long else here._replace(content=content)
            )
        if is_in_list:
            yield Line(self._file, self._number, self._offset, b"", _NO_LIST_END)

    def _skip_separators(self) -> bool:
        """Move on to the next value or bracket; False at the end of the file."""
        while True:
            between = _BETWEEN.match(self._text, self._position)
            assert between is not None
            if between.end() > self._position:
                self._take(between.end())
            if self._position < len(self._text):
                return True
            if not self._fill():
                return False

    def _value_end(self) -> int:
        """The end of the value at the position; reads on while the buffer cuts it off."""
        decoder = _DECODER
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                position, is_in_string = error.pos, error.msg.startswith("Unterminated string")
                reason = error.msg.removesuffix(" at").removesuffix(" starting")
            except ValueError:
                decoder = _ANY_NUMBER
                continue
            except RecursionError:
                raise _BrokenError(_TOO_DEEP, self._position) from None
            else:
                is_whole = isinstance(value, dict | list | str) or end < len(self._text)
                if is_whole or not self._fill():
                    return end
                continue
            if not is_in_string and position < len(self._text) - _MAX_TOKEN:
                raise _BrokenError(f"not valid JSON: {reason}", position)
            if len(self._text) - self._position > rows.MAX_ROW_BYTES:
                raise _BrokenError(rows.too_long(), len(self._text))
            if not self._fill():
                is_at_end = position >= len(self._text.rstrip()) and reason.startswith("Expecting")
                is_ended = is_in_string or is_at_end
                fault = _NO_END if is_ended else f"not valid JSON: {reason}"
                raise _BrokenError(fault, position)

    def _resume(self, here: Line, error: _BrokenError, *, is_in_list: bool) -> None:
        """Move to the next row, or to the end where certainly none follows; else UserError."""
        self._rescanned += error.position - self._position
        if self._rescanned > _MAX_RESCANNED * rows.MAX_ROW_BYTES:
            raise UserError(
                f"{self._file}:{here.number}: brackets or quotes do not match, here and in many "
                "rows before; is the file JSON?"
            )
        # Where the file ends within the row, its last bracket was meant for the list of rows.
        rest = self._text.rstrip()
        is_open = error.fault == _NO_END and error.position >= len(rest)
        has_swallowed = is_in_list and is_open and rest.endswith("]")
        may_be_lost = has_swallowed or self._text.find("{", error.position) >= 0
        indent = _INDENT.match(self._line_start)
        assert indent is not None
        while not self._to_line_that_opens_a_row(indent.end()):
            self._drop_lines()
            num_known = len(self._text) - self._position
            if not self._fill():
                break
            may_be_lost |= self._text.find("{", num_known) >= 0
        else:
            return
        if may_be_lost:
            raise UserError(
                f"{self._file}:{here.number}: (byte {here.offset}) {error.fault}, and where the "
                "next row begins is not certain; fix the row, or write one row a line"
            )
        rest = self._text.rstrip()
        self._take(max(len(rest) - (is_in_list and rest.endswith("]")), self._position))

    def _to_line_that_opens_a_row(self, indent: int) -> bool:
        """Move to the first such line in the buffer that is indented no deeper."""
        found = _OPENS_ROW.search(self._text, self._position)
        while found is not None and len(found[1]) > indent:
            found = _OPENS_ROW.search(self._text, found.end())
        if found is not None:
            self._take(found.start(2))
        return found is not None

    def _drop_lines(self) -> None:
        """Take all but the last bracket, and a line that may be cut off before its own."""
        last = len(self._text.rstrip()) - 1
        line = self._text.rfind("\n", max(len(self._text) - _MAX_INDENT, 0))
        self._take(max(last if line < 0 else min(last, line), self._position))

    def _take(self, end: int) -> bytes:
        """Move the position to `end`; the bytes before it."""
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

    def _fill(self) -> bool:
        """Read on, twice as much each time within a row; False at the end of the file."""
        if self._has_ended:
            return False
        rest = self._text[self._position :]
        read = self._stream.read(min(max(_CHUNK_BYTES, len(rest)), rows.MAX_ROW_BYTES))
        self._has_ended = not read
        self._text = rest + self._decoder.decode(read, final=self._has_ended)
        self._position = 0
        return True
