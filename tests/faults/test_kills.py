"""A run that is killed at random moments and restarted has bitwise the same adapter."""

import random
import signal
import time
from dataclasses import dataclass, field

import pytest

from tests.faults.runs import (
    IN_PACKS,
    IS_FULL,
    SAVE_STEPS,
    SEED,
    TOTAL_STEPS,
    StartedRun,
    adapter,
    losses,
    resumed_step,
    run_to_end,
    send,
    start,
    start_ranks,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
NUM_RUNS, KILLS_PER_RUN = (20, 5) if IS_FULL else (1, 2)
VICTIMS = ("rank 0", "rank 1", "node launcher", "outer command", "everything")
MOMENTS = ("start-up", "step", "step", "save", "save")  # drawn at random; two are twice as likely
# All processes end within this time after a rank or a launcher is killed.
WITHIN_S = 30.0


def kill(run: StartedRun, victim: str) -> None:
    if victim == "everything":
        for process in run.processes():
            send(process, signal.SIGKILL)
    elif victim == "outer command":
        run.process.kill()
    elif victim == "node launcher":
        for process in run.processes():
            if "deepspeed.launcher.launch" in process.cmdline():
                send(process, signal.SIGKILL)
    elif ranks := run.ranks():
        send(ranks[int(victim[-1]) % len(ranks)], signal.SIGKILL)


def wait_for(run: StartedRun, moment: str, step: int, random_source: random.Random) -> None:
    """Wait until a random time in start-up, or shortly after a step or the begin of its save."""
    if moment == "start-up":
        run.wait_for_ranks()
        time.sleep(random_source.uniform(0, 8))
    elif moment == "step":
        run.wait_for_step(step)
        time.sleep(random_source.uniform(0, 0.1))
    else:
        run.wait_for_save(step)
        time.sleep(random_source.choice((0, random_source.uniform(0, 0.02))))


@dataclass
class KillStatistics:
    """Counts of runs, kills and repeated steps."""

    runs: int = 0
    kills: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for the terminal and docs/reliability.md."""
        victims, moments = zip(*self.kills, strict=True)
        by_victim = ", ".join(f"{v} {victims.count(v)}" for v in VICTIMS)
        by_moment = ", ".join(f"{m} {moments.count(m)}" for m in dict.fromkeys(MOMENTS))
        return (
            f"{self.runs} runs, {len(self.kills)} kills ({by_victim}; {by_moment}); steps done "
            f"again: {sum(self.repeated)} in all, {max(self.repeated)} at most, of "
            f"{self.runs * TOTAL_STEPS}"
        )


@pytest.fixture(scope="module")
def statistics():
    return KillStatistics()


@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_a_killed_and_restarted_run_is_bitwise_equal(
    run_file, workspace, request, statistics, number
):
    random_source, is_packed = random.Random(f"{SEED} {number}"), number % 2 == 1
    uninterrupted = request.getfixturevalue(
        "uninterrupted_in_packs" if is_packed else "uninterrupted"
    )
    name = f"killed-{number}"
    path, folder = run_file(name, **IN_PACKS if is_packed else {}), workspace / name
    reached = 0  # step at which the last start that trained was killed
    steps_per_kill = TOTAL_STEPS // (KILLS_PER_RUN + 1)
    for kill_number in range(KILLS_PER_RUN):
        step = kill_number * steps_per_kill + random_source.randrange(2, steps_per_kill)
        victim, moment = random_source.choice(VICTIMS), random_source.choice(MOMENTS)
        run = start_ranks(path) if "rank" in victim else start(path)
        wait_for(run, moment, step, random_source)
        assert not run.is_done()
        start_s = time.monotonic()
        kill(run, victim)
        run.wait_for_end(WITHIN_S)
        end_s = time.monotonic() - start_s
        assert end_s < WITHIN_S, run.output
        statistics.kills.append((victim, moment))
        last_step = run.step()
        if run.has_stepped():  # else status.json has the step of an earlier start
            statistics.repeated.append(max(0, reached - run.resumed_step()))
            reached = last_step
        print(f"run {number}: {victim} at {moment}, step {last_step}, all ended in {end_s:.1f} s")
    statistics.repeated.append(max(0, reached - resumed_step(run_to_end(path))))
    assert adapter(folder) == adapter(uninterrupted)
    assert losses(folder) == losses(uninterrupted)
    # The newest checkpoint is at most one save old, and another save may have been in flight.
    assert max(statistics.repeated) <= 2 * SAVE_STEPS
    statistics.runs += 1
    print(f"run {number} is bitwise equal; {statistics}", flush=True)
