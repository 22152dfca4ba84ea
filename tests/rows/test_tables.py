"""Parquet and Arrow: the rows of the same JSON, in bounded memory, without leftover files."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.config.data_names import DataSource
from pipeline.data.prepare.lines import chunks
from pipeline.rows import lines as limits
from pipeline.rows import tables
from pipeline.rows.sources import BadRow, read_lines, read_rows, resolve_sources
from tests import ROOT
from tests.messages import refused
from tests.rows.reading import examples_of

pytestmark = pytest.mark.unit

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": "NA"}}}


def rows_of(n):
    """Rows whose structures differ, so that a table has nulls where a key is not there."""
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
        for i in range(n)
    ]


def write(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
    with new(path, table.schema) as into:
        into.write_table(table, max_chunksize=2)


def read(path):
    return list(read_rows(resolve_sources([DataSource(path=str(path))], "train_data")))


@pytest.mark.parametrize("name", ["t.parquet", "stream.arrow", "file.arrow", "[x]*.parquet"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_table_gives_the_rows_that_json_gives(tmp_path, name, is_packed, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 2)
    rows = rows_of(5)
    path = tmp_path / name
    write(path, rows)
    if is_packed:
        (packed := tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(path)
    assert [(row.line, row.offset) for row in found] == [(n, None) for n in range(1, 6)]
    assert examples_of(path) == examples_of(tmp_path / "rows.jsonl")


def test_a_damaged_table_ends_the_run_and_names_the_file(tmp_path):
    write(tmp_path / "t.parquet", rows_of(5))
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "no.arrow").write_bytes(b'{"text": "t"}')
    for name, kind in (("cut.parquet", "Parquet"), ("no.arrow", "Arrow")):
        with refused(tmp_path / name, kind, "row 0"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["t.parquet", "stream.arrow"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_long_row_and_one_bad_byte_are_bad_rows(tmp_path, name, is_shared, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(tables, "_BYTES_AT_ONCE", 500)
    texts = [b"a", b"x" * 2000, "ä".encode() * 400, "ä".encode() * 600, b"\xff", b"b", b"x" * 700]
    column = pyarrow.array(texts).view(pyarrow.string())
    column = column.dictionary_encode() if is_shared else column
    table = pyarrow.table({"text": column, "n": range(7)})
    if name == "t.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as into:
            into.write_table(table)
    found = read(tmp_path / name)
    assert [row.line for row in found] == [*range(1, 8)]
    reasons = [row.reason if isinstance(row, BadRow) else "" for row in found]
    assert [reason[:7] for reason in reasons] == ["", "the row", "", "the row", "not val", "", ""]
    assert found[6].value == {"text": "x" * 700, "n": 6}


def test_long_rows_go_to_processes_in_small_pieces(tmp_path):
    texts = [f"{i:09}" * 10_000 for i in range(40)]
    pyarrow.parquet.write_table(
        pyarrow.table({"m": [[{"content": text}] for text in texts]}), tmp_path / "t.parquet"
    )
    (tmp_path / "t.csv").write_text("m\n" + "\n".join(texts))
    for name in ("t.parquet", "t.csv"):
        sources = resolve_sources([DataSource(path=str(tmp_path / name))], "train_data")
        sizes = [len(chunk.lines) for chunk in chunks(sources, 1000)]
        assert sum(sizes) == 40
        assert max(sizes) == 3  # of 90 kB each: the first that goes over 256 KiB is the last


def test_a_row_group_is_not_in_memory_as_a_whole(tmp_path):
    texts = [os.urandom(400).hex() for _ in range(30_000)]
    table = pyarrow.table({"prompt": texts, "completion": texts})
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    del table
    held = max(
        pyarrow.total_allocated_bytes()
        for line in read_lines(resolve_sources([DataSource(path=str(path))], "train_data")[0])
        if line.number % 100 == 0
    )
    assert held < path.stat().st_size / 4


def test_reading_a_table_leaves_no_files(tmp_path):
    write(tmp_path / "t.parquet", rows_of(5))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    code = (
        "from pipeline.config.data_names import DataSource\n"
        "from pipeline.rows.sources import BadRow, read_lines, read_rows, resolve_sources\n"
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
