"""Whoever dies or hangs, all ranks end soon, and the last word says who it was and why."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.group

CODE = """
import os, sys, time
from datetime import timedelta
from pipeline.cluster.exits import run_main
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.errors import OfOneRank, Stopped
from pipeline.cluster.heartbeat import Pulse
from pipeline.cluster.watchdog import Watchdog
from tests.plan.test_plan import CPU

def body():
    placement, pulse = from_environment(os.environ), Pulse()
    with Session(placement, CPU) as session:
        channel, timeout = session.open_channel(), float(os.environ["HANG_S"])
        end = lambda text, code: open(os.environ["SAID"], "w").write(f"{code} {text}")
        wish = lambda: os.environ.get("WISH") if placement.rank == 1 else None
        with Watchdog(placement, channel, pulse, timeout, reason_to_leave=wish, on_end=end):
            session.rank_zero_first(lambda: None)
            pulse.beat("work", 7)
            print("at work", flush=True)
            act(placement.rank, session, pulse)

def act(rank, session, pulse):
    {act}

run_main(body)
"""
# The others are in a wait that nothing ends, as a collective of NCCL on a dead rank.
WAIT = "session._open_store().wait(['never'], timedelta(hours=1))"


class Ranks:
    def __init__(self, act: str, tmp_path, hang_s: float, local_size: int = 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.said = tmp_path / "said"
        self.log = tmp_path / "log"
        self.out = self.log.open("w")
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", CODE.replace("{act}", act)],
                stdout=self.out, stderr=subprocess.STDOUT,
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank % local_size), "WORLD_SIZE": "2",
                    "LOCAL_SIZE": str(local_size), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "HANG_S": str(hang_s), "SAID": str(self.said),
                },
            )
            for rank in range(2)
        ]  # fmt: skip

    def wait_for_work(self):
        end = time.monotonic() + 60
        while self.log.read_text().count("at work") < len(self.ranks):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def end(self, within_s: float = 40) -> tuple[list[int], str]:
        deadline = time.monotonic() + within_s
        try:
            codes = [r.wait(max(0.1, deadline - time.monotonic())) for r in self.ranks]
        finally:
            for rank in self.ranks:
                if rank.poll() is None:
                    rank.kill()
            self.out.close()
        return codes, self.log.read_text().replace("at work\n", "")


def last_words(output: str) -> str:
    """Without what the store's C++ logs."""
    return output.strip().splitlines()[-1]


def test_an_error_of_one_rank_is_the_last_word(tmp_path):
    act = f"raise ValueError('a bad row') if rank == 1 else {WAIT}"
    codes, output = Ranks(act, tmp_path, 900).end()
    assert codes == [1, 1]
    assert last_words(output) == "ValueError: a bad row"
    assert output.count("Traceback") == 1
    assert (tmp_path / "said").read_text() == "1 rank 1: ValueError: a bad row"  # for status.json


