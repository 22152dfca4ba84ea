"""JSON over several lines: rows of a list or one after another, some of them broken."""

import contextlib
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


def as_list(indent):
    return lambda rows: json.dumps(rows, indent=indent)


LAYOUTS = {
    "minified": as_list(None),
    "pretty": as_list(2),
    "flat": as_list(0),
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
def test_rows_are_found_however_they_are_laid_out(tmp_path_factory, rows, layout, chunk):
    text = LAYOUTS[layout](rows).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        found = read(tmp_path_factory.mktemp("json"), text, "rows.json")
    assert [row.value for row in found] == rows
    for row in found:
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
CERTAIN = [b'{"a": "\xff"}', b"7", b'"text"', b"[1, 2]"]  # the decoder knows where they end


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("before", [b"\n", b"\n  ", b" "])
def test_one_bad_row_does_not_cost_another(tmp_path, bad, before):
    rows = [{"n": n, "m": [{"x": "},{"}, {"y": '"'}]} for n in range(4)]
    parts = [json.dumps(row).encode() for row in rows]
    parts.insert(2, bad)
    text = b"[" + before + (b"," + before).join(parts) + before + b"]"
    if before == b" " and bad not in CERTAIN:  # all on one line
        with refused("rows.json:1", f"byte {text.index(bad)}", "next row"):
            read(tmp_path, text, "rows.json")
        return
    found = read(tmp_path, text, "rows.json")
    assert [row.value for row in found if hasattr(row, "value")] == rows
    assert len(found) == 5
    assert found[2].offset == text.index(bad)


@pytest.mark.parametrize(
    "bad", [b'{"n": 3, "m": {"o": 1}', b'{"n": "x', b'{"n": ["x"}', b'{"n" 3}']
)
@pytest.mark.parametrize("separator", [b",\n", b", "])
@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_the_last_row_may_be_broken(tmp_path, monkeypatch, bad, separator, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    rows = [json.dumps({"n": n}).encode() for n in range(3)]
    found = read(tmp_path, b"[" + separator.join([*rows, bad]) + b"]\n", "rows.json")
    assert [hasattr(row, "value") for row in found] == [True, True, True, False]


def test_a_broken_row_that_holds_the_next_ones_is_named(tmp_path):
    """Its list lacks an end, takes the rows behind it, and the list's own end for its end."""
    with refused("rows.json:1", "byte 11", "next row"):
        read(tmp_path, b'[{"n": 1}, {"m": [{"x": 1}, {"n": 2}, {"n": 3}]', "rows.json")


@pytest.mark.parametrize("layout", ["minified", "a row a line", "concatenated"])
def test_numbers_that_json_or_python_does_not_hold_cost_no_other_row(tmp_path, layout):
    numbers = ["NaN", "-Infinity", str(2**80), "1e999", "7" * 5000]
    rows = [f'{{"n": {number}, "m": {i}}}' for i, number in enumerate(numbers)]
    separator = {"minified": ",", "a row a line": ",\n", "concatenated": ""}[layout]
    text = separator.join(rows)
    text = text if layout == "concatenated" else f"[{text}]"
    *found, bad = read(tmp_path, text.encode(), "rows.json")
    assert [row.value["m"] for row in found] == [0, 1, 2, 3]
    assert found[2].value["n"] == 2**80
    assert "number too long" in bad.reason


def test_a_list_that_is_cut_off_ends_with_a_bad_row(tmp_path):
    text = json.dumps([{"n": n} for n in range(5)]).encode()
    for end in range(1, len(text)):
        *_, last = read(tmp_path, text[:end], "rows.json")
        assert "the file ends" in last.reason


def test_pretty_rows_with_a_bracket_missing_are_found_again(tmp_path):
    rows = [{"n": n, "m": [{"role": "user"}, {"role": "b"}]} for n in range(4)]
    text = json.dumps(rows, indent=2).replace("      }\n    ]\n  },\n", "      }\n    ]\n", 1)
    found = read(tmp_path, text.encode(), "rows.json")
    assert [getattr(row, "value", None) for row in found] == [None, *rows[1:]]


LONG = ['{"t": "%s"}', '{"t": [["%s"]]}', '"%s"']


def with_long_row(long, layout, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 200)
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 64)
    long = long % ("x" * 999 + '\\"{' + "y" * 999)
    text = LAYOUTS[layout]([{"n": 0}, {"long": 1}, {"n": 2}]).replace('{"long": 1}', long)
    return text.encode(), text.index(long)


@pytest.mark.parametrize("long", LONG)
def test_a_long_row_is_skipped_without_being_held(tmp_path, monkeypatch, long):
    text, offset = with_long_row(long, "a row a line", monkeypatch)
    sizes = []
    fill = json_rows._ValueScanner._read_more

    def recorded(self):
        result = fill(self)
        sizes.append(len(self._text))
        return result

    monkeypatch.setattr(json_rows._ValueScanner, "_read_more", recorded)
    first, bad, last = read(tmp_path, text, "rows.json")
    assert (first.value, last.value) == ({"n": 0}, {"n": 2})
    assert bad.reason.startswith("the row is longer")
    assert bad.offset == offset
    assert max(sizes) <= 2 * 200 + 64


@pytest.mark.parametrize("long", LONG)
def test_a_long_row_with_others_on_its_line_is_named(tmp_path, monkeypatch, long):
    text, offset = with_long_row(long, "minified", monkeypatch)
    with refused("rows.json:1", f"byte {offset}", "longer than"):
        read(tmp_path, text, "rows.json")


def test_a_file_with_many_open_rows_is_refused_in_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 1000)
    with refused("is the file JSON"):
        read(tmp_path, b"[\n" + b'{"a": [1,\n' * 10_000, "rows.json")


@given(st.lists(st.sampled_from([*b'[]{}",:\\\n 7a', *"é".encode()]), max_size=40).map(bytes))
def test_any_bytes_come_to_an_end(tmp_path_factory, content):
    with contextlib.suppress(UserError):
        read(tmp_path_factory.mktemp("any"), content, "rows.json")
