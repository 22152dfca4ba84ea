"""JSON files -> lines, never more than one row in memory: JSONL, a list, or values in a row.

Where a row ends is found by its brackets and texts, not by parsing it, so that a row that is no
JSON is one bad row. Brackets that do not match say nothing of where the next row begins; then the
next line that opens an object and is indented no deeper than the row is taken for it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from pipeline.errors import UserError
from pipeline.rows import lines as rows
from pipeline.rows.lines import Line

_CHUNK_BYTES, _MAX_INDENT, _LINES_TO_TELL = 2**20, 200, 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_IN_VAIN = 16  # times the longest row, scanned before a break was found: no JSON takes more
# A text, with its end if there is one on its line and what may follow a text; or a bracket.
# Possessive (*+): a text of many escapes would else be remembered at each of them.
_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+(?:(")(?=\s*[,:\]}]))?|([\[\]{}])')
_TEXT_REST = re.compile(rb'[^"\\\n]*+(?:\\.[^"\\\n]*+)*+(")?')
_CUT = re.compile(rb'(?:"\s*|\\)?\Z')  # behind a text whose end may not have been read yet
_BETWEEN = re.compile(rb"[\s,]*")
_WORD_END = re.compile(rb"[,\[\]{}\n]")
_INDENT = re.compile(rb"[ \t\[]*")
_OPENS_ROW = re.compile(rb"\n([ \t]*)(?:\}[ \t]*,[ \t]*)?(\{)")
_CLOSED_BY = {ord("{"): ord("}"), ord("["): ord("]")}
_NO_MATCH = "not valid JSON: brackets or quotes that do not match"
_NO_END = "not valid JSON: the file ends inside the row"
_NO_LIST_END = "not valid JSON: the file ends before its list does"
_Trouble = Literal["broken", "long", "ended"]


def line_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """A row a line, but for blank ones."""
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
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line and not line.isspace():
            yield Line(file, number, start, line)


def is_line_by_line(stream: BinaryIO) -> bool:
    """Whether the first lines that are not blank are objects, each whole."""
    looked_at = 0
    while looked_at < _LINES_TO_TELL and (line := stream.readline(rows.MAX_ROW_BYTES)):
        if line := line.removeprefix(_BYTE_ORDER_MARK).strip():
            looked_at += 1
            try:
                is_row = isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                return False
            if not is_row:
                return False
    return looked_at > 0


def value_rows(file: Path, stream: BinaryIO) -> Iterator[Line]:
    """The elements of a list, or JSON values one after another, over any number of lines.

    Raises UserError where brackets do not match and where the next row begins is not certain.
    """
    return _Values(file, stream).lines()


class _Values:
    """The scan of one file; `_data` begins with what is next."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._data, self._has_ended = bytearray(), False
        self._offset, self._number = 0, 1  # byte of the file, and its line, where `_data` begins
        self._line_head = b""  # the beginning of that line, if `_data` begins within it
        self._in_vain = self._break = 0

    def lines(self) -> Iterator[Line]:
        self._fill()
        if self._data.startswith(_BYTE_ORDER_MARK):
            self._take(len(_BYTE_ORDER_MARK))
            self._line_head = b""
        is_in_list = False
        while self._goes_on():
            if self._data[0] == ord("]" if is_in_list else "["):
                is_in_list = not is_in_list
                self._take(1)
            else:
                yield self._row()
        if is_in_list:
            yield self._line(b"")._replace(fault=_NO_LIST_END)

    def _goes_on(self) -> bool:
        """Pass over white space and commas; False at the file's end."""
        while True:
            between = _BETWEEN.match(self._data)
            assert between is not None
            self._take(between.end())
            if self._data:
                return True
            if not self._fill():
                return False

    def _row(self) -> Line:
        """What lies at the beginning of `_data`, which goes on behind it."""
        here = self._line(b"")
        is_word = self._data[0] not in b'{["'
        end = self._word_end() if is_word else self._value_end()
        if isinstance(end, int):
            return here._replace(content=self._take(end))
        if end == "long":
            fault = rows.too_long()
            if self._resync():
                self._gave_up(end, rows.MAX_ROW_BYTES)  # what follows is scanned again
            else:
                end = self._word_end(is_kept=False) if is_word else self._value_end(is_kept=False)
                if end == "broken":
                    raise self._lost(here)
                self._take(end if isinstance(end, int) else len(self._data))
        else:
            fault = _NO_MATCH if end == "broken" else _NO_END
            self._pass_over(here, end)
        return here._replace(fault=fault)

    def _word_end(self, *, is_kept: bool = True) -> int | Literal["long"]:
        """Index behind a number, a word or a bracket too many."""
        at = 1
        while (found := _WORD_END.search(self._data, at)) is None:
            at = len(self._data)
            if is_kept and at > rows.MAX_ROW_BYTES:
                return "long"
            if not is_kept:
                self._take(at - 1)
                at = 1
            if not self._fill():
                return at
        return found.start()

    def _value_end(self, *, is_kept: bool = True) -> int | _Trouble:
        """Index behind an object, a list or a text; takes what lies before where it is too long."""
        expected, is_in_text = bytearray(), self._data[0] == ord('"')
        at = int(is_in_text)
        while True:
            look = _TEXT_REST.match if is_in_text else _TOKEN.search
            found = look(self._data, at)
            if found is None or self._may_go_on(found):
                if is_kept and len(self._data) > rows.MAX_ROW_BYTES:
                    return "long"
                at = len(self._data) if found is None else found.start()
                if not is_kept:
                    is_in_text = found is not None
                    self._take(found.end() if found else at)
                    at = 0
                if not self._fill():
                    return self._gave_up("ended", at)
                continue
            if found.lastindex is None or not (is_in_text or self._fits(found, expected)):
                return self._gave_up("broken", found.start())
            at, is_in_text = found.end(), False
            if not expected:
                return at if at <= rows.MAX_ROW_BYTES or not is_kept else "long"

    def _fits(self, token: re.Match[bytes], expected: bytearray) -> bool:
        """Whether a token may stand here; `expected`: what is to be closed, changed by it."""
        byte = self._data[token.start()]
        if byte in _CLOSED_BY:
            if expected[-1:] == b"}" and self._before(token.start()) != ord(":"):
                return False  # an object without a key, most likely the next row
            expected.append(_CLOSED_BY[byte])
        elif byte != ord('"'):
            return bool(expected) and expected.pop() == byte
        return True

    def _may_go_on(self, token: re.Match[bytes]) -> bool:
        """Whether the end of a text that has none may lie in what has not been read yet."""
        is_open = token.lastindex is None and not self._has_ended
        return is_open and _CUT.match(self._data, token.end()) is not None

    def _gave_up(self, trouble: _Trouble, at: int) -> _Trouble:
        self._break = at
        self._in_vain += at
        if self._in_vain > _MAX_IN_VAIN * rows.MAX_ROW_BYTES:
            raise UserError(
                f"{self._file}:{self._number}: brackets or quotes do not match, here and in many "
                "rows before; is the file JSON?"
            )
        return trouble

    def _pass_over(self, here: Line, trouble: _Trouble) -> None:
        """Go to the next row, or to the end of the list where none follows."""
        while not self._resync():
            if len(self._data) > rows.MAX_ROW_BYTES:
                raise self._lost(here)
            if self._fill():
                continue
            rest = self._data.rstrip()
            # A list's end inside the row was meant for the list of rows: it has swallowed some.
            has_swallowed = trouble == "ended" and self._break >= len(rest) and rest[-1:] == b"]"
            if has_swallowed or b"{" in rest[self._break :]:
                raise self._lost(here)
            self._take(len(rest) - rest.endswith(b"]"))
            return

    def _resync(self) -> bool:
        """Go to the first line in `_data` that opens a row, if there is one."""
        indent = _INDENT.match(self._line_head)
        assert indent is not None
        found = _OPENS_ROW.search(self._data)
        while found is not None and len(found[1]) > indent.end():
            found = _OPENS_ROW.search(self._data, found.end())
        if found is not None:
            self._take(found.start(2))
        return found is not None

    def _before(self, at: int) -> int:
        """The last byte before `at` that is not white space."""
        at -= 1
        while self._data[at] in b" \t\r\n":
            at -= 1
        return self._data[at]

    def _lost(self, here: Line) -> UserError:
        return UserError(
            f"{self._file}:{here.number}: (byte {here.offset}) brackets or quotes do not match, "
            "and where the next row begins is not certain; mend the row, or write one row a line"
        )

    def _line(self, content: bytes) -> Line:
        return Line(self._file, self._number, self._offset, content)

    def _take(self, size: int) -> bytes:
        """Remove the first bytes of `_data`, and know where it begins now."""
        taken = bytes(self._data[:size])
        del self._data[:size]
        self._offset += size
        if (last := taken.rfind(b"\n")) < 0:
            self._line_head = (self._line_head + taken[:_MAX_INDENT])[:_MAX_INDENT]
        else:
            self._number += taken.count(b"\n")
            self._line_head = taken[last + 1 :][:_MAX_INDENT]
        return taken

    def _fill(self) -> bool:
        """Read on; False at the file's end."""
        more = b"" if self._has_ended else self._stream.read(_CHUNK_BYTES)
        self._data += more
        self._has_ended = not more
        return bool(more)
