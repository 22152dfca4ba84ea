"""If a rank dies or hangs, all ranks end, and the last message names the rank and the reason."""

import os
import signal
import time

import psutil
import pytest

from tests.commands import Command, free_port
from tests.messages import assert_mentions

pytestmark = pytest.mark.group

# A rank with a watchdog, which it starts before it runs the statements that replace `{act}`.
# HANG_S: a rank counts as hanging after this time without a heartbeat, in seconds. FINAL_STATUS:
# the file that `on_end` writes, in place of status.json.
CODE = """
import os, sys, time
from datetime import timedelta
from pipeline.cluster.exits import run_main
from pipeline.cluster.placement import from_environment
from pipeline.cluster.session import Session
from pipeline.errors import SingleRankError, Stopped
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.watchdog import Watchdog
from tests.plan.test_plan import CPU

def body():
    placement, heartbeat = from_environment(os.environ), Heartbeat()
    with Session(placement, CPU) as session:
        timeout = float(os.environ["HANG_S"])
        end = lambda text, code: open(os.environ["FINAL_STATUS"], "w").write(f"{code} {text}")
        request = lambda: os.environ.get("STOP_REQUEST") if placement.rank == 1 else None
        with Watchdog(session, heartbeat, timeout, stop_reason_before_loop=request, on_end=end):
            session.rank_zero_first(lambda: None)  # a barrier: both ranks have a watchdog now
            heartbeat.beat("work", 7)
            print("at work", flush=True)
            act(placement.rank, session, heartbeat)

def act(rank, session, heartbeat):
    {act}

run_main(body)
"""
# An endless wait of the other ranks, like a collective of NCCL with a dead rank.
WAIT = "session._open_store().wait(['never'], timedelta(hours=1))"


class Ranks:
    """Two forked ranks (tests/commands.py) that run `act` and write to one log.

    `hang_s`: a rank counts as hanging after this time without a heartbeat; the default is longer
    than any test. `local_size`: ranks on a node; with 1 the two count as ranks on different
    machines.
    """

    def __init__(self, act: str, tmp_path, *, hang_s: float = 900, local_size: int = 2):
        self.log = tmp_path / "log"
        common = {
            "WORLD_SIZE": "2", "LOCAL_SIZE": str(local_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "HANG_S": str(hang_s),
            "FINAL_STATUS": str(tmp_path / "final_status"),
        }  # fmt: skip
        self.command = Command(
            "-c", CODE.replace("{act}", act), log=self.log,
            variables=[
                common | {"RANK": str(rank), "LOCAL_RANK": str(rank % local_size)}
                for rank in range(2)
            ],
        )  # fmt: skip

    def wait_for_work(self):
        """Wait until both ranks run `act`."""
        end = time.monotonic() + 60
        while not self.log.exists() or self.log.read_text().count("at work") < 2:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.command.pids[rank], number)

    def wait_for_end(self, within_s: float = 40) -> tuple[list[int], str]:
        """Exit codes by rank, and the output of both."""
        with self.command:
            codes = self.command.exit_codes(within_s)
        return codes, self.log.read_text().replace("at work\n", "")


def last_line(output: str) -> str:
    """The last line of the output."""
    return output.strip().splitlines()[-1]


def test_an_error_of_one_rank_is_the_last_message(tmp_path):
    act = f"raise ValueError('a bad row') if rank == 1 else {WAIT}"
    codes, output = Ranks(act, tmp_path).wait_for_end()
    assert codes == [1, 1]
    assert last_line(output) == "ValueError: a bad row"
    assert output.count("Traceback") == 1
    final_status = (tmp_path / "final_status").read_text()  # a run writes it to status.json
    assert final_status == "1 rank 1: ValueError: a bad row"


