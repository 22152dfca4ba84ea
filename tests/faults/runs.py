"""Runs of `deepspeed launch/train.py` on two CPU ranks with the tiny model, for the fault tests."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import psutil
import yaml

from pipeline.train.metrics import read_metrics
from tests import ROOT
from tests.commands import Command, free_port, run

BIN = Path(sys.executable).parent
IS_FULL = os.environ.get("FAULTS") == "full"  # set by `make faults`; else a short form of each test
SEED = int(os.environ.get("FAULTS_SEED", "0"))
# An epoch has 6 steps of 4 micro-batches, 2 on each rank. Training is in bf16, with dropout.
EPOCHS = 8 if IS_FULL else 6
TOTAL_STEPS, SAVE_STEPS, EVAL_STEPS = 6 * EPOCHS, 2, 6
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": EPOCHS, "global_batch_size": 4,
    "batch_size": 1, "packing": False, "max_length": 128, "logging_steps": 1, "zero_stage": 2,
    "bf16": True, "save_steps": SAVE_STEPS, "evaluation_strategy": "steps",
    "eval_steps": EVAL_STEPS,
}  # fmt: skip
# A run on packs with as many steps: an epoch of packs has 4.
IN_PACKS = {"packing": True, "epochs": TOTAL_STEPS // 4}
DEADLINE_S = 180.0  # for every wait


def write_run_file(folder: Path, name: str, model: Path, **settings) -> Path:
    """Write the run file of a run on the rows in `folder`; `name` is also its run folder."""
    paths = {
        "model": str(model),
        "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "heldout.jsonl"),
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(paths | SETTINGS | settings))
    return path


@dataclass
class StartedRun:
    """A started run: the `deepspeed` command and all processes that it starts.

    `start_s`: the start on the monotonic clock. `start_time`: in seconds since 1970, as in
    status.json.
    """

    run_file: Path
    process: subprocess.Popen
    log: Path
    start_s: float = field(default_factory=time.monotonic)
    start_time: float = field(default_factory=time.time)

    @cached_property
    def folder(self) -> Path:
        return Path(yaml.safe_load(self.run_file.read_text())["output_dir"])

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every running process of this run, including orphans."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if str(self.run_file) in (process.info["cmdline"] or [])
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def is_running(self) -> bool:
        """Whether any process of this run is alive."""
        return self.process.poll() is None or bool(self.processes())

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, by local rank."""
        ranks = {}
        for process in self.processes():
            line = _command_line(process)
            options = [part for part in line if part.startswith("--local_rank=")]
            if options and "deepspeed.launcher.launch" not in line:
                ranks.setdefault(int(options[0].split("=")[1]), process)
        return [ranks[number] for number in sorted(ranks)]

    def node_launcher(self) -> psutil.Process:
        """DeepSpeed's launcher on this node, which `deepspeed` starts."""
        name = "deepspeed.launcher.launch"
        (launcher,) = [p for p in self.processes() if name in _command_line(p)]
        return launcher

    def wait_until(
        self, condition: Callable[[], object], name: str, *, poll_s: float = 0.005
    ) -> None:
        """Wait for a condition while the run is running."""
        while not condition():
            if not self.is_running():
                raise AssertionError(f"ended before {name}:\n{self.output}")
            if time.monotonic() - self.start_s > DEADLINE_S:
                raise AssertionError(f"no {name} in {DEADLINE_S} s:\n{self.output}")
            time.sleep(poll_s)

    def is_done(self) -> bool:
        """Whether the run is trained to the end, so that a signal would come too late."""
        return status(self.folder).get("state") == "done"

    def wait_for_step(self, step: int) -> None:
        """Wait until this start has reached a step."""
        self.wait_until(lambda: self.is_done() or self.step() >= step, f"step {step}")

    def wait_for_save(self, step: int) -> None:
        """Wait until a checkpoint is being written after a step."""
        self.wait_for_step(step)
        folder = self.folder / "checkpoints"
        self.wait_until(lambda: self.is_done() or list(folder.glob(".step-*.new")), "a save")

    def wait_for_ranks(self) -> None:
        """Wait until the processes of both ranks exist; they then import modules for seconds."""
        self.wait_until(
            lambda: self.is_done() or len(self.ranks()) == 2,
            "two ranks",
            poll_s=0.1,  # the condition searches all processes
        )

    def resumed_step(self) -> int:
        """The step from which this start resumed."""
        return resumed_step(self.output)

    def has_stepped(self) -> bool:
        """Whether this start has trained a step."""
        return re.search(r"^step \d+/", self.output, re.MULTILINE) is not None

    def step(self) -> int:
        """The latest step of this start; 0 before it has trained or resumed."""
        current = status(self.folder)
        started = current.get("started") or 0.0
        return int(current.get("step") or 0) if started >= self.start_time else 0

    def wait_for_end(self, within_s: float = DEADLINE_S) -> int:
        """Wait until all processes of the run have ended; returns the exit code of the command."""
        code = self.process.wait(DEADLINE_S)
        deadline = time.monotonic() + within_s
        while running := self.processes():
            if time.monotonic() > deadline:
                names = [" ".join(_command_line(process))[-80:] for process in running]
                self.kill()
                raise AssertionError(f"still running after {within_s} s: {names}\n{self.output}")
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """Send SIGKILL to every process of the run."""
        for process in self.processes():
            send(process, signal.SIGKILL)
        self.process.wait(DEADLINE_S)


@dataclass
class ForkedRun(StartedRun):
    """A run of two forked ranks without DeepSpeed's launcher."""

    process: Command

    def is_running(self) -> bool:
        return self.process.is_running()

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in self.process.pids]

    def wait_for_end(self, within_s: float = DEADLINE_S) -> int:
        """The exit code of the first rank that failed, or 0."""
        with self.process as command:
            return command.wait_for_end(within_s)[0]


def start_ranks(run_file: Path) -> StartedRun:
    """Start a run whose launcher does not matter; without FAULTS=full the ranks are forked."""
    if IS_FULL:
        return start(run_file)
    log = run_file.with_suffix(".log")
    log.write_text("")
    return ForkedRun(run_file, Command("launch/train.py", run_file, ranks=2, log=log), log)


def start(
    run_file: Path, *overrides: str, before: tuple[str, ...] = (), log: Path | None = None
) -> StartedRun:
    """Start a run with DeepSpeed's launcher; its output goes to `log` or RUN.log.

    `before`: a command, such as setpriv with its options, that is to start `deepspeed`.
    """
    log = log or run_file.with_suffix(".log")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")
    }
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *before, BIN / "deepspeed", "--num_accelerators", "2",
                "--master_port", str(free_port()),
                "launch/train.py", run_file, *overrides,
            ],
            cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return StartedRun(run_file, process, log)


def run_to_end(run_file: Path) -> str:
    """Start a run, wait until it has trained to the end, and return its output.

    Without FAULTS=full the ranks are forked: DeepSpeed's launcher matters only for interruptions.
    """
    if IS_FULL:
        started = start(run_file)
        code, output = started.wait_for_end(), started.output
    else:
        code, output = run("launch/train.py", run_file, ranks=2)
    assert code == 0, output
    folder = Path(yaml.safe_load(run_file.read_text())["output_dir"])
    assert status(folder)["state"] == "done", output
    return output


def resumed_step(output: str) -> int:
    """The step from which a start resumed, by its output; 0 if it did not."""
    steps = re.findall(r"resuming from step (\d+)", output)
    return int(steps[-1]) if steps else 0


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def status(folder: Path) -> dict:
    try:
        return json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("step-*"))


def send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
