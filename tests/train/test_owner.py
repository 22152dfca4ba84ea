"""Exactly one of several concurrent starts owns a run folder."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.train.owner import OWNER, Ownership, identity, is_running
from pipeline.train.status import RunStatus, read_status
from tests.messages import refused

pytestmark = pytest.mark.unit

NO_SUCH_PID = 2**22 + 1  # above the largest process id of Linux
# Takes a folder at a given time and keeps it. Arguments: the folder, and the time in seconds.
TAKE_AT_TIME = """
import sys, time
from pathlib import Path
from pipeline.errors import UserError
from pipeline.train.owner import Ownership
folder, start_time = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start_time - time.time()))
try:
    Ownership(folder, "a run").take()
    print("mine", flush=True)
    input()
except UserError:
    print("refused", flush=True)
"""


def assert_one_of_six_owns(tmp_path):
    """Start six processes that take the folder at the same time; exactly one may succeed."""
    start_time = time.time() + 3  # all have imported the project by then
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE_AT_TIME, tmp_path, str(start_time)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    answers = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.kill()
        process.communicate()
    assert answers.count("mine") == 1
    assert answers.count("refused") == 5
    Ownership(tmp_path, "a run").take()  # the owner is dead


def test_exactly_one_of_several_concurrent_starts_is_the_owner(tmp_path):
    assert_one_of_six_owns(tmp_path)


def test_exactly_one_of_several_concurrent_starts_replaces_a_dead_owner(tmp_path):
    dead = identity() | {"pids": [NO_SUCH_PID], "started": time.time()}
    (tmp_path / OWNER).write_text(json.dumps(dead))
    assert_one_of_six_owns(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"pids": 3}', '{"started": "x", "pids": [1]}'])
def test_a_damaged_owner_file_counts_until_its_heartbeat_is_old(tmp_path, text):
    (tmp_path / OWNER).write_text(text)
    with refused("output_dir", tmp_path, "in use"):
        Ownership(tmp_path, "a run").take()
    os.utime(tmp_path / OWNER, (1, 1))
    Ownership(tmp_path, "a run").take()


def test_a_living_owner_is_named_and_its_release_frees_the_folder(tmp_path):
    living = {"host": "node7", "pids": [41], "started": 0}
    (tmp_path / OWNER).write_text(json.dumps(living))
    with refused("process 41", "node7", tmp_path / "stop"):
        Ownership(tmp_path, "a run").take()
    os.utime(tmp_path / OWNER, (1, 1))  # the last heartbeat is the file's time: that of 1970
    next_owner = Ownership(tmp_path, "a run")
    next_owner.take()
    assert json.loads((tmp_path / OWNER).read_text())["pids"] == [os.getpid()]
    next_owner.release()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_file_that_is_being_written_counts_as_living(tmp_path):
    (tmp_path / OWNER).touch()
    with refused("output_dir", tmp_path):
        Ownership(tmp_path, "a run").take()


def test_a_start_that_fails_before_it_opens_the_folder_leaves_the_earlier_status(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "done"}')
    status = RunStatus(tmp_path / "status.json")
    status.end("failed", 2, "before the start owns the folder")
    status.take_ownership()
    status.end("failed", 2, "the rows are bad")
    assert read_status(tmp_path / "status.json") == {"state": "done"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_stop_file_is_mentioned_only_if_the_owner_is_a_run(tmp_path):
    """`launch/prepare.py` also owns a folder, but reads no stop file."""
    owner = identity() | {"pids": [os.getppid()], "started": time.time()}
    (tmp_path / OWNER).write_text(json.dumps(owner | {"doing": "launch/prepare.py"}))
    with refused("launch/prepare.py", f"process {os.getppid()}") as caught:
        Ownership(tmp_path, "a run").take()
    assert "touch" not in str(caught.value)


def test_an_earlier_owner_does_not_release_the_folder_of_the_next(tmp_path):
    """This happens after the machine of the first owner was suspended for minutes."""
    first = Ownership(tmp_path, "a run")
    first.take()
    (tmp_path / OWNER).unlink()
    Ownership(tmp_path, "a run").take()
    first.release()
    assert (tmp_path / OWNER).exists()


def test_a_full_disk_leaves_no_owner(tmp_path, monkeypatch):
    class FileOnFullDisk(io.TextIOWrapper):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_on_full_disk(path, mode, **_):
        return FileOnFullDisk(io.FileIO(path, mode))

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with refused("output_dir", tmp_path, "No space left on device"):
        Ownership(tmp_path, "a run").take()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_start_does_not_block_another(tmp_path):
    lock = tmp_path / f"{OWNER}.lock"
    for path in (lock, tmp_path / OWNER):
        path.touch()
        os.utime(path, (1, 1))  # too old for a start that still runs
    Ownership(tmp_path, "a run").take()
    assert not lock.exists()


@pytest.mark.parametrize("machine", ["another boot", "another container"])
def test_a_process_of_another_machine_counts_as_alive_while_its_heartbeat_is_recent(machine):
    owner = identity() | {"machine": machine, "pids": [NO_SUCH_PID], "started": time.time()}
    assert is_running(owner | {"heartbeat": time.time()})
    assert not is_running(owner | {"heartbeat": time.time() - 100})


def test_a_missing_process_of_this_machine_is_dead_in_spite_of_a_recent_heartbeat():
    assert not is_running(identity() | {"pids": [NO_SUCH_PID], "heartbeat": time.time()})
