"""Each row of a source's files becomes a Row or a BadRow, or the source is refused."""

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.rows import lines as limits
from pipeline.rows.content import reason_without_rows
from pipeline.rows.sources import (
    BadRow,
    Row,
    parse_line,
    read_lines,
    read_rows,
    require_disjoint,
    resolve_sources,
)
from tests.messages import refused
from tests.rows.read import resolved

pytestmark = pytest.mark.unit

GOOD = b'{"prompt": "a", "completion": "b"}'  # a valid row
COMPRESSED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
}
# First bytes by which compressed files and tables are detected.
MAGIC = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1")


def read(tmp_path, content: bytes, name="rows.jsonl"):
    """Write a file and return its Rows and BadRows."""
    path = tmp_path / name
    path.write_bytes(content)
    return list(read_rows(resolved(path)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b"[1, 2]", "found a list"),
        (b"null", "found null"),
        (b"7", "found a number"),
        (b"true", "found true or false"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"n": ' + b"1" * 5000 + b"}", "number too long"),
        (b'{"a": {"role": "x", "role": "y"}}', "duplicate key"),
        (GOOD + b"\r" + GOOD, "more than one value"),
        (GOOD + b",", "a comma after the row"),
        (GOOD + b"x", "text after the row, 'x'"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path, line, reason):
    before, bad, after = read(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    assert isinstance(bad, BadRow)
    assert reason in bad.reason
    assert (bad.file.name, bad.line, bad.offset) == ("rows.jsonl", 2, len(GOOD) + 1)
    assert isinstance(before, Row)
    assert isinstance(after, Row)
    assert (after.line, after.offset) == (3, len(GOOD) + len(line) + 2)


def test_equal_errors_at_different_places_have_equal_reasons(tmp_path):
    rows = read(tmp_path, b'{"a": "x\n{"a": 1, "bcd": "xyz\n')
    assert len({row.reason for row in rows}) == 1


def test_a_long_line_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 64)
    long = json.dumps({"prompt": "x" * 1000}).encode()
    rows = read(tmp_path, GOOD + b"\n" + long + b"\n" + GOOD + b"\n" + long)
    assert [type(row) for row in rows] == [Row, BadRow, Row, BadRow]
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert rows[2].offset == len(GOOD) + len(long) + 2
    assert "longer than" in rows[1].reason


def test_blank_lines_are_counted_as_lines_but_are_not_rows(tmp_path):
    rows = read(tmp_path, b"\n  \r\n" + GOOD + b"\r\n\n" + GOOD)
    assert [row.line for row in rows] == [3, 5]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    for name in ("rows.jsonl", "rows.json"):
        (row,) = read(tmp_path, b"\xef\xbb\xbf" + GOOD, name)
        assert row.value == {"prompt": "a", "completion": "b"}


@given(st.lists(st.one_of(st.binary(max_size=30), st.just(GOOD)), max_size=8))
def test_each_line_of_any_bytes_is_one_row_or_bad_row(tmp_path_factory, chunks):
    content = b"\n".join(chunks)
    # Other files are refused: empty, binary, in UTF-16, a JSON list over several lines, compressed,
    # of a kind that holds no rows, lines that end with CR.
    assume(content.replace(b"\xef\xbb\xbf", b"").strip())
    assume(b"\n" in content or b"\r" not in content)
    assume(b"\0" not in content[:64] and not content.startswith((b"\xff\xfe", b"\xfe\xff")))
    assume(not any(line.endswith((b"[", b"[{")) for line in map(bytes.strip, chunks)))
    assume(not content.startswith(MAGIC) and not reason_without_rows(content))
    numbered_lines = list(enumerate(content.split(b"\n"), start=1))
    rows = read(tmp_path_factory.mktemp("any"), content)
    non_blank = [
        number
        for number, line in numbered_lines
        if re.sub(rb"\A(\xef\xbb\xbf)+", b"", line).strip()
    ]
    assert [row.line for row in rows] == non_blank
    valid = {number for number, line in numbered_lines if line == GOOD}
    assert valid <= {row.line for row in rows if isinstance(row, Row)}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["rows.jsonl.{}", "rows.jsonl", "rows"])
def test_compression_is_detected_by_the_first_bytes(tmp_path, suffix, name):
    compress = COMPRESSED[suffix]
    content = compress(GOOD + b"\n") + compress(GOOD)  # two members or frames
    rows = read(tmp_path, content, name.format(suffix))
    assert [(row.line, row.offset) for row in rows] == [(1, 0), (2, len(GOOD) + 1)]


def test_an_uncompressed_file_with_the_suffix_of_a_compression_is_read(tmp_path):
    (row,) = read(tmp_path, GOOD, "rows.jsonl.gz")
    assert isinstance(row, Row)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_truncated_compressed_file_is_refused(tmp_path, suffix):
    content = COMPRESSED[suffix](os.urandom(300_000).hex().encode())
    with refused("rows.jsonl"):
        read(tmp_path, content[: 2 * len(content) // 3], "rows.jsonl")


# zst is left out: pyarrow writes no checksum, so that a changed byte may go undetected.
@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_compressed_file_with_a_changed_byte_is_refused(tmp_path, suffix):
    content = bytearray(COMPRESSED[suffix](os.urandom(300_000).hex().encode()))
    content[len(content) // 2] ^= 0xFF
    with refused("rows.jsonl"):
        read(tmp_path, bytes(content), "rows.jsonl")


def test_files_are_read_in_the_order_of_the_setting(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_bytes(GOOD)
    sources = resolved(*(tmp_path / name for name in "ba"))
    assert [row.file.name for row in read_rows(sources)] == ["b", "a"]


def test_a_folder_is_resolved_to_its_data_files_and_a_glob_to_its_matches(tmp_path):
    for name in ("b/1.jsonl", "b/0.json", "a.csv", "_tmp/x.jsonl", "b/.x.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"prompt,completion\na,b\n" if "csv" in name else GOOD)
    (tmp_path / "b/dataset_info.json").write_bytes(b"{}")

    def names(path):
        (source,) = resolved(path)
        return [str(file.relative_to(tmp_path)) for file in source.files]

    assert names(tmp_path) == ["a.csv", "b/0.json", "b/1.jsonl"]
    assert names(f"{tmp_path}/b/*.jsonl") == ["b/1.jsonl"]
    assert names(f"{tmp_path}/**/[01].*") == ["b/0.json", "b/1.jsonl"]
    (tmp_path / "b/[x].jsonl").write_bytes(GOOD)
    assert names(f"{tmp_path}/b/[x].jsonl") == ["b/[x].jsonl"]  # a file, not a glob
    for wrong, fact in (
        (f"{tmp_path}/*.parquet", "no file matches"),
        (tmp_path / "e", "e has no data files"),
    ):
        (tmp_path / "e").mkdir(exist_ok=True)
        with refused("train_data", wrong, fact):
            resolved(wrong)


def test_a_limit_takes_the_first_rows_of_a_source(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join([GOOD, b"bad", GOOD]))
    (source,) = resolved(tmp_path, limit=5, weight=0.5)
    assert source.weight == 0.5
    assert [(line.file.name, line.number) for line in read_lines(source)] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("a.jsonl", 3),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]


def test_a_missing_file_is_refused_with_similar_names(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    wrong = tmp_path / "trian.jsonl"
    with refused("train_data", wrong, "no such file", "train.jsonl"):
        resolved(wrong)
    with refused("eval_data", tmp_path / "nowhere"):
        resolved(tmp_path / "nowhere" / "x.jsonl", key="eval_data")


def test_a_hub_name_without_a_split_is_refused_with_a_complete_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/name-1.5", "org/name@v1.0"):
        with refused("train_data", f"{name}:train"):
            resolved(name)
    (tmp_path / "data").mkdir()
    for name in ("data/train", "dta/train.jsonl"):
        with pytest.raises(UserError) as raised:
            resolved(name)
        assert "hub" not in str(raised.value)


@pytest.mark.parametrize("name", ["rows.tsv", "rows.txt", "rows", "rows.tsv.gz"])
def test_text_with_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    content = b"prompt\tcompletion\na\tb\n"
    content = gzip.compress(content) if name.endswith("gz") else content
    with refused(tmp_path / name, ".jsonl", ".csv"):
        read(tmp_path, content, name)
    assert len(read(tmp_path, b"\xef\xbb\xbf\n " + GOOD, name)) == 1
    assert len(read(tmp_path, content, "rows.json")) > 0  # bad rows: read as JSON


@pytest.mark.parametrize("indent", [0, 2])
def test_a_json_list_over_several_lines_is_refused_in_a_jsonl_file(tmp_path, indent):
    content = json.dumps([json.loads(GOOD)] * 3, indent=indent).encode()
    with refused(tmp_path / "rows.jsonl", "list", ".json"):
        read(tmp_path, content)
    assert len(read(tmp_path, content, "rows.json")) == 3
    bad, good = read(tmp_path, b"[\n" + GOOD)
    assert isinstance(bad, BadRow)
    assert isinstance(good, Row)


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.json", b"[]"), ("e.csv", b"prompt,completion\n"), ("e.jsonl", b"\n \n")],
)
def test_a_source_without_rows_is_refused(tmp_path, name, content):
    with refused(tmp_path / name, "no row"):
        read(tmp_path, content, name)
    (tmp_path / "more.jsonl").write_bytes(GOOD)
    assert len(list(read_rows(resolved(tmp_path)))) == 1  # one of several files may have no rows


def test_an_empty_file_a_pipe_and_an_empty_list_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with refused("train_data", tmp_path / "rows.jsonl", "empty"):
        resolved(tmp_path / "rows.jsonl")
    (tmp_path / "more.jsonl").write_bytes(GOOD)
    assert len(list(read_rows(resolved(tmp_path)))) == 1  # one of several files may be empty
    os.mkfifo(tmp_path / "pipe")
    with refused("train_data", tmp_path / "pipe", "regular file"):
        resolved(tmp_path / "pipe")
    with refused("train_data", "no data"):
        resolve_sources([], "train_data")


def test_a_file_with_several_links_is_read_once(tmp_path):
    (tmp_path / "v3").mkdir()
    (tmp_path / "v3/rows.jsonl").write_bytes(GOOD)
    (tmp_path / "latest").symlink_to("v3")
    (tmp_path / "v3/itself").symlink_to(".")
    (tmp_path / "rows.jsonl").symlink_to("v3/rows.jsonl")
    for name in ("", "*", "**/*.jsonl"):
        (source,) = resolved(tmp_path / name if name != "*" else tmp_path / "*.jsonl")
        assert len(source.files) == 1, name
        assert len(list(read_rows([source]))) == 1


def test_a_file_in_two_sources_is_refused(tmp_path):
    """Repetition of rows is set with a weight."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    resolved(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for one, other in (("", "b.jsonl"), ("b.jsonl", "b.jsonl")):
        with refused("train_data", tmp_path / "b.jsonl", "two sources", "weight"):
            resolved(tmp_path / one, tmp_path / other)


def test_an_unreadable_folder_and_a_too_long_name_are_refused(tmp_path, monkeypatch):
    with refused("train_data", "File name too long"):
        resolved("/" + "x" * 300)
    with refused("train_data", "no such file", "no hub data set"):
        resolved(f"org/{'x' * 300}:train")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with refused("train_data", tmp_path, "Permission denied"):
        resolved(tmp_path)


def test_a_file_in_both_training_and_held_out_data_is_refused(tmp_path):
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "link.jsonl").symlink_to("heldout.jsonl")
    folder, train, held_out, link = (
        resolved(tmp_path / name) for name in ("", "train.jsonl", "heldout.jsonl", "link.jsonl")
    )
    require_disjoint(train, held_out)
    for shared in ((folder, held_out), (held_out, link)):
        with refused("eval_data", "train_data", tmp_path):
            require_disjoint(*shared)


CSV = [
    (b"q,NA\n", {"prompt": "q", "completion": "NA"}),
    (b"1,2\n", {"prompt": "1", "completion": "2"}),
    (b'"x\ny, ""z""",a\r\n', {"prompt": 'x\ny, "z"', "completion": "a"}),
    (b'a "b" c,\n', {"prompt": 'a "b" c', "completion": ""}),
    (b"1,2,3\n", "more fields"),
    (b"1\n", "fewer fields"),
    (b"w,\xff\n", "UTF-8"),
    (b"1\r2,a\n", "carriage return"),
]


@given(st.lists(st.sampled_from(CSV), min_size=1, max_size=8))
def test_csv_values_are_text_and_each_invalid_row_is_one_bad_row(tmp_path_factory, rows):
    content = b"\xef\xbb\xbfprompt,completion\n\n" + b"".join(row for row, _ in rows)
    result = read(tmp_path_factory.mktemp("csv"), content, "rows.csv")
    assert len(result) == len(rows)
    offset, line = content.index(b"\n\n") + 2, 3
    for (text, expected), row in zip(rows, result, strict=True):
        assert (row.offset, row.line) == (offset, line)
        if isinstance(expected, dict):
            assert row.value == expected
        else:
            assert expected in row.reason
        offset, line = offset + len(text), line + text.count(b"\n")


@pytest.mark.parametrize(
    "row",
    [
        b'"x" y,a\n',
        b'"x,a\n',
        b'q,"Dear Sir,\nhe said "no", and left\nMilk, 3 eggs\nbye"\n',
        b'q,"a "b\nMilk, 3 eggs\nc" d"\n',
        b'q,"he said "no",\nMilk, 3 eggs\nbye"\n',
        b'1\r2,"x\nMilk, 3 eggs"\n',
    ],
)
@pytest.mark.parametrize("after", [b"", b"c,d\n", b'"c",d\n'])
def test_a_csv_file_is_refused_at_unmatched_quotes_and_no_row_after_them_is_read(
    tmp_path, row, after
):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\na,b\n" + row + after)
    rows_before: list[Row | BadRow] = []
    with refused(tmp_path / "rows.csv:3", "quotes"):
        rows_before.extend(read_rows(resolved(path)))
    assert [row.value for row in rows_before] == [{"prompt": "a", "completion": "b"}]


def test_a_csv_header_without_columns_or_with_duplicates_is_refused(tmp_path):
    with refused(tmp_path / "rows.csv:1", "header", "a", "twice"):
        read(tmp_path, b"a,b,a\n1,2,3\n", "rows.csv")
    with refused(tmp_path / "rows.csv:1", "columns", "no row"):
        read(tmp_path, b"\n\n", "rows.csv")


def test_a_long_csv_row_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 64)
    before = b"prompt,completion\na,b\n"
    quoted_lines = b'c,"' + b'd ""d"", \n' * 100 + b'"\n'
    for long in (b"a," + b"x" * 200 + b"\n", b'a,"' + b'xxx""' * 50 + b'"\n', quoted_lines):
        result = read(tmp_path, before + long + b"e,f\n" * 40, "rows.csv")
        assert [isinstance(row, Row) for row in result] == [True, False, *[True] * 40]
        assert "longer than" in result[1].reason
        assert result[2].line == 3 + long.count(b"\n")
        assert result[2].offset == len(before) + len(long)
    unclosed = b'c,"d\n'
    with refused(tmp_path / "rows.csv:3", "quotes"):
        read(tmp_path, before + unclosed + b"e,f\n" * 400, "rows.csv")


def test_lines_sent_to_a_worker_process_can_be_parsed(tmp_path):
    import pickle

    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"\nbad")
    (source,) = resolved(tmp_path / "rows.jsonl")
    sent = pickle.loads(pickle.dumps(list(read_lines(source))))
    assert [type(parse_line(line)) for line in sent] == [Row, BadRow]


def test_reading_rows_imports_neither_torch_nor_pyarrow():
    code = (
        "import sys, pipeline.data.prepare.prepare, pipeline.rows.formats\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
