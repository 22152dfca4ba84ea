"""JSON values over several lines: lists of rows, consecutive rows, and invalid rows."""

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.rows import json_rows
from pipeline.rows import lines as limits
from tests.messages import refused
from tests.rows.test_sources import read

pytestmark = pytest.mark.unit

TEXT = st.text(alphabet='a{}[]",\\:\n é', max_size=8)
VALUES = st.recursive(
    TEXT | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=5)


def list_with(indent):
    return lambda rows: json.dumps(rows, indent=indent)


LAYOUTS = {
    "minified": list_with(None),
    "pretty": list_with(2),
    "flat": list_with(0),
    "a row a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "after the bracket": lambda rows: "[" + ",\n ".join(map(json.dumps, rows)) + "]",
    "joined": lambda rows: "[" + ", ".join(json.dumps(row, indent=4) for row in rows) + "]",
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "concatenated": lambda rows: "".join(map(json.dumps, rows)),
    "pretty, no list": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "two lists": lambda rows: json.dumps(rows[:1]) + "\n" + json.dumps(rows[1:]),
}


@given(
    rows=ROWS,
    layout=st.sampled_from(sorted(LAYOUTS)),
    chunk=st.sampled_from([1, 2, 7, 2**20]),
)
def test_every_layout_gives_the_same_rows_with_their_places(tmp_path_factory, rows, layout, chunk):
    text = LAYOUTS[layout](rows).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        result = read(tmp_path_factory.mktemp("json"), text, "rows.json")
    assert [row.value for row in result] == rows
    for row in result:
        assert text[row.offset : row.offset + 1] == b"{"
        assert row.line == 1 + text[: row.offset].count(b"\n")


BAD = [
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
KNOWN_END = [b'{"a": "\xff"}', b"7", b'"text"', b"[1, 2]"]  # the decoder knows where they end


GOOD_ROWS = [{"n": n, "m": [{"x": "},{"}, {"y": '"'}]} for n in range(4)]


def list_with_bad_row(bad, before):
    """A JSON list of GOOD_ROWS with a bad third row; `before`: white space before each row."""
    rows = [json.dumps(row).encode() for row in GOOD_ROWS]
    rows.insert(2, bad)
    return b"[" + before + (b"," + before).join(rows) + before + b"]"


@pytest.mark.parametrize(
    ("bad", "before"),
    [
        *itertools.product(BAD, [b"\n", b"\n  "]),
        *((bad, b" ") for bad in KNOWN_END),
    ],
)
def test_a_bad_row_that_ends_at_a_known_place_leaves_the_others_readable(tmp_path, bad, before):
    text = list_with_bad_row(bad, before)
    result = read(tmp_path, text, "rows.json")
    assert [row.value for row in result if hasattr(row, "value")] == GOOD_ROWS
    assert len(result) == 5
    assert result[2].offset == text.index(bad)


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad not in KNOWN_END])
def test_a_bad_row_on_one_line_with_others_is_refused_with_its_offset(tmp_path, bad):
    text = list_with_bad_row(bad, b" ")
    with refused("rows.json:1", f"byte {text.index(bad)}", "next row"):
        read(tmp_path, text, "rows.json")


@pytest.mark.parametrize(
    "bad", [b'{"n": 3, "m": {"o": 1}', b'{"n": "x', b'{"n": ["x"}', b'{"n" 3}']
)
@pytest.mark.parametrize("separator", [b",\n", b", "])
@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_an_invalid_last_row_leaves_others_readable(tmp_path, monkeypatch, bad, separator, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    rows = [json.dumps({"n": n}).encode() for n in range(3)]
    result = read(tmp_path, b"[" + separator.join([*rows, bad]) + b"]\n", "rows.json")
    assert [hasattr(row, "value") for row in result] == [True, True, True, False]


def test_an_unclosed_row_that_swallows_the_next_is_refused_with_its_offset(tmp_path):
    """The inner list has no end: it takes the following rows and the end of the outer list."""
    with refused("rows.json:1", "byte 11", "next row"):
        read(tmp_path, b'[{"n": 1}, {"m": [{"x": 1}, {"n": 2}, {"n": 3}]', "rows.json")


@pytest.mark.parametrize(
    ("start", "separator", "end"),
    [("[", ",", "]"), ("[", ",\n", "]"), ("", "", "")],
    ids=["minified", "a row a line", "concatenated"],
)
def test_numbers_outside_json_or_python_leave_other_rows_readable(tmp_path, start, separator, end):
    numbers = ["NaN", "-Infinity", str(2**80), "1e999", "7" * 5000]
    rows = [f'{{"n": {number}, "m": {i}}}' for i, number in enumerate(numbers)]
    text = start + separator.join(rows) + end
    *good, bad = read(tmp_path, text.encode(), "rows.json")
    assert [row.value["m"] for row in good] == [0, 1, 2, 3]
    assert good[2].value["n"] == 2**80
    assert "number too long" in bad.reason


def test_a_truncated_list_ends_with_a_bad_row(tmp_path):
    text = json.dumps([{"n": n} for n in range(5)]).encode()
    for end in range(1, len(text)):
        *_, last = read(tmp_path, text[:end], "rows.json")
        assert "the file ends" in last.reason


def test_rows_after_an_unclosed_pretty_printed_row_are_read(tmp_path):
    rows = [{"n": n, "m": [{"role": "user"}, {"role": "b"}]} for n in range(4)]
    text = json.dumps(rows, indent=2).replace("      }\n    ]\n  },\n", "      }\n    ]\n", 1)
    result = read(tmp_path, text.encode(), "rows.json")
    assert [getattr(row, "value", None) for row in result] == [None, *rows[1:]]


LONG = ['{"t": "%s"}', '{"t": [["%s"]]}', '"%s"']


def with_long_row(long, layout, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 200)
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 64)
    long = long % ("x" * 999 + '\\"{' + "y" * 999)
    text = LAYOUTS[layout]([{"n": 0}, {"long": 1}, {"n": 2}]).replace('{"long": 1}', long)
    return text.encode(), text.index(long)


@pytest.mark.parametrize("long", LONG)
def test_a_long_row_is_skipped_without_keeping_it_in_memory(tmp_path, monkeypatch, long):
    text, offset = with_long_row(long, "a row a line", monkeypatch)
    sizes = []
    read_more = json_rows._ValueScanner._read_more

    def recording(self):
        result = read_more(self)
        sizes.append(len(self._text))
        return result

    monkeypatch.setattr(json_rows._ValueScanner, "_read_more", recording)
    first, bad, last = read(tmp_path, text, "rows.json")
    assert (first.value, last.value) == ({"n": 0}, {"n": 2})
    assert bad.reason.startswith("the row is longer")
    assert bad.offset == offset
    assert max(sizes) <= 2 * 200 + 64


@pytest.mark.parametrize("long", LONG)
def test_a_long_row_on_one_line_with_others_is_refused_with_its_offset(tmp_path, monkeypatch, long):
    text, offset = with_long_row(long, "minified", monkeypatch)
    with refused("rows.json:1", f"byte {offset}", "longer than"):
        read(tmp_path, text, "rows.json")


def test_a_file_of_many_unclosed_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 1000)
    with refused("is the file JSON"):
        read(tmp_path, b"[\n" + b'{"a": [1,\n' * 10_000, "rows.json")


@given(st.lists(st.sampled_from([*b'[]{}",:\\\n 7a', *"é".encode()]), max_size=40).map(bytes))
def test_reading_any_bytes_terminates(tmp_path_factory, content):
    with contextlib.suppress(UserError):
        read(tmp_path_factory.mktemp("any"), content, "rows.json")
