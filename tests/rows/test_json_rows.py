"""JSON files whose rows do not have one line each: lists of rows, and rows without separators.

An invalid row must not make the rows after it unreadable, or the file is refused.
"""

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.rows import json_rows
from pipeline.rows import lines as limits
from pipeline.rows.sources import BadRow, Row
from tests.messages import refused
from tests.rows.test_sources import read

pytestmark = pytest.mark.unit

TEXT = st.text(alphabet='a{}[]",\\:\n é', max_size=8)
VALUES = st.recursive(
    TEXT | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=5)


# Layout of a file -> function from rows to its text.
LAYOUTS = {
    "minified": json.dumps,
    "indented": lambda rows: json.dumps(rows, indent=2),
    "line breaks without indentation": lambda rows: json.dumps(rows, indent=0),
    "a row a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "first row after the bracket": lambda rows: "[" + ",\n ".join(map(json.dumps, rows)) + "]",
    "indented rows": lambda rows: "[" + ", ".join(json.dumps(row, indent=4) for row in rows) + "]",
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "concatenated": lambda rows: "".join(map(json.dumps, rows)),
    "indented, no list": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "two lists": lambda rows: json.dumps(rows[:1]) + "\n" + json.dumps(rows[1:]),
}


@given(
    rows=ROWS,
    layout=st.sampled_from(sorted(LAYOUTS)),
    chunk_bytes=st.sampled_from([1, 2, 7, 2**20]),
)
def test_every_layout_gives_the_same_rows_with_their_line_and_offset(
    tmp_path_factory, rows, layout, chunk_bytes
):
    """The file is read in chunks, which may end anywhere in a row."""
    text = LAYOUTS[layout](rows).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk_bytes)
        result = read(tmp_path_factory.mktemp("json"), text, "rows.json")
    assert [row.value for row in result] == rows
    for row in result:
        assert text[row.offset : row.offset + 1] == b"{"
        assert row.line == 1 + text[: row.offset].count(b"\n")


INVALID = [
    b'{"a": 1, "b": [1}',
    b'{"a": "x',
    b'{"a": 1',
    b'{"a": [1, 2}',
    b'{"a": "\xff"}',
    b'{"a": "\n"}',
    b"{a: 1}",
    b"garbage",
    b"7",
    b'"text"',
    b"[1, 2]",
    b"[1, {",
]
# Invalid rows that are complete JSON values, so that the decoder knows their end.
COMPLETE = [b'{"a": "\xff"}', b"7", b'"text"', b"[1, 2]"]
VALID_ROWS = [{"n": n, "m": [{"x": "},{"}, {"y": '"'}]} for n in range(4)]


def list_with_invalid_row(invalid, white_space):
    """A JSON list of VALID_ROWS with an invalid third row; `white_space` is before each row."""
    rows = [json.dumps(row).encode() for row in VALID_ROWS]
    rows.insert(2, invalid)
    return b"[" + white_space + (b"," + white_space).join(rows) + white_space + b"]"


@pytest.mark.parametrize(
    ("invalid", "white_space"),
    [
        *itertools.product(INVALID, [b"\n", b"\n  "]),
        *((invalid, b" ") for invalid in COMPLETE),
    ],
)
def test_rows_around_an_invalid_row_are_read_if_its_end_or_the_next_line_is_known(
    tmp_path, invalid, white_space
):
    text = list_with_invalid_row(invalid, white_space)
    result = read(tmp_path, text, "rows.json")
    assert [row.value for row in result if isinstance(row, Row)] == VALID_ROWS
    assert len(result) == 5
    assert result[2].offset == text.index(invalid)


@pytest.mark.parametrize("invalid", [row for row in INVALID if row not in COMPLETE])
def test_an_incomplete_row_on_one_line_with_others_is_refused_with_its_offset(tmp_path, invalid):
    text = list_with_invalid_row(invalid, b" ")
    with refused("rows.json:1", f"byte {text.index(invalid)}", "next row"):
        read(tmp_path, text, "rows.json")


@pytest.mark.parametrize(
    "invalid", [b'{"n": 3, "m": {"o": 1}', b'{"n": "x', b'{"n": ["x"}', b'{"n" 3}']
)
@pytest.mark.parametrize("separator", [b",\n", b", "])
@pytest.mark.parametrize("chunk_bytes", [1, 3, 2**20])
def test_rows_before_an_invalid_last_row_are_read(
    tmp_path, monkeypatch, invalid, separator, chunk_bytes
):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk_bytes)
    rows = [json.dumps({"n": n}).encode() for n in range(3)]
    result = read(tmp_path, b"[" + separator.join([*rows, invalid]) + b"]\n", "rows.json")
    assert [type(row) for row in result] == [Row, Row, Row, BadRow]


