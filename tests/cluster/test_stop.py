"""Stop requests by signal, file, time limit and launcher; and the message about a hang."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from types import SimpleNamespace

import psutil
import pytest

from pipeline.cluster.heartbeat import hang_message
from pipeline.cluster.launcher import has_ended, watch_launchers
from pipeline.cluster.stop import STOP_SIGNALS, StopRequests
from pipeline.errors import Stopped, UserError
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.unit


@pytest.fixture
def stops(tmp_path):
    """Stop requests of this process, whose signal handlers are installed during the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stops = StopRequests(tmp_path, None, reads_stop_file=True)
    stops.install_handlers(lambda: None)
    yield stops
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_of_two_stop_requests_is_the_reason(stops, number):
    assert stops.reason() is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stops.reason() == f"signal {signal.Signals(number).name}"


def test_the_stop_is_announced_once_above_a_bar(stops, monkeypatch):
    """While rich draws a bar, sys.stderr is its own stream, which prints above the bar."""
    above_the_bar = StringIO()
    monkeypatch.setattr(sys, "stderr", above_the_bar)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while "stopping" not in above_the_bar.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.05)
    assert above_the_bar.getvalue().count("stopping") == 1


def test_a_hang_up_is_still_ignored_under_nohup(tmp_path):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stops = StopRequests(tmp_path, None, reads_stop_file=True)
        stops.install_handlers(lambda: None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stops.reason() is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_rank_checks_the_stop_file_and_removes_it(stops, tmp_path):
    other = StopRequests(tmp_path, None, reads_stop_file=False)
    (tmp_path / "stop").touch()
    assert stops.reason() == f"the file {tmp_path / 'stop'}"
    assert other.reason() is None
    stops.remove_stop_file()
    assert stops.reason() is None


def test_the_time_limit_counts_from_the_start_of_the_process(tmp_path):
    assert StopRequests(tmp_path, 0.0, reads_stop_file=False).reason() == "time_limit"
    in_100_days_s = 100 * 24 * 3600.0
    assert StopRequests(tmp_path, in_100_days_s, reads_stop_file=False).reason() is None


def test_a_signal_interrupts_long_work_before_the_first_step(stops):
    start = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with refused("before the first step", error=Stopped), stops.interrupting():
        time.sleep(30)
    assert time.monotonic() - start < 30
    assert stops.reason() == "signal SIGUSR1"
    os.kill(os.getpid(), signal.SIGUSR1)  # outside of `interrupting` it is only recorded
    with pytest.raises(Stopped), stops.interrupting():
        raise AssertionError("the earlier request must interrupt")


def test_the_interrupt_is_not_caught_by_except_exception(stops):
    def load():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)
        except Exception:
            raise UserError("the tokenizer cannot be loaded") from None

    with refused("SIGUSR1", error=Stopped), stops.interrupting():
        load()


def test_the_stop_file_interrupts_work_before_the_first_step(stops, tmp_path):
    threading.Timer(0.1, (tmp_path / "stop").touch).start()
    with refused(tmp_path / "stop", error=Stopped), stops.interrupting():
        time.sleep(30)
    assert not (tmp_path / "stop").exists()  # the next start does not stop at once


def test_the_time_limit_interrupts_work_before_the_first_step(tmp_path):
    stops = StopRequests(tmp_path, 0.0, reads_stop_file=True)
    stops.install_handlers(lambda: None)
    with refused("time_limit", error=Stopped), stops.interrupting():
        time.sleep(30)


def test_another_thread_may_request_a_stop(stops):
    stops.request("its launcher has ended")
    assert stops.reason() == "its launcher has ended"


def test_a_rank_whose_launcher_has_ended_gets_a_stop_request():
    requests = queue.Queue()
    watch_launchers({"RANK": "0"}, requests.put)  # DeepSpeed's launcher did not start this rank
    assert requests.empty()
    # Only DeepSpeed's launcher sets CROSS_RANK. No ancestor of pytest is such a launcher, so it
    # counts as ended.
    watch_launchers({"CROSS_RANK": "0"}, requests.put)
    assert requests.get(timeout=30) == "its launcher has ended"