def test_an_error_of_rank_0_is_the_last_message(tmp_path):
    act = f"raise ValueError('a bad row') if rank == 0 else {WAIT}"
    codes, output = Ranks(act, tmp_path).wait_for_end()
    assert codes == [1, 1]
    assert last_line(output) == "ValueError: a bad row"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_another_rank(tmp_path, victim):
    ranks = Ranks(WAIT, tmp_path)
    ranks.wait_for_work()
    ranks.send(victim, signal.SIGKILL)
    codes, output = ranks.wait_for_end()
    assert codes == [-9 if rank == victim else 1 for rank in range(2)]
    message = f"rank {victim} ended without a message"
    assert last_line(output).startswith(message)
    assert output.count("without a message") == 1
    assert (tmp_path / "final_status").read_text().startswith(f"1 {message}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_of_another_machine_is_named(tmp_path, victim):
    """The others do not see the process of that rank; gloo only reports a closed connection."""
    ranks = Ranks(
        "time.sleep(6); raise RuntimeError('Connection closed by peer')", tmp_path, local_size=1
    )
    ranks.wait_for_work()
    time.sleep(3)  # until the victim has published its heartbeat
    ranks.send(victim, signal.SIGKILL)
    codes, output = ranks.wait_for_end()
    assert codes == [-9 if rank == victim else 1 for rank in range(2)]
    message = f"rank {victim} ended without a message"
    assert last_line(output).startswith(message)
    assert "Connection closed by peer" not in output
    assert (tmp_path / "final_status").read_text().startswith(f"1 {message}")


def test_a_lost_connection_between_running_ranks_is_the_last_message(tmp_path):
    act = f"raise RuntimeError('Connection closed by peer') if rank == 0 else {WAIT}"
    codes, output = Ranks(act, tmp_path, local_size=1).wait_for_end()
    assert codes == [1, 1]
    message = "rank 0: lost its connection to another rank: Connection closed by peer"
    assert last_line(output) == message
    assert (tmp_path / "final_status").read_text() == f"1 {message}"


def test_a_stop_that_all_ranks_raise_is_not_reported_as_the_failure_of_one_rank(tmp_path):
    codes, output = Ranks("raise Stopped('start again')", tmp_path).wait_for_end()
    assert codes == [75, 75]  # the code of a run that was stopped and can resume
    assert "start again" in output
    assert "without a message" not in output
    assert not (tmp_path / "final_status").exists()


def assert_single_error_ends_all(tmp_path, victim):
    act = f"raise SingleRankError('its worker died') if rank == {victim} else {WAIT}"
    codes, output = Ranks(act, tmp_path).wait_for_end()
    assert codes == [1, 1]
    assert last_line(output) == f"rank {victim}: its worker died"
    assert "Traceback" not in output


def test_an_error_that_only_rank_0_raises_ends_all_ranks(tmp_path):
    assert_single_error_ends_all(tmp_path, 0)


def test_an_error_that_only_rank_1_raises_ends_all_ranks_and_is_the_status(tmp_path):
    assert_single_error_ends_all(tmp_path, 1)
    assert (tmp_path / "final_status").read_text() == "1 rank 1: its worker died"


def test_a_stop_request_before_the_first_step_ends_all_ranks(tmp_path, monkeypatch):
    """The watchdog ends them although the main threads wait in a library."""
    monkeypatch.setenv("STOP_REQUEST", "signal SIGUSR1")
    codes, output = Ranks(WAIT, tmp_path).wait_for_end()
    assert codes == [75, 75]
    assert_mentions(last_line(output), "before the first step", "signal SIGUSR1")
    assert (tmp_path / "final_status").read_text() == f"75 {last_line(output)}"


def test_a_rank_that_hangs_is_named_with_its_phase(tmp_path):
    act = "\n    ".join(
        (
            "heartbeat.beat('reading rows', 8)",
            "if rank == 1: time.sleep(900)",
            "heartbeat.beat('a sum')",
            WAIT,
        )
    )
    codes, output = Ranks(act, tmp_path, hang_s=2).wait_for_end()
    assert codes == [1, 1]
    assert "rank 1 on " in last_line(output)
    assert "hangs at step 8 in reading rows (<command>:" in last_line(output)
    assert "rank 0 on" not in output


def test_a_rank_that_never_loads_its_model_is_named(tmp_path):
    act = "\n    ".join(
        (
            "import pipeline.cluster.heartbeat as module",
            "module.LOADING_LIMIT_S = 3",
            "heartbeat.beat(module.LOADING_PHASES[0])",
            "if rank == 0: heartbeat.beat(module.LOADING_PHASES[1])",
            WAIT,
        )
    )
    codes, output = Ranks(act, tmp_path, hang_s=1).wait_for_end()
    assert codes == [1, 1]
    assert last_line(output).startswith("no progress for 3 s (the others wait): rank 1 on ")
    assert "hangs at step 7 in loading the base" in last_line(output)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.skipif(os.environ.get("FAULTS") != "full", reason="`make faults`: half a minute each")
def test_a_process_stopped_by_sigstop_is_named_and_killed(tmp_path, victim):
    ranks = Ranks(WAIT, tmp_path, hang_s=4)
    ranks.wait_for_work()
    time.sleep(1)  # until the victim has published its heartbeat
    ranks.send(victim, signal.SIGSTOP)
    codes, output = ranks.wait_for_end(90)
    assert codes[1 - victim] == 1
    assert codes[victim] in (1, -9)
    assert not psutil.pid_exists(ranks.command.pids[victim])
    messages = [line for line in output.splitlines() if line.startswith("no progress for 4 s")]
    assert len(messages) == 1
    assert ("rank 1 on " if victim else "does not answer") in messages[0]
