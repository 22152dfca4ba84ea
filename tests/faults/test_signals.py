"""Every signal in every phase to each process: stopped with a checkpoint, no step lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.commands import free_port
from tests.faults.runs import (
    EVAL_STEPS,
    IN_PACKS,
    IS_FULL,
    ROOT,
    SEED,
    TOTAL_STEPS,
    Started,
    adapter,
    finish,
    losses,
    send,
    start,
    status,
    steps_on_disk,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PHASES = ("start-up", "step", "evaluation", "save")
TARGETS = ("rank 0", "rank 1", "node launcher", "outer command", "terminal")
STEPS_A_HIT = 16  # that a run may make between two signals: to an evaluation, and until it stops
# A supervisor's patience; DeepSpeed's launcher itself waits 30 s for a rank.
WITHIN_S = 30.0
SHORT = [
    ("outer command", signal.SIGTERM, "evaluation"),
    ("node launcher", signal.SIGUSR2, "save"),
    ("rank 1", signal.SIGUSR1, "step"),
]


def deliver(run: Started, target: str, number: signal.Signals) -> None:
    if target == "terminal":
        os.killpg(run.process.pid, number)  # as Ctrl-C does
    elif target == "outer command":
        run.process.send_signal(number)
    elif target == "node launcher":
        send(run.node_launcher(), number)
    else:
        ranks = run.ranks()
        send(ranks[int(target[-1]) % len(ranks)], number)


def wait_for(run: Started, phase: str, step: int, chance: random.Random) -> None:
    if phase == "start-up":
        run.wait_for_ranks()
        time.sleep(chance.uniform(0, 8))
    elif phase == "step":
        run.wait_for_step(step)
        time.sleep(chance.uniform(0, 0.1))
    elif phase == "save":
        run.wait_for_save(step)
    else:  # the evaluation comes right after its step
        run.wait_for_step(-(-step // EVAL_STEPS) * EVAL_STEPS)


def cases():
    """For each target one run, which gets every signal in every phase in turn."""
    if not IS_FULL:
        return [("short", SHORT)]
    return [(t, [(t, s, p) for p in PHASES for s in SIGNALS]) for t in TARGETS]


@pytest.mark.parametrize(("name", "hits"), cases(), ids=[name for name, _ in cases()])
def test_a_signal_stops_with_a_checkpoint(run_file, workspace, request, name, hits):
    is_packed = name in ("short", "terminal")
    straight = request.getfixturevalue("straight_in_packs" if is_packed else "straight")
    name = f"signalled-{name.replace(' ', '-')}"
    path, folder = run_file(name, **IN_PACKS if is_packed else {}), workspace / name
    chance, lost, before, runs = random.Random(f"{SEED} {name}"), 0, 0, 1
    for turn, (target, number, phase) in enumerate(hits):
        if before > TOTAL_STEPS - STEPS_A_HIT:  # the next signal could come too late
            require_same(path, folder, straight, before)
            shutil.rmtree(folder)
            before, runs = 0, runs + 1
        earlier, kept = status(folder), steps_on_disk(folder)
        run = start(path)
        step = before + chance.randrange(1, 3)
        wait_for(run, phase, step, chance)
        assert not run.is_over(), f"{turn}: came too late"
        deliver(run, target, number)
        began = time.monotonic()
        code = run.end(WITHIN_S)
        took, said = time.monotonic() - began, status(folder)
        assert took < WITHIN_S, run.output
        print(
            f"{number.name} to {target} in {phase}: code {code}, status {said.get('state')} "
            f"{said.get('exit_code')} at step {said.get('step')}, all gone in {took:.1f} s"
        )
        assert not psutil.pid_exists(run.process.pid)
        if phase == "start-up" and said.get("step", 0) == earlier.get("step", 0):
            # Until all ranks have met a signal just ends a process; then it is a stop like any.
            assert said == earlier or (said["state"], said["exit_code"]) == ("stopped", 75)
            assert steps_on_disk(folder) == kept, run.output
            assert code != 0 or target == "node launcher", run.output
            continue
        assert (said["state"], said["exit_code"]) == ("stopped", 75), run.output
        assert steps_on_disk(folder)[-1] == said["step"] >= before, run.output
        if "rank" in target:
            assert code == 75, run.output
        if before:
            lost += before - run.resumed_step()
        before = said["step"]
    require_same(path, folder, straight, before)
    print(f"{len(hits)} signals to {runs} runs, steps lost: {lost}")
    assert lost == 0


def require_same(path, folder, straight, step):
    """Resume the run to its end, and compare it with an undisturbed one."""
    output = finish(path)
    assert f"resuming from step {step}" in output
    assert adapter(folder) == adapter(straight)
    assert losses(folder) == losses(straight)


def test_ctrl_c_stops_with_a_checkpoint_where_the_reader_of_the_output_ends_first(
    run_file, workspace, straight
):
    """As in `deepspeed ... | tee log`, where Ctrl-C ends tee at once."""
    path, folder = run_file("piped"), workspace / "piped"
    pipe, shown = workspace / "piped.pipe", b""
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run = start(path, log=pipe)
    pipe.unlink()  # the run has it open; another reader would wait for ever
    pipe.touch()
    while b"step 3/" not in shown:
        assert run.process.poll() is None, shown.decode()
        with suppress(BlockingIOError):
            shown += os.read(reader, 4096)
        time.sleep(0.01)
    os.close(reader)
    run.wait_for_step(5)  # it continues although nobody reads
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(WITHIN_S)
    while run.processes():
        assert time.monotonic() - run.began < 120
        time.sleep(0.05)
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("stopped", 75)
    assert steps_on_disk(folder)[-1] == status(folder)["step"]
    assert "resuming from step" in finish(path)
    assert adapter(folder) == adapter(straight)


def test_an_interrupt_ends_a_rank_that_waits_for_the_others(run_file):
    """Python only records it while torch waits, and the `&` of a script switches it off."""
    port = free_port()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    off = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    rank = subprocess.Popen(
        [*off, sys.executable, "launch/train.py", run_file("alone")],
        cwd=ROOT, env=os.environ | alone,
    )  # fmt: skip
    try:
        while not any(c.laddr.port == port for c in psutil.Process(rank.pid).net_connections()):
            assert rank.poll() is None
            time.sleep(0.05)
        rank.send_signal(signal.SIGINT)
        assert rank.wait(WITHIN_S) == -signal.SIGINT
    finally:
        rank.kill()
