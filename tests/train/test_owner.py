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

RACER = """
import sys, time
from pathlib import Path
from pipeline.errors import UserError
from pipeline.train.owner import Ownership
folder, at = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, at - time.time()))
try:
    Ownership(folder, "a run").take()
    print("mine", flush=True)
    input()
except UserError:
    print("refused", flush=True)
"""


def assert_one_of_six_owns(tmp_path):
    at = time.time() + 3
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, tmp_path, str(at)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    answers = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.kill()
        racer.communicate()
    assert answers.count("mine") == 1
    assert answers.count("refused") == 5
    Ownership(tmp_path, "a run").take()  # the owner is dead


def test_exactly_one_of_several_concurrent_starts_is_the_owner(tmp_path):
    assert_one_of_six_owns(tmp_path)


def test_exactly_one_of_several_concurrent_starts_replaces_a_dead_owner(tmp_path):
    dead = identity() | {"pids": [2**22 + 1], "started": time.time()}
    (tmp_path / OWNER).write_text(json.dumps(dead))
    assert_one_of_six_owns(tmp_path)


def test_a_living_owner_is_named_and_its_release_frees_the_folder(tmp_path):
    living = {"host": "node7", "pids": [41], "started": 0}
    (tmp_path / OWNER).write_text(json.dumps(living))
    with refused("process 41", "node7", tmp_path / "stop"):
        Ownership(tmp_path, "a run").take()
    os.utime(tmp_path / OWNER, (1, 1))  # no heartbeat for long
    mine = Ownership(tmp_path, "a run")
    mine.take()
    assert json.loads((tmp_path / OWNER).read_text())["pids"] == [os.getpid()]
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_file_that_is_being_written_counts_as_living(tmp_path):
    (tmp_path / OWNER).touch()
    with refused("output_dir", tmp_path):
        Ownership(tmp_path, "a run").take()


def test_a_start_that_ends_before_it_claims_leaves_the_earlier_status(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "done"}')
    status = RunStatus(tmp_path / "status.json")
    status.end("failed", 2, "not even the owner")
    status.take_ownership()
    status.end("failed", 2, "the rows are bad")
    assert read_status(tmp_path / "status.json") == {"state": "done"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_stop_file_is_mentioned_only_for_a_run(tmp_path):
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
    class Full(io.TextIOWrapper):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path, mode, **_):
        return Full(io.FileIO(path, mode))

    monkeypatch.setattr(Path, "open", open_full)
    with refused("output_dir", tmp_path, "No space left on device"):
        Ownership(tmp_path, "a run").take()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_start_does_not_block_another(tmp_path):
    lock = tmp_path / f"{OWNER}.lock"
    for path in (lock, tmp_path / OWNER):
        path.touch()
        os.utime(path, (1, 1))
    Ownership(tmp_path, "a run").take()
    assert not lock.exists()


@pytest.mark.parametrize("machine", ["another boot", "another container"])
def test_a_process_of_another_machine_counts_as_alive_while_its_heartbeat_is_recent(machine):
    owner = identity() | {"machine": machine, "pids": [2**22 + 1], "started": time.time()}
    assert is_running(owner | {"heartbeat": time.time()})
    assert not is_running(owner | {"heartbeat": time.time() - 100})
    assert not is_running(identity() | {"pids": [2**22 + 1], "heartbeat": time.time()})