def test_an_error_of_rank_0_is_the_last_word_too(tmp_path):
    act = f"raise ValueError('a bad row') if rank == 0 else {WAIT}"
    codes, output = Ranks(act, tmp_path, 900).end()
    assert codes == [1, 1]
    assert last_words(output) == "ValueError: a bad row"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_another(tmp_path, victim):
    ranks = Ranks(WAIT, tmp_path, 900)
    ranks.wait_for_work()
    ranks.ranks[victim].kill()
    codes, output = ranks.end()
    assert codes == [-9 if rank == victim else 1 for rank in range(2)]
    said = f"rank {victim} ended without a word, as after a kill or for want of memory, while rank"
    assert last_words(output).startswith(said)
    assert output.count("without a word") == 1
    assert (tmp_path / "said").read_text().startswith(f"1 {said}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_of_another_machine_is_named(tmp_path, victim):
    """Its process cannot be seen from here; the transport only says that somebody is gone."""
    ranks = Ranks(
        "time.sleep(6); raise RuntimeError('Connection closed by peer')",
        tmp_path,
        900,
        local_size=1,
    )
    ranks.wait_for_work()
    time.sleep(3)  # it has shown its pulse
    ranks.ranks[victim].kill()
    codes, output = ranks.end()
    assert codes == [-9 if rank == victim else 1 for rank in range(2)]
    said = f"rank {victim} ended without a word, as after a kill or for want of memory, while rank"
    assert last_words(output).startswith(said)
    assert "Connection closed by peer" not in output
    assert (tmp_path / "said").read_text().startswith(f"1 {said}")


def test_a_lost_connection_to_ranks_that_live_is_the_last_word(tmp_path):
    act = f"raise RuntimeError('Connection closed by peer') if rank == 0 else {WAIT}"
    codes, output = Ranks(act, tmp_path, 900, local_size=1).end()
    assert codes == [1, 1]
    said = "rank 0: lost its connection to another rank: Connection closed by peer"
    assert last_words(output) == said
    assert (tmp_path / "said").read_text() == f"1 {said}"


def test_an_error_that_all_meet_is_left_to_them(tmp_path):
    codes, output = Ranks("raise Stopped('start again')", tmp_path, 900).end()
    assert codes == [75, 75]
    assert "start again" in output
    assert "without a word" not in output
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_that_one_rank_alone_meets_is_told_to_all(tmp_path, victim):
    act = f"raise OfOneRank('its worker died') if rank == {victim} else {WAIT}"
    codes, output = Ranks(act, tmp_path, 900).end()
    assert codes == [1, 1]
    assert last_words(output) == f"rank {victim}: its worker died"
    assert "Traceback" not in output
    if victim:
        assert (tmp_path / "said").read_text() == "1 rank 1: its worker died"


def test_a_wish_to_stop_that_comes_before_a_step_takes_all_ranks_along(tmp_path, monkeypatch):
    """Also where the main threads are in a library."""
    monkeypatch.setenv("WISH", "signal SIGUSR1")
    codes, output = Ranks(WAIT, tmp_path, 900).end()
    assert codes == [75, 75]
    said = "stopped before the first step (signal SIGUSR1); start again to go on"
    assert last_words(output) == said
    assert (tmp_path / "said").read_text() == f"75 {said}"


def test_a_rank_that_hangs_is_named_with_its_phase(tmp_path):
    waits = f"pulse.beat('a sum') or {WAIT}"
    act = f"pulse.beat('reading rows', 8) or (time.sleep(900) if rank else {waits})"
    codes, output = Ranks(act, tmp_path, 2).end()
    assert codes == [1, 1]
    assert "rank 1 on " in last_words(output)
    assert "hangs at step 8 in reading rows (<string>:" in last_words(output)
    assert "rank 0 on" not in output


def test_a_rank_that_never_loads_its_model_is_named(tmp_path):
    loads = "import pipeline.cluster.heartbeat as w; w.LOADING_S = 3.0; pulse.beat(w.LOADING[0]); "
    act = f"{loads}rank or pulse.beat(w.LOADING[1]); {WAIT}"
    codes, output = Ranks(act, tmp_path, 1).end()
    assert codes == [1, 1]
    assert last_words(output).startswith("no progress for 3 s (the others wait): rank 1 on ")
    assert "hangs at step 7 in loading the base" in last_words(output)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.skipif(os.environ.get("FAULTS") != "full", reason="`make faults`: half a minute each")
def test_a_stopped_process_is_named_and_ended(tmp_path, victim):
    ranks = Ranks(WAIT, tmp_path, 4)
    ranks.wait_for_work()
    time.sleep(1)  # it has shown its pulse
    ranks.ranks[victim].send_signal(signal.SIGSTOP)
    codes, output = ranks.end(90)
    assert codes[1 - victim] == 1
    assert codes[victim] in (1, -9)
    assert not psutil.pid_exists(ranks.ranks[victim].pid)
    said = [line for line in output.splitlines() if line.startswith("no progress for 4 s")]
    assert len(said) == 1
    assert ("rank 1 on " if victim else "does not answer") in said[0]
