"""One start owns a folder, whoever else begins in the same second."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from pipeline.errors import UserError
from pipeline.train.owner import OWNER, Ownership
from pipeline.train.status import RunStatus, read_status

RACER = """
import sys, time
from pathlib import Path
from pipeline.errors import UserError
from pipeline.train.owner import Ownership
folder, at = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, at - time.time()))
try:
    Ownership(folder).take()
    print("mine", flush=True)
    input()
except UserError:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("is_left_by_a_dead_one", [False, True])
def test_of_many_that_begin_at_once_one_has_it(tmp_path, is_left_by_a_dead_one):
    if is_left_by_a_dead_one:
        dead = {"host": socket.gethostname(), "pids": [2**22 + 1], "started": time.time()}
        (tmp_path / OWNER).write_text(json.dumps(dead))
    at = time.time() + 3
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, tmp_path, str(at)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    said = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.kill()
        racer.communicate()
    assert said.count("mine") == 1
    assert said.count("refused") == 5
    Ownership(tmp_path).take()  # the one that had it is dead


def test_a_living_owner_is_named_and_its_end_gives_the_folder_back(tmp_path):
    living = {"host": "node7", "pids": [41], "started": 0}
    (tmp_path / OWNER).write_text(json.dumps(living))
    with pytest.raises(UserError, match=r"process 41 on node7.*stop"):
        Ownership(tmp_path).take()
    os.utime(tmp_path / OWNER, (1, 1))  # silent for long
    mine = Ownership(tmp_path)
    mine.take()
    assert json.loads((tmp_path / OWNER).read_text())["pids"] == [os.getpid()]
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_being_written_is_living(tmp_path):
    (tmp_path / OWNER).touch()
    with pytest.raises(UserError, match="in use"):
        Ownership(tmp_path).take()


def test_a_start_that_ends_before_it_claims_leaves_the_word_on_the_run_that_was(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "done"}')
    status = RunStatus(tmp_path / "status.json")
    status.end("failed", 2, "not even the owner")
    status.own()
    status.end("failed", 2, "the rows are bad")
    assert read_status(tmp_path / "status.json") == {"state": "done"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
