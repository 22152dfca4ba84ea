"""Parquet, Arrow and hub data sets, which `datasets` reads: rows unchanged, nothing left over."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.config.load import load_settings
from pipeline.config.settings import DataSource
from pipeline.data import tables
from pipeline.data.formats import to_example
from pipeline.data.hub import fetch
from pipeline.data.sources import read_rows, resolve
from pipeline.errors import UserError

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
    return list(read_rows(resolve([DataSource(path=str(path))], "train_data")))


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
    expected = [to_example(row) for row in read(tmp_path / "rows.jsonl")]
    assert [to_example(row) for row in found] == expected


def test_a_damaged_table_ends_the_run_and_names_the_file(tmp_path):
    write(tmp_path / "t.parquet", rows_of(5))
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "no.arrow").write_bytes(b'{"text": "t"}')
    for name, kind in (("cut.parquet", "Parquet"), ("no.arrow", "Arrow")):
        with pytest.raises(UserError, match=rf"{name}: not readable as {kind} after row 0: "):
            read(tmp_path / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with the data set org/name, as the hub's library lays it out."""
    folder = tmp_path / "hub" / "datasets--org--name"
    for path in ("refs", "blobs", "snapshots/abc123/data"):
        (folder / path).mkdir(parents=True)
    (folder / "refs/main").write_text("abc123")
    for split, count in (("train", 3), ("test", 2)):
        write(folder / f"blobs/{split}.parquet", rows_of(count))
        link = folder / f"snapshots/abc123/data/{split}-00000-of-00001.parquet"
        link.symlink_to((folder / f"blobs/{split}.parquet").rename(folder / f"blobs/{split}"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_a_split_of_a_hub_data_set_in_the_local_cache(hub):
    for name in ("org/name:train", "org/name@abc123:train", "org/name@main:train"):
        (source,) = resolve([DataSource(path=name, weight=2.0, limit=2)], "train_data")
        assert (source.name, source.weight) == ("org/name@abc123:train", 2.0)
        assert len(list(read_rows([source]))) == 2
    with pytest.raises(UserError, match=r"eval_data: .*its splits are train, test"):
        resolve([DataSource(path="org/name:dev")], "eval_data")
    for missing in ("org/other:train", "org/name@fff:train"):
        with pytest.raises(UserError, match=r"local cache; fetch it with: .*launch/prepare\.py"):
            resolve([DataSource(path=missing)], "train_data")


def test_json_of_a_hub_data_set_is_read_by_our_own_reader(hub):
    for path in (hub / "snapshots/abc123/data").iterdir():
        path.unlink()
    (hub / "snapshots/abc123/data/train.jsonl").write_text('{"text": "t"}\n{"bad\n{"text": "t"}')
    (source,) = resolve([DataSource(path="org/name:train")], "train_data")
    assert [hasattr(row, "reason") for row in read_rows([source])] == [False, True, False]


def test_several_configurations_are_named(hub):
    card = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files: data/*.parquet\n" for name in ("one", "two")
    )
    (hub / "snapshots/abc123/README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(UserError, match=r"one.*two.*or name the files beneath .*abc123"):
        resolve([DataSource(path="org/name:train")], "train_data")


def test_settings_record_the_commit(hub, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "model: m\noutput_dir: o\neval_data: org/name@abc123:test\n"
        "train_data:\n- org/name:train\n- path: org/name:test\n  weight: 0.5\n- org/other:train\n"
    )
    settings = load_settings(run_file)
    assert [source.path for source in settings.train_sources] == [
        "org/name@abc123:train",
        "org/name@abc123:test",
        "org/other:train",
    ]
    assert settings.train_sources[1].weight == 0.5
    assert settings.eval_data == "org/name@abc123:test"


def test_only_what_is_missing_is_fetched(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs))
    )
    names = ("org/name:train", "org/other@v1:train", __file__)
    fetch([DataSource(path=name) for name in names])
    assert asked == [(("org/other",), {"repo_type": "dataset", "revision": "v1"})]

    def fail(*args, **kwargs):
        raise OSError("no route\n to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"org/other@main:train: cannot be fetched .*no route to"):
        fetch([DataSource(path="org/other:train")])


def test_nothing_is_left_behind(tmp_path):
    write(tmp_path / "t.parquet", rows_of(5))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    code = (
        "from pipeline.config.settings import DataSource\n"
        "from pipeline.data.sources import read_rows, resolve\n"
        f"sources = resolve([DataSource(path={str(tmp_path / 't.parquet')!r})], 'train_data')\n"
        "assert len(list(read_rows(sources))) == 5\n"
    )
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert not list((tmp_path / "home").rglob("*"))
    assert not list((tmp_path / "temporary").rglob("*"))