# Sends itself the signals whose numbers are its arguments.
CODE = """
import os, signal, sys, time
from pathlib import Path
from pipeline.cluster.stop import StopRequests
stops = StopRequests(Path("nowhere"), None, reads_stop_file=True)
stops.install_handlers(lambda: os.write(1, b"the final status\\n"))
for number in sys.argv[1:]:
    os.kill(os.getpid(), int(number))
time.sleep(1)
print("continued")
"""


INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)
INTERRUPTED = 128 + INT  # exit code


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((INT,), 0),
        ((TERM, TERM, INT), 0),
        ((INT, INT), INTERRUPTED),
        ((INT, TERM, INT), INTERRUPTED),
    ],
)
def test_a_second_ctrl_c_ends_the_process_at_once(numbers, code):
    result = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert result.stdout == ("the final status\n" if code else "continued\n")


def test_a_second_ctrl_c_does_not_wait_for_a_hanging_disk():
    # The handler that writes the final status hangs, and the main thread sleeps for long.
    code = CODE.replace('os.write(1, b"the final status\\n")', "time.sleep(900)")
    code = code.replace("time.sleep(1)", "time.sleep(30)")
    command = [sys.executable, "-c", code, str(INT), str(INT)]
    result = subprocess.run(command, check=False, timeout=20)
    assert result.returncode == INTERRUPTED


def test_signals_are_recorded_while_the_main_thread_is_in_c_code(tmp_path):
    """Python's own handlers would run only when the C function returns."""
    code = """
import os, signal, threading, time
from pathlib import Path
from hashlib import pbkdf2_hmac
from pipeline.cluster.stop import StopRequests
from tests.messages import assert_mentions
stops = StopRequests(Path("nowhere"), None, reads_stop_file=True)
stops.install_handlers(lambda: None)
def send():
    time.sleep(1)  # until the main thread is in the C function
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1)
    os.write(1, f"{stops.stop_reason_before_loop()}\\n".encode())
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
threading.Thread(target=send).start()
pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert result.returncode == INTERRUPTED, result.stderr
    assert result.stdout == "signal SIGUSR1\n"


def heartbeat(**fields):
    """A heartbeat as each rank publishes it; `beats`: their number, `where`: file and line."""
    return {
        "host": "a",
        "step": 7,
        "phase": "the forward pass",
        "beats": 9,
        "where": "x.py:3",
    } | fields


def test_the_message_about_a_hang_names_the_rank_with_the_fewest_heartbeats():
    heartbeats = {
        0: heartbeat(),
        1: heartbeat(beats=8, phase="the backward pass", host="b"),
        2: heartbeat(),
    }
    message = hang_message(heartbeats, [], 60)
    assert "rank 1 on b hangs at step 7 in the backward pass (x.py:3)" in message
    assert "rank 0 on" not in message
    assert "the others wait" in message


def test_the_message_about_a_hang_names_a_rank_that_publishes_no_heartbeats():
    message = hang_message({0: heartbeat(beats=8), 1: heartbeat(beats=9)}, frozen=[1], timeout_s=60)
    assert "rank 1 on a hangs" in message
    assert "stopped" in message
    assert "rank 0 on" not in message


def test_without_a_step_the_message_mentions_neither_step_nor_checkpoint():
    """There is no step in a preflight or while the base is loaded."""
    message = hang_message({0: heartbeat(step=None), 1: heartbeat(step=None, beats=8)}, [], 60)
    assert_mentions(message, "rank 1 on a", "in the forward pass")
    assert "step" not in message
    assert "checkpoint" not in message
    assert "checkpoint" in hang_message({0: heartbeat()}, [], 60)


def test_the_message_about_a_hang_names_all_ranks_if_none_is_behind():
    message = hang_message({0: heartbeat(), 1: heartbeat()}, [], 60)
    assert "all ranks hang" in message
    assert message.count("hangs at step 7") == 2


def test_a_process_whose_state_is_hidden_has_not_ended():
    class Hidden:
        def is_running(self):
            return True

        def status(self):
            raise psutil.AccessDenied

    assert not has_ended(Hidden())
    assert has_ended(SimpleNamespace(is_running=lambda: False))
