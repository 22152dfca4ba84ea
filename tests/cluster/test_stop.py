"""Requests to stop: noted, kept, raised before there is a step; and who hangs is named."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.cluster.heartbeat import who_hangs
from pipeline.cluster.launcher import watch_launchers
from pipeline.cluster.stop import STOP_SIGNALS, StopRequests
from pipeline.errors import Stopped, UserError

pytestmark = pytest.mark.unit


@pytest.fixture
def stops(tmp_path):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stops = StopRequests(tmp_path, None, is_first=True)
    stops.listen(lambda: None)
    yield stops
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_request_is_the_reason(stops, number):
    assert stops.reason() is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stops.reason() == f"signal {signal.Signals(number).name}"


def test_one_rank_looks_for_the_stop_file_and_clears_it(stops, tmp_path):
    other = StopRequests(tmp_path, None, is_first=False)
    (tmp_path / "stop").touch()
    assert stops.reason() == f"the file {tmp_path / 'stop'}"
    assert other.reason() is None
    stops.clear()
    assert stops.reason() is None


def test_the_time_limit_runs_since_the_process_began(tmp_path):
    assert StopRequests(tmp_path, 0.0, is_first=False).reason() == "time_limit"
    assert StopRequests(tmp_path, 9e6, is_first=False).reason() is None


def test_long_work_before_the_first_step_is_broken_off(stops):
    began = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(Stopped, match="before the first step"), stops.raising():
        time.sleep(30)
    assert time.monotonic() - began < 30
    assert stops.reason() == "signal SIGUSR1"
    os.kill(os.getpid(), signal.SIGUSR1)  # outside it is only noted
    with pytest.raises(Stopped), stops.raising():
        raise AssertionError("it had been asked before")


def test_it_is_no_error_that_somebody_could_take_for_his_own(stops):
    def load():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)
        except Exception:
            raise UserError("the tokenizer cannot be loaded") from None

    with pytest.raises(Stopped, match="SIGUSR1"), stops.raising():
        load()


@pytest.mark.parametrize("limit_s", [None, 0.0])
def test_the_stop_file_and_the_time_limit_break_it_off_too(tmp_path, limit_s):
    stops = StopRequests(tmp_path, limit_s, is_first=True)
    stops.listen(lambda: None)
    reason = "stop" if limit_s is None else "time_limit"
    wish = threading.Timer(0.1, (tmp_path / "stop").touch)
    if limit_s is None:
        wish.start()
    with pytest.raises(Stopped, match=reason), stops.raising():
        time.sleep(30)
    assert not (tmp_path / "stop").exists()  # the next start does not stop at once


def test_another_thread_may_ask(stops):
    stops.ask("its launcher is gone")
    assert stops.reason() == "its launcher is gone"


def test_a_rank_without_its_launcher_is_asked_to_stop():
    asked = queue.Queue()
    watch_launchers({"RANK": "0"}, asked.put)  # started by something else, or by hand
    assert asked.empty()
    watch_launchers({"CROSS_RANK": "0"}, asked.put)  # no launcher of DeepSpeed's is above pytest
    assert asked.get(timeout=30) == "its launcher is gone"


CODE = """
import os, signal, sys, time
from pathlib import Path
from pipeline.cluster.stop import StopRequests
stops = StopRequests(Path("nowhere"), None, is_first=True)
stops.listen(lambda: os.write(1, b"the last word\\n"))
for number in sys.argv[1:]:
    os.kill(os.getpid(), int(number))
time.sleep(1)
print("went on")
"""


@pytest.mark.parametrize(
    ("numbers", "code"), [((2,), 0), ((15, 15, 2), 0), ((2, 2), 130), ((2, 15, 2), 130)]
)
def test_a_second_ctrl_c_ends_at_once(numbers, code):
    found = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code
    assert found.stdout == ("the last word\n" if code else "went on\n")


def test_a_second_ctrl_c_does_not_wait_for_a_disk_that_stands_still():
    code = CODE.replace('os.write(1, b"the last word\\n")', "time.sleep(900)").replace(
        "(1)", "(30)"
    )
    found = subprocess.run([sys.executable, "-c", code, "2", "2"], check=False, timeout=20)
    assert found.returncode == 130


def test_signals_are_heard_while_the_main_thread_is_in_a_library(tmp_path):
    """Python's handlers would run when the library comes back."""
    code = """
import os, signal, threading, time
from pathlib import Path
import torch.distributed as dist
from datetime import timedelta
from pipeline.cluster.stop import StopRequests
stops = StopRequests(Path("nowhere"), None, is_first=True)
stops.listen(lambda: None)
def look():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1)
    os.write(1, f"{stops.reason_to_leave()}\\n".encode())
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
threading.Thread(target=look).start()
dist.TCPStore("127.0.0.1", 0, 1, is_master=True).wait(["never"], timedelta(seconds=40))
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert found.returncode == 130, found.stderr
    assert found.stdout == "signal SIGUSR1\n"


def pulse(**fields):
    return {
        "host": "a",
        "step": 7,
        "phase": "the forward pass",
        "beats": 9,
        "where": "x.py:3",
    } | fields


def test_the_rank_that_has_come_least_far_is_named():
    pulses = {0: pulse(), 1: pulse(beats=8, phase="the backward pass", host="b"), 2: pulse()}
    said = who_hangs(pulses, [], 60)
    assert "rank 1 on b hangs at step 7 in the backward pass (x.py:3)" in said
    assert "rank 0 on" not in said
    assert "the others wait" in said


def test_a_stopped_process_is_named_whatever_it_showed_last():
    said = who_hangs({0: pulse(beats=8), 1: pulse(beats=9)}, [1], 60)
    assert "rank 1 on a hangs" in said
    assert "stopped" in said
    assert "rank 0 on" not in said


def test_where_no_one_is_behind_all_are_named():
    said = who_hangs({0: pulse(), 1: pulse()}, [], 60)
    assert "all ranks hang" in said
    assert said.count("hangs at step 7") == 2
