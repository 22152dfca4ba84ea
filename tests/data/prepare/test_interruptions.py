"""Killed and concurrent preparations leave no incomplete data that a reader accepts."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.dataset.writer import SplitWriter
from pipeline.data.prepare import prepare as module
from pipeline.data.prepare.prepare import prepare_data
from tests import commands
from tests.data.prepare.preparation import row

pytestmark = pytest.mark.tensor


def test_a_killed_preparation_leaves_the_earlier_data(run):
    first = run.prepare()
    run.append(row("new"))
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.data.prepare import prepare\n"
        "from pipeline.data.dataset.writer import SplitWriter\n"
        "def add_and_die(self, *args, add=SplitWriter.add):\n"
        "    add(self, *args)\n"
        "    for column in self._columns.values():\n"
        "        column.stream.flush()\n"
        "    os._exit(9)\n"
        "SplitWriter.add = add_and_die\n"
        "settings = RunSettings.model_validate_json(sys.argv[1])\n"
        "prepare.prepare_data(settings, Path(sys.argv[2]))\n"
    )
    exit_code, output = commands.run("-c", code, run.settings().model_dump_json(), run.data)
    assert exit_code == 9, output
    assert len([path for path in run.data.iterdir() if path.name.endswith(".tmp")]) == 1
    assert DataIndex.load(run.data) == first
    assert len(open_split(first.train)) == 24
    second = run.prepare()
    assert second.train.documents == len(open_split(second.train)) == 25
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


def test_an_interrupt_before_the_index_is_written_leaves_the_earlier_data(run, monkeypatch):
    first = run.prepare()
    run.append(row("new"))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_summary", die)
        with pytest.raises(KeyboardInterrupt):
            run.prepare()
    assert DataIndex.load(run.data) == first
    assert open_split(first.train).document(0)
    second = run.prepare()
    assert DataIndex.load(run.data) == second
    assert run.audit()["rows_used"] == 25


def assert_complete_after_another_writer(run, monkeypatch, change=lambda split: None):
    """Prepare data while another process publishes the same splits first.

    `change`: a function that changes the folder of each split that the other process published.
    """
    publish = SplitWriter.publish
    elsewhere = run.folder / "elsewhere"

    def publish_after_another(self, audit):
        if not elsewhere.exists():
            prepare_data(run.settings(), elsewhere)
            for split in elsewhere.glob("*-*"):
                change(shutil.copytree(split, run.data / split.name))
        publish(self, audit)

    monkeypatch.setattr(SplitWriter, "publish", publish_after_another)
    index = run.prepare()
    assert elsewhere.exists()
    assert len(open_split(index.train)) == 24
    assert len(open_split(index.eval)) == 6
    names = {path.name for path in run.data.iterdir()}
    splits = {f"train-{index.train.key}", f"eval-{index.eval.key}"}
    assert names == {*splits, "index.json", "audit.json", "rejects.jsonl"}


def test_the_second_of_two_writers_keeps_the_split_of_the_first(run, monkeypatch):
    """Two processes prepare the same data at once, on a file system without locks."""
    assert_complete_after_another_writer(run, monkeypatch)


def test_the_second_of_two_writers_replaces_a_damaged_split_of_the_first(run, monkeypatch):
    assert_complete_after_another_writer(
        run, monkeypatch, lambda split: (split / "ids.npy").write_bytes(b"")
    )


def test_two_concurrent_preparations_both_succeed(run):
    settings = run.settings().model_dump_json()
    with commands.Command("-c", PREPARE, settings, run.data, variables=[{}, {}]) as both:
        exit_code, output = both.wait_for_end()
        assert exit_code == 0, output
        assert [printed for printed, _ in both.outputs] == ["24 6\n"] * 2
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


PREPARE = """
import sys
from pathlib import Path
from pipeline.config.settings import RunSettings
from pipeline.data.prepare.prepare import prepare_data
from pipeline.data.dataset.reader import open_split
index = prepare_data(RunSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
print(len(open_split(index.train)), len(open_split(index.eval)))
"""


@pytest.mark.parametrize("name", ["train-0123456789abcdef", "index.json.damaged"])
def test_temporary_files_of_a_dead_process_of_this_machine_are_removed(run, name):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    run.data.mkdir(parents=True)
    for pid in (dead.pid, os.getpid()):
        (run.data / f".{name}.{socket.gethostname()}-{pid}.tmp").write_text("")
    run.prepare()
    living = f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
    assert [path.name for path in run.data.glob(f".{name}.*")] == [living]


def test_temporary_files_of_another_machine_are_kept_for_a_day(run):
    run.data.mkdir(parents=True)
    of_other_host = run.data / f".train-{'0' * 16}.other-host-17.tmp"
    of_other_host.mkdir()
    (of_other_host / "ids.npy").write_bytes(b"x")
    run.prepare()
    assert of_other_host.is_dir()
    for path in (of_other_host / "ids.npy", of_other_host):
        os.utime(path, (0, 0))  # written in 1970
    run.prepare()
    assert not of_other_host.exists()
