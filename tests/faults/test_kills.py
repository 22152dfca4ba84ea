"""SIGKILL at any moment: a run that is restarted until it ends has bit for bit the same adapter."""

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
    Started,
    adapter,
    finish,
    losses,
    resumed_step,
    send,
    start,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
NUM_RUNS, KILLS_A_RUN = (20, 5) if IS_FULL else (1, 2)
VICTIMS = ("rank 0", "rank 1", "node launcher", "outer command", "everything")
MOMENTS = ("start-up", "step", "step", "save", "save")
# All processes end within this, after a dead rank as after a dead launcher.
WITHIN_S = 30.0


def kill(run: Started, victim: str) -> None:
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


def wait_for(run: Started, moment: str, step: int, chance: random.Random) -> None:
    if moment == "start-up":
        run.wait_for_ranks()
        time.sleep(chance.uniform(0, 8))
    elif moment == "step":
        run.wait_for_step(step)
        time.sleep(chance.uniform(0, 0.1))
    else:
        run.wait_for_save(step)
        time.sleep(chance.choice((0, chance.uniform(0, 0.02))))


@dataclass
class Tally:
    """Counts over the kills of all runs."""

    runs: int = 0
    kills: list[tuple[str, str]] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        """For the terminal and docs/reliability.md."""
        victims, moments = zip(*self.kills, strict=True)
        by_victim = ", ".join(f"{v} {victims.count(v)}" for v in VICTIMS)
        by_moment = ", ".join(f"{m} {moments.count(m)}" for m in dict.fromkeys(MOMENTS))
        return (
            f"{self.runs} runs, {len(self.kills)} kills ({by_victim}; {by_moment}); steps done "
            f"again: {sum(self.redone)} in all, {max(self.redone)} at most, of "
            f"{self.runs * TOTAL_STEPS}"
        )


@pytest.fixture(scope="module")
def tally():
    return Tally()


@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_killed_and_started_again_is_bitwise_the_same(run_file, workspace, request, tally, number):
    chance, is_packed = random.Random(f"{SEED} {number}"), number % 2 == 1
    straight = request.getfixturevalue("straight_in_packs" if is_packed else "straight")
    name = f"killed-{number}"
    path, folder = run_file(name, **IN_PACKS if is_packed else {}), workspace / name
    reached = 0  # the step to be reached again; a start that dies early reaches none
    for turn in range(KILLS_A_RUN):
        share = TOTAL_STEPS // (KILLS_A_RUN + 1)
        step = turn * share + chance.randrange(2, share)
        victim, moment = chance.choice(VICTIMS), chance.choice(MOMENTS)
        run = start(path)
        wait_for(run, moment, step, chance)
        assert not run.is_over()
        began = time.monotonic()
        kill(run, victim)
        run.end(WITHIN_S)
        took = time.monotonic() - began
        assert took < WITHIN_S, run.output
        tally.kills.append((victim, moment))
        made = run.step()
        if run.has_stepped():  # else status.json still says how far an earlier start has come
            tally.redone.append(max(0, reached - run.resumed_step()))
            reached = made
        print(f"run {number}: {victim} at {moment}, step {made}, all gone in {took:.1f} s")
    tally.redone.append(max(0, reached - resumed_step(finish(path))))
    assert adapter(folder) == adapter(straight)
    assert losses(folder) == losses(straight)
    # The newest checkpoint is at most one save old, and one more may have been in flight.
    assert max(tally.redone) <= 2 * SAVE_STEPS
    tally.runs += 1
    print(f"run {number} ended bitwise the same; {tally}", flush=True)