def test_a_row_that_includes_the_next_because_its_list_is_not_closed_is_refused(tmp_path):
    """The inner list takes the following rows and the bracket that should close the outer list."""
    with refused("rows.json:1", "byte 11", "next row"):
        read(tmp_path, b'[{"n": 1}, {"m": [{"x": 1}, {"n": 2}, {"n": 3}]', "rows.json")


@pytest.mark.parametrize(
    ("start", "separator", "end"),
    [("[", ",", "]"), ("[", ",\n", "]"), ("", "", "")],
    ids=["minified", "a row a line", "concatenated"],
)
def test_unusual_numbers_are_read_except_one_of_thousands_of_digits(
    tmp_path, start, separator, end
):
    numbers = ["NaN", "-Infinity", str(2**80), "1e999", "7" * 5000]
    rows = [f'{{"n": {number}, "m": {i}}}' for i, number in enumerate(numbers)]
    text = start + separator.join(rows) + end
    *valid, invalid = read(tmp_path, text.encode(), "rows.json")
    assert [row.value["m"] for row in valid] == [0, 1, 2, 3]
    assert valid[2].value["n"] == 2**80
    assert "number too long" in invalid.reason


def test_a_truncated_list_gives_a_bad_row_at_its_end(tmp_path):
    text = json.dumps([{"n": n} for n in range(5)]).encode()
    for end in range(1, len(text)):
        *_, last = read(tmp_path, text[:end], "rows.json")
        assert "the file ends" in last.reason


def test_rows_after_an_indented_row_without_closing_brace_are_read(tmp_path):
    rows = [{"n": n, "m": [{"role": "user"}, {"role": "b"}]} for n in range(4)]
    end_of_row, without_brace = "      }\n    ]\n  },\n", "      }\n    ]\n"
    text = json.dumps(rows, indent=2).replace(end_of_row, without_brace, 1)
    invalid, *others = read(tmp_path, text.encode(), "rows.json")
    assert isinstance(invalid, BadRow)
    assert [row.value for row in others] == rows[1:]


MAX_ROW_BYTES, CHUNK_BYTES = 200, 64
LONG_ROWS = [
    row % ("x" * 999 + '\\"{' + "y" * 999) for row in ('{"t": "%s"}', '{"t": [["%s"]]}', '"%s"')
]


@pytest.fixture
def _low_limits(monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", MAX_ROW_BYTES)
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", CHUNK_BYTES)


def list_with_long_row(long_row, layout):
    text = LAYOUTS[layout]([{"n": 0}, {"long": 1}, {"n": 2}])
    return text.replace('{"long": 1}', long_row)


@pytest.mark.usefixtures("_low_limits")
@pytest.mark.parametrize("long_row", LONG_ROWS, ids=["text", "nested", "no object"])
def test_a_row_above_the_limit_is_a_bad_row_and_never_whole_in_memory(
    tmp_path, monkeypatch, long_row
):
    text = list_with_long_row(long_row, "a row a line")
    buffer_sizes = []
    read_more = json_rows._ValueScanner._read_more

    def read_and_record(self):
        result = read_more(self)
        buffer_sizes.append(len(self._text))
        return result

    monkeypatch.setattr(json_rows._ValueScanner, "_read_more", read_and_record)
    first, bad, last = read(tmp_path, text.encode(), "rows.json")
    assert (first.value, last.value) == ({"n": 0}, {"n": 2})
    assert bad.reason.startswith("the row is longer")
    assert bad.offset == text.index(long_row)
    assert max(buffer_sizes) <= 2 * MAX_ROW_BYTES + CHUNK_BYTES


@pytest.mark.usefixtures("_low_limits")
@pytest.mark.parametrize("long_row", LONG_ROWS, ids=["text", "nested", "no object"])
def test_a_row_above_the_limit_on_one_line_with_others_is_refused_with_its_offset(
    tmp_path, long_row
):
    text = list_with_long_row(long_row, "minified")
    offset, text = text.index(long_row), text.encode()
    with refused("rows.json:1", f"byte {offset}", "longer than"):
        read(tmp_path, text, "rows.json")


def test_a_file_of_thousands_of_unclosed_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 1000)
    with refused("is the file JSON"):
        read(tmp_path, b"[\n" + b'{"a": [1,\n' * 10_000, "rows.json")


@given(st.lists(st.sampled_from([*b'[]{}",:\\\n 7a', *"é".encode()]), max_size=40).map(bytes))
def test_reading_any_bytes_terminates(tmp_path_factory, content):
    with contextlib.suppress(UserError):
        read(tmp_path_factory.mktemp("any"), content, "rows.json")
