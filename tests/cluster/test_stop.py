"""Stop requests: recorded, kept, interrupting before the first step; and hangs are named."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.cluster.heartbeat import hang_message
from pipeline.cluster.launcher import watch_launchers
from pipeline.cluster.stop import STOP_SIGNALS, StopRequests
from pipeline.errors import Stopped, UserError
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit


@pytest.fixture
def stops(tmp_path):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stops = StopRequests(tmp_path, None, is_first=True)
    stops.install_handlers(lambda: None)
    yield stops
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_request_is_the_reason(stops, number):
    assert stops.reason() is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stops.reason() == f"signal {signal.Signals(number).name}"


def test_one_rank_checks_the_stop_file_and_removes_it(stops, tmp_path):
    other = StopRequests(tmp_path, None, is_first=False)
    (tmp_path / "stop").touch()
    assert stops.reason() == f"the file {tmp_path / 'stop'}"
    assert other.reason() is None
    stops.remove_stop_file()
    assert stops.reason() is None


def test_the_time_limit_counts_from_the_start_of_the_process(tmp_path):
    assert StopRequests(tmp_path, 0.0, is_first=False).reason() == "time_limit"
    assert StopRequests(tmp_path, 9e6, is_first=False).reason() is None


def test_long_work_before_the_first_step_is_interrupted(stops):
    began = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(Stopped, match="before the first step"), stops.interrupting():
        time.sleep(30)
    assert time.monotonic() - began < 30
    assert stops.reason() == "signal SIGUSR1"
    os.kill(os.getpid(), signal.SIGUSR1)  # outside it is only recorded
    with pytest.raises(Stopped), stops.interrupting():
        raise AssertionError("there was a request before")


def test_the_interrupt_is_no_exception_that_other_code_handles(stops):
    def load():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)
        except Exception:
            raise UserError("the tokenizer cannot be loaded") from None

    with pytest.raises(Stopped, match="SIGUSR1"), stops.interrupting():
        load()


@pytest.mark.parametrize("limit_s", [None, 0.0])
def test_the_stop_file_and_the_time_limit_interrupt_it_too(tmp_path, limit_s):
    stops = StopRequests(tmp_path, limit_s, is_first=True)
    stops.install_handlers(lambda: None)
    reason = "stop" if limit_s is None else "time_limit"
    request = threading.Timer(0.1, (tmp_path / "stop").touch)
    if limit_s is None:
        request.start()
    with pytest.raises(Stopped, match=reason), stops.interrupting():
        time.sleep(30)
    assert not (tmp_path / "stop").exists()  # the next start does not stop at once


def test_another_thread_may_request_a_stop(stops):
    stops.request("its launcher has ended")
    assert stops.reason() == "its launcher has ended"


def test_a_rank_without_its_launcher_gets_a_stop_request():
    requests = queue.Queue()
    watch_launchers({"RANK": "0"}, requests.put)  # started by something else, or by hand
    assert requests.empty()
    watch_launchers({"CROSS_RANK": "0"}, requests.put)  # no launcher of DeepSpeed's is above pytest
    assert requests.get(timeout=30) == "its launcher has ended"


CODE = """
import os, signal, sys, time
from pathlib import Path
from pipeline.cluster.stop import StopRequests
stops = StopRequests(Path("nowhere"), None, is_first=True)
stops.install_handlers(lambda: os.write(1, b"the final status\\n"))
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
    assert found.stdout == ("the final status\n" if code else "went on\n")


def test_a_second_ctrl_c_does_not_wait_for_a_disk_that_does_not_answer():
    code = CODE.replace('os.write(1, b"the final status\\n")', "time.sleep(900)").replace(
        "(1)", "(30)"
    )
    found = subprocess.run([sys.executable, "-c", code, "2", "2"], check=False, timeout=20)
    assert found.returncode == 130


def test_signals_are_recorded_while_the_main_thread_is_in_a_library(tmp_path):
    """Python's own handlers would run only when the library returns."""
    code = """
import os, signal, threading, time
from pathlib import Path
from hashlib import pbkdf2_hmac
from pipeline.cluster.stop import StopRequests
from tests.messages import assert_mentions
stops = StopRequests(Path("nowhere"), None, is_first=True)
stops.install_handlers(lambda: None)
def send():
    time.sleep(1)  # until the main thread is there
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1)
    os.write(1, f"{stops.reason_to_leave()}\\n".encode())
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
threading.Thread(target=send).start()
pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert found.returncode == 130, found.stderr
    assert found.stdout == "signal SIGUSR1\n"


def heartbeat(**fields):
    return {
        "host": "a",
        "step": 7,
        "phase": "the forward pass",
        "beats": 9,
        "where": "x.py:3",
    } | fields


def test_the_rank_with_the_fewest_beats_is_named():
    heartbeats = {
        0: heartbeat(),
        1: heartbeat(beats=8, phase="the backward pass", host="b"),
        2: heartbeat(),
    }
    message = hang_message(heartbeats, [], 60)
    assert "rank 1 on b hangs at step 7 in the backward pass (x.py:3)" in message
    assert "rank 0 on" not in message
    assert "the others wait" in message


def test_a_stopped_process_is_named_whatever_its_last_heartbeat():
    message = hang_message({0: heartbeat(beats=8), 1: heartbeat(beats=9)}, [1], 60)
    assert "rank 1 on a hangs" in message
    assert "stopped" in message
    assert "rank 0 on" not in message


def test_outside_of_a_training_loop_neither_step_nor_checkpoint_is_mentioned():
    """As in a preflight, or while the base is loaded."""
    message = hang_message({0: heartbeat(step=None), 1: heartbeat(step=None, beats=8)}, [], 60)
    assert_mentions(message, "rank 1 on a", "in the forward pass")
    assert "step" not in message
    assert "checkpoint" not in message
    assert "checkpoint" in hang_message({0: heartbeat()}, [], 60)


def test_where_no_rank_is_behind_all_are_named():
    message = hang_message({0: heartbeat(), 1: heartbeat()}, [], 60)
    assert "all ranks hang" in message
    assert message.count("hangs at step 7") == 2
