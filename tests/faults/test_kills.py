"""SIGKILL at any moment: started again until it ends, a run's adapter is bit for bit the same."""

import random
import signal
import time

import pytest

from tests.faults.runs import (
    IS_FULL,
    SAVE_STEPS,
    SEED,
    TOTAL_STEPS,
    Started,
    adapter,
    finish,
    losses,
    send,
    start,
    status,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]
NUM_RUNS, KILLS_A_RUN = (20, 5) if IS_FULL else (1, 3)
VICTIMS = ("rank 0", "rank 1", "node launcher", "outer command", "everything")
MOMENTS = ("start-up", "step", "step", "save", "save")
# A dead rank takes the job down within this; a dead launcher leaves ranks that stop by themselves.
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


def figures(kills: list[tuple[str, str, int]], num_runs: int) -> str:
    """What the kills came to, for the terminal and docs/reliability.md."""
    lost = [steps for *_, steps in kills]
    by_victim = ", ".join(f"{v} {sum(x == v for x, *_ in kills)}" for v in VICTIMS)
    by_moment = ", ".join(f"{m} {sum(x == m for _, x, _ in kills)}" for m in dict.fromkeys(MOMENTS))
    return (
        f"{num_runs} runs, {len(kills)} kills ({by_victim}; {by_moment}); steps done again: "
        f"{sum(lost)} in all, {max(lost)} at most, of {num_runs * TOTAL_STEPS}"
    )


def test_killed_and_started_again_is_bitwise_the_same(run_file, workspace, straight):
    kills = []
    for number in range(NUM_RUNS):
        chance = random.Random(f"{SEED} {number}")
        path, folder = run_file(f"killed-{number}"), workspace / f"killed-{number}"
        reached, victim, moment = 0, "", ""
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
            if reached:
                kills[-1] = (*kills[-1][:2], max(0, reached - run.resumed_step()))
            reached = status(folder).get("step") or 0
            kills.append((victim, moment, 0))
            print(f"run {number}: {victim} at {moment}, step {reached}, all gone in {took:.1f} s")
        output = finish(path)
        went_on = [line for line in output.splitlines() if "going on from step" in line]
        resumed = int(went_on[0].split("going on from step ")[1].split()[0]) if went_on else 0
        kills[-1] = (*kills[-1][:2], max(0, reached - resumed))
        assert adapter(folder) == adapter(straight), f"run {number}"
        assert losses(folder) == losses(straight), f"run {number}"
        print(f"run {number} ended bitwise the same; {figures(kills, number + 1)}", flush=True)
    assert len(kills) == NUM_RUNS * KILLS_A_RUN
    # The newest checkpoint is at most one save old, and one more may have been in flight.
    assert max(lost for *_, lost in kills) <= 2 * SAVE_STEPS
