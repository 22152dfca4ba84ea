"""Hub data sets are read from the local cache; only `fetch` downloads."""

import http.server
import json
import os
import subprocess
import sys
import threading

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.config.data_names import DataSource
from pipeline.config.load import load_settings
from pipeline.rows.fetch import fetch
from pipeline.rows.sources import read_rows, resolve_sources
from tests import ROOT
from tests.messages import refused

pytestmark = pytest.mark.tensor

COMMIT = "0" * 39 + "1"
ROWS = b'{"text": "t"}\n{"bad\n{"text": "t"}'  # the second line is not valid JSON


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache folder of the data set org/name, in the layout of huggingface_hub."""
    folder = tmp_path / "hub" / "datasets--org--name"
    for path in ("refs", "blobs", "snapshots/abc123/data"):
        (folder / path).mkdir(parents=True)
    (folder / "refs/main").write_text("abc123")
    for split, count in (("train", 3), ("test", 2)):
        table = pyarrow.Table.from_pylist([{"text": "t"}] * count)
        pyarrow.parquet.write_table(table, folder / "blobs" / split)
        link = folder / f"snapshots/abc123/data/{split}-00000-of-00001.parquet"
        link.symlink_to(folder / "blobs" / split)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["org/name:train", "org/name@abc123:train", "org/name@main:train"])
def test_a_split_of_a_cached_data_set_is_resolved_to_the_commit(name):
    (source,) = resolve_sources([DataSource(path=name, weight=2.0, limit=2)], "train_data")
    assert (source.name, source.weight) == ("org/name@abc123:train", 2.0)
    assert len(list(read_rows([source]))) == 2


@pytest.mark.usefixtures("hub")
def test_a_missing_split_is_refused_with_the_splits_of_the_data_set():
    with refused("eval_data", "org/name@main:dev", "train, test"):
        resolve_sources([DataSource(path="org/name:dev")], "eval_data")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "name_with_revision"),
    [("org/other:train", "org/other@main:train"), ("org/name@fff:train", "org/name@fff:train")],
)
def test_a_data_set_that_is_not_cached_is_refused_with_the_command_that_downloads_it(
    name, name_with_revision
):
    with refused("train_data", name_with_revision, "rankzero prepare RUN.yaml"):
        resolve_sources([DataSource(path=name)], "train_data")


def test_json_files_of_a_hub_data_set_give_bad_rows_for_bad_lines(hub):
    for path in (hub / "snapshots/abc123/data").iterdir():
        path.unlink()
    (hub / "snapshots/abc123/data/train.jsonl").write_bytes(ROWS)
    (source,) = resolve_sources([DataSource(path="org/name:train")], "train_data")
    assert [hasattr(row, "reason") for row in read_rows([source])] == [False, True, False]


def test_a_data_set_with_several_configurations_is_refused_with_their_names(hub):
    card = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files: data/*.parquet\n" for name in ("one", "two")
    )
    (hub / "snapshots/abc123/README.md").write_text(f"---\n{card}---\n")
    with refused("train_data", "one", "two", hub / "snapshots/abc123"):
        resolve_sources([DataSource(path="org/name:train")], "train_data")


def test_settings_record_the_commit_of_a_cached_data_set(hub, tmp_path):
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


def test_an_interrupted_download_is_refused_and_completed_by_fetch(hub, monkeypatch):
    """Otherwise a run would train on the present shards as if the data set were complete."""
    present = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    files = {name: {"size": 1, "blob_id": "e"} for name in (*present, "data/train-1.parquet")}
    (hub / "trees").mkdir()
    (hub / "trees/abc123.json").write_text(json.dumps({"format_version": 1, "files": files}))
    with refused("train_data", "org/name@main:train", "rankzero prepare RUN.yaml"):
        resolve_sources([DataSource(path="org/name:train")], "train_data")
    downloads = record_downloads(monkeypatch)
    fetch([DataSource(path="org/name:train")], "train_data")
    assert [arguments for arguments, _ in downloads] == [("org/name",)]


def record_downloads(monkeypatch):
    """Record the arguments of snapshot_download instead of downloading; the cache is still read."""
    downloads, snapshot_download = [], huggingface_hub.snapshot_download

    def read_cache_or_record(*arguments, **keywords):
        if "local_files_only" in keywords:
            return snapshot_download(*arguments, **keywords)
        downloads.append((arguments, keywords))
        return None

    monkeypatch.setattr("huggingface_hub.snapshot_download", read_cache_or_record)
    return downloads


@pytest.mark.usefixtures("hub")
def test_only_data_sets_missing_in_the_cache_are_fetched(monkeypatch):
    downloads = record_downloads(monkeypatch)
    names = ("org/name:train", "org/other@v1:train", __file__)
    fetch([DataSource(path=name) for name in names], "train_data")
    assert downloads == [(("org/other",), {"repo_type": "dataset", "revision": "v1"})]


@pytest.mark.usefixtures("hub")
def test_a_failed_download_is_refused_with_the_data_set_and_the_error(monkeypatch):
    def lose_connection(*args, **kwargs):
        raise OSError("no route\n to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lose_connection)
    with refused("eval_data", "org/other@main:train", "no route to host"):
        fetch([DataSource(path="org/other:train")], "eval_data")


class Hub(http.server.BaseHTTPRequestHandler):
    """A fake hub that has the data set org/other."""

    requested: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.requested.append(self.path)
        headers = {"Content-Type": "application/json"}
        if "/tree/" in self.path:
            entry = {"type": "file", "path": "train.jsonl", "size": len(ROWS), "oid": "e"}
            body = json.dumps([entry]).encode()
        elif "/revision/" in self.path:
            info = {"id": "org/other", "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}
            body = json.dumps(info).encode()
        else:
            body, headers = ROWS, {"ETag": '"e"', "X-Repo-Commit": COMMIT}
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


def test_a_fetched_data_set_is_read_without_a_request(tmp_path):
    code = (
        "from pipeline.config.data_names import DataSource\n"
        "from pipeline.rows.fetch import fetch\n"
        "from pipeline.rows.sources import read_rows, resolve_sources\n"
        "sources = [DataSource(path='org/other:train')]\n"
        "if fetches:\n"
        "    fetch(sources, 'train_data')\n"
        "(source,) = resolve_sources(sources, 'train_data')\n"
        "print(source.name, len(list(read_rows([source]))))\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HOME": str(tmp_path), "HF_ENDPOINT": address}
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            environment.pop(name, None)

        def run(*, fetches):
            result = subprocess.run(
                [sys.executable, "-c", f"fetches = {fetches}\n{code}"],
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            return result.stdout.strip() or result.stderr

        assert "rankzero prepare" in run(fetches=False)
        assert not Hub.requested
        assert run(fetches=True) == f"org/other@{COMMIT}:train 3"
        assert any("train.jsonl" in path for path in Hub.requested)
        Hub.requested.clear()
        assert run(fetches=True) == f"org/other@{COMMIT}:train 3"  # cached
        assert not Hub.requested
        server.shutdown()
