"""Parquet and Arrow files give the rows of the same JSON, in bounded memory, and leave no files."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.prepare.lines import chunks
from pipeline.rows import lines as limits
from pipeline.rows import tables
from pipeline.rows.sources import BadRow, read_lines
from tests import ROOT
from tests.messages import refused
from tests.rows.read import examples_of, read_file, resolved

pytestmark = pytest.mark.unit

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": "NA"}}}


def make_rows(count):
    """Rows whose tool calls have different keys; in a table, missing keys are null."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "", "tool_calls": [CALL if i % 2 else OTHER]},
                {"role": "tool", "content": "7"},
                {"role": "assistant", "content": "NA"},
            ],
            "id": None,
        }
        for i in range(count)
    ]


def write(path, rows):
    write_table(path, pyarrow.Table.from_pylist(rows))


def write_table(path, table):
    """Write Parquet, or an Arrow file or stream, with 2 rows in a record batch."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    open_writer = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
    with open_writer(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


# The last is not read as a glob.
NAMES = ["t.parquet", "stream.arrow", "file.arrow", "[x]*.parquet"]


def assert_same_rows_as_json(path, rows):
    """Compare the examples of a table with those of the same rows as JSON lines."""
    json_lines = path.with_name("rows.jsonl")
    json_lines.write_text("\n".join(map(json.dumps, rows)))
    rows_read = read_file(path)
    assert [row.line for row in rows_read] == [*range(1, len(rows) + 1)]  # row numbers
    assert {row.offset for row in rows_read} == {None}
    assert examples_of(path) == examples_of(json_lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_gives_the_rows_of_the_same_json(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 2)
    rows = make_rows(5)
    write(tmp_path / name, rows)
    assert_same_rows_as_json(tmp_path / name, rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_compressed_table_gives_the_rows_of_the_same_json(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 2)
    rows = make_rows(5)
    write(tmp_path / name, rows)
    compressed = tmp_path / f"{name}.gz"
    compressed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert_same_rows_as_json(compressed, rows)


def test_a_damaged_table_is_refused_with_its_name(tmp_path):
    write(tmp_path / "t.parquet", make_rows(5))
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "truncated.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "no.arrow").write_bytes(b'{"text": "t"}')
    for name, kind in (("truncated.parquet", "Parquet"), ("no.arrow", "Arrow")):
        with refused(tmp_path / name, kind, "row 0"):
            read_file(tmp_path / name)


def test_two_columns_or_fields_of_one_name_are_refused(tmp_path):
    texts = pyarrow.array(["a", "b"])
    fields = pyarrow.StructArray.from_arrays([texts, texts], names=["role", "role"])
    columns = ([texts, texts, texts], ["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(pyarrow.table(*columns), tmp_path / "columns.parquet")
    pyarrow.parquet.write_table(pyarrow.table([fields], ["m"]), tmp_path / "fields.parquet")
    for file, name in (("columns.parquet", "completion"), ("fields.parquet", "role")):
        with refused(tmp_path / file, name, "two columns"):
            read_file(tmp_path / file)


@pytest.mark.parametrize("name", ["t.parquet", "stream.arrow"])
@pytest.mark.parametrize("encode", [lambda column: column, pyarrow.Array.dictionary_encode])
def test_long_rows_and_rows_with_invalid_utf8_are_bad_rows(tmp_path, name, encode, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(tables, "_BYTES_AT_ONCE", 500)
    two_bytes = "ä".encode()
    texts_and_reasons = [
        (b"a", None),
        (b"x" * 2000, "the row is longer"),
        (two_bytes * 400, None),
        (two_bytes * 600, "the row is longer"),
        (b"\xff", "not valid UTF-8"),
        (b"b", None),
        (b"x" * 700, None),
    ]
    texts = [text for text, _ in texts_and_reasons]
    column = encode(pyarrow.array(texts).view(pyarrow.string()))
    write_table(tmp_path / name, pyarrow.table({"text": column, "n": range(len(texts))}))
    result = read_file(tmp_path / name)
    assert [row.line for row in result] == [*range(1, len(texts) + 1)]
    for row, (text, reason) in zip(result, texts_and_reasons, strict=True):
        if reason is None:
            assert row.value["text"] == text.decode()
        else:
            assert isinstance(row, BadRow)
            assert reason in row.reason


def test_long_rows_are_sent_to_worker_processes_in_small_chunks(tmp_path):
    texts = [f"{i:09}" * 10_000 for i in range(40)]
    pyarrow.parquet.write_table(
        pyarrow.table({"m": [[{"content": text}] for text in texts]}), tmp_path / "t.parquet"
    )
    (tmp_path / "t.csv").write_text("m\n" + "\n".join(texts))
    for name in ("t.parquet", "t.csv"):
        sources = resolved(tmp_path / name)
        rows_per_chunk = [len(chunk.lines) for chunk in chunks(sources, 1000)]
        assert sum(rows_per_chunk) == 40
        # A row has 90 kB, and a chunk ends with the row that exceeds 256 KiB.
        assert max(rows_per_chunk) == 3


def test_a_row_group_is_never_in_memory_as_a_whole(tmp_path):
    texts = [os.urandom(400).hex() for _ in range(30_000)]
    table = pyarrow.table({"prompt": texts, "completion": texts})
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    del table
    allocated = max(
        pyarrow.total_allocated_bytes()
        for line in read_lines(resolved(path)[0])
        if line.number % 100 == 0
    )
    assert allocated < path.stat().st_size / 4


def test_reading_a_table_leaves_no_files(tmp_path):
    write(tmp_path / "t.parquet", make_rows(5))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    code = (
        "from pipeline.config.data_names import DataSource\n"
        "from pipeline.rows.sources import read_rows, resolve_sources\n"
        f"data = [DataSource(path={str(tmp_path / 't.parquet')!r})]\n"
        "sources = resolve_sources(data, 'train_data')\n"
        "assert len(list(read_rows(sources))) == 5\n"
    )
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        check=True,
    )
    assert not list((tmp_path / "home").rglob("*"))
    assert not list((tmp_path / "temporary").rglob("*"))
