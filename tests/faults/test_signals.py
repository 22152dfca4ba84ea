"""Every signal to each process in every phase stops a run with a checkpoint and loses no step."""

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
    StartedRun,
    adapter,
    losses,
    run_to_end,
    send,
    start,
    start_ranks,
    status,
    steps_on_disk,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PHASES = ("start-up", "step", "evaluation", "save")
TARGETS = ("rank 0", "rank 1", "node launcher", "outer command", "terminal")
# No start trains more steps than this: the steps before the evaluation in which it gets its signal,
# and the steps until the signal has stopped it.
STEPS_PER_SIGNAL = 16
# Slurm and Kubernetes send SIGKILL 30 s after SIGTERM, as DeepSpeed's launcher does to its ranks.
WITHIN_S = 30.0
# Target, signal and phase of each signal in `make test`.
SHORT = [
    ("outer command", signal.SIGTERM, "evaluation"),
    ("node launcher", signal.SIGUSR2, "save"),
    ("rank 1", signal.SIGUSR1, "step"),
]


def deliver(run: StartedRun, target: str, number: signal.Signals) -> None:
    if target == "terminal":
        os.killpg(run.process.pid, number)  # Ctrl-C does so
    elif target == "outer command":
        run.process.send_signal(number)
    elif target == "node launcher":
        send(run.node_launcher(), number)
    else:
        ranks = run.ranks()
        send(ranks[int(target[-1]) % len(ranks)], number)


def wait_for(run: StartedRun, phase: str, step: int, random_source: random.Random) -> None:
    if phase == "start-up":
        run.wait_for_ranks()
        time.sleep(random_source.uniform(0, 8))
    elif phase == "step":
        run.wait_for_step(step)
        time.sleep(random_source.uniform(0, 0.1))
    elif phase == "save":
        run.wait_for_save(step)
    else:  # the evaluation follows its step
        run.wait_for_step(-(-step // EVAL_STEPS) * EVAL_STEPS)


def cases():
    """Name and signals of each run; in `make faults`, every signal to a target in every phase."""
    if not IS_FULL:
        return [("short", SHORT)]
    return [
        (target, [(target, number, phase) for phase in PHASES for number in SIGNALS])
        for target in TARGETS
    ]


@pytest.mark.parametrize(("name", "signals"), cases(), ids=[name for name, _ in cases()])
def test_a_signal_stops_a_run_with_a_checkpoint_and_loses_no_step(
    run_file, workspace, request, name, signals
):
    is_packed = name in ("short", "terminal")
    uninterrupted = request.getfixturevalue(
        "uninterrupted_in_packs" if is_packed else "uninterrupted"
    )
    name = f"signalled-{name.replace(' ', '-')}"
    path, folder = run_file(name, **IN_PACKS if is_packed else {}), workspace / name
    random_source, num_lost_steps, num_runs = random.Random(f"{SEED} {name}"), 0, 1
    last_step = 0  # at which the latest start stopped; 0 for a new run
    for signal_index, (target, number, phase) in enumerate(signals):
        if last_step > TOTAL_STEPS - STEPS_PER_SIGNAL:  # else the next signal could come too late
            assert_resumes_bitwise(path, folder, uninterrupted, last_step)
            shutil.rmtree(folder)
            last_step, num_runs = 0, num_runs + 1
        earlier_status, earlier_steps = status(folder), steps_on_disk(folder)
        run = start_ranks(path) if "rank" in target else start(path)
        step = last_step + random_source.randrange(1, 3)
        wait_for(run, phase, step, random_source)
        assert not run.is_done(), f"the run was done before signal {signal_index}"
        deliver(run, target, number)
        start_s = time.monotonic()
        code = run.wait_for_end(WITHIN_S)
        end_s, final = time.monotonic() - start_s, status(folder)
        assert end_s < WITHIN_S, run.output
        print(
            f"{number.name} to {target} in {phase}: code {code}, status {final.get('state')} "
            f"{final.get('exit_code')} at step {final.get('step')}, all ended in {end_s:.1f} s"
        )
        assert not run.is_running()
        if phase == "start-up" and final.get("step", 0) == earlier_status.get("step", 0):
            # A signal before the rendezvous ends the process, and status.json stays as it was.
            # After the rendezvous, the run stops and records the stop in status.json.
            is_stopped = (final.get("state"), final.get("exit_code")) == ("stopped", 75)
            assert final == earlier_status or is_stopped
            assert steps_on_disk(folder) == earlier_steps, run.output
            assert code != 0 or target == "node launcher", run.output
            continue
        assert (final["state"], final["exit_code"]) == ("stopped", 75), run.output
        assert steps_on_disk(folder)[-1] == final["saved_step"] == final["step"], run.output
        assert final["step"] >= last_step, run.output
        if "rank" in target:
            assert code == 75, run.output
        if last_step:
            num_lost_steps += last_step - run.resumed_step()
        last_step = final["step"]
    assert_resumes_bitwise(path, folder, uninterrupted, last_step)
    print(f"{len(signals)} signals to {num_runs} runs, steps lost: {num_lost_steps}")
    assert num_lost_steps == 0


def assert_resumes_bitwise(path, folder, uninterrupted, step):
    """Resume the run to its end, and compare it with the uninterrupted one."""
    output = run_to_end(path)
    assert f"resuming from step {step}" in output
    assert adapter(folder) == adapter(uninterrupted)
    assert losses(folder) == losses(uninterrupted)


def test_ctrl_c_stops_with_a_checkpoint_if_the_reader_of_the_output_ends_first(
    run_file, workspace, uninterrupted
):
    """In `deepspeed ... | tee log`, Ctrl-C ends tee at once."""
    path, folder = run_file("piped"), workspace / "piped"
    pipe, output = workspace / "piped.pipe", b""
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run = start(path, log=pipe)
    pipe.unlink()  # the run has it open
    # If an assertion fails, its message reads the log at this path. Opening a pipe would block, so
    # an empty file takes its place.
    pipe.touch()
    while b"step 3/" not in output:
        assert run.process.poll() is None, output.decode()
        with suppress(BlockingIOError):
            output += os.read(reader, 4096)
        time.sleep(0.01)
    os.close(reader)
    run.wait_for_step(5)  # the run continues without a reader
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(WITHIN_S)
    while run.processes():
        assert time.monotonic() - run.start_s < 120
        time.sleep(0.05)
    assert (status(folder)["state"], status(folder)["exit_code"]) == ("stopped", 75)
    assert steps_on_disk(folder)[-1] == status(folder)["step"]
    assert "resuming from step" in run_to_end(path)
    assert adapter(folder) == adapter(uninterrupted)


def test_an_interrupt_ends_a_rank_that_waits_at_the_rendezvous(run_file):
    """Python itself would only record the signal while torch waits.

    SIGINT is ignored at the start, as in processes that a shell starts with `&`.
    """
    port = free_port()
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    without_sigint = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    rank = subprocess.Popen(
        [*without_sigint, sys.executable, "launch/train.py", run_file("alone")],
        cwd=ROOT, env=os.environ | variables,
    )  # fmt: skip
    try:
        while not any(c.laddr.port == port for c in psutil.Process(rank.pid).net_connections()):
            assert rank.poll() is None
            time.sleep(0.05)
        rank.send_signal(signal.SIGINT)
        assert rank.wait(WITHIN_S) == -signal.SIGINT
    finally:
        rank.kill()
