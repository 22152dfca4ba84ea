"""Real `deepspeed launch/train.py` runs on two CPU ranks with the tiny model, to be broken."""

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
from tests.commands import free_port, run

BIN = Path(sys.executable).parent
IS_FULL = os.environ.get("FAULTS") == "full"  # `make faults`; else a short form of each
SEED = int(os.environ.get("FAULTS_SEED", "0"))
# 8 epochs of 6 steps of 4 micro-batches, 2 on each of 2 ranks; in bf16, with dropout.
TOTAL_STEPS, SAVE_STEPS, EVAL_STEPS = 48, 2, 6
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": 8, "global_batch_size": 4,
    "batch_size": 1, "packing": False, "max_length": 128, "logging_steps": 1, "zero_stage": 2,
    "bf16": True, "save_steps": SAVE_STEPS, "evaluation_strategy": "steps",
    "eval_steps": EVAL_STEPS,
}  # fmt: skip
IN_PACKS = {"packing": True, "epochs": 12}  # of 4 steps: as many
DEADLINE_S = 180.0


def write_run_file(folder: Path, name: str, model: Path, **settings) -> Path:
    """The run file of a run folder of the same name; the data lies in `folder`."""
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
class Started:
    """A run that has been started: the outer command and all that it starts."""

    run_file: Path
    process: subprocess.Popen
    log: Path
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)

    @cached_property
    def folder(self) -> Path:
        return Path(yaml.safe_load(self.run_file.read_text())["output_dir"])

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every process of this run that is alive, orphans among them."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if str(self.run_file) in (process.info["cmdline"] or [])
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def ranks(self) -> list[psutil.Process]:
        """The ranks, by number."""
        found = {}
        for process in self.processes():
            line = _line(process)
            number = [part for part in line if part.startswith("--local_rank=")]
            if number and "deepspeed.launcher.launch" not in line:
                found.setdefault(int(number[0].split("=")[1]), process)
        return [found[number] for number in sorted(found)]

    def node_launcher(self) -> psutil.Process:
        """DeepSpeed's launcher of this machine."""
        (found,) = [p for p in self.processes() if "deepspeed.launcher.launch" in _line(p)]
        return found

    def wait_until(self, claim: Callable[[], object], what: str, *, every_s: float = 0.005) -> None:
        """Wait for a condition while the run is at work."""
        while not claim():
            if self.process.poll() is not None and not self.processes():
                raise AssertionError(f"ended before {what}:\n{self.output}")
            if time.monotonic() - self.began > DEADLINE_S:
                raise AssertionError(f"no {what} in {DEADLINE_S} s:\n{self.output}")
            time.sleep(every_s)

    def is_over(self) -> bool:
        """Whether the run has ended; a signal now would come too late."""
        return status(self.folder).get("state") == "done"

    def wait_for_step(self, step: int) -> None:
        """Wait until this start has made a step."""
        self.wait_until(lambda: self.is_over() or self.step() >= step, f"step {step}")

    def wait_for_save(self, step: int) -> None:
        """Wait until a checkpoint is being written, after a step."""
        self.wait_for_step(step)
        folder = self.folder / "checkpoints"
        self.wait_until(lambda: self.is_over() or list(folder.glob(".step-*.new")), "a save")

    def wait_for_ranks(self) -> None:
        """Wait until both ranks are processes; they import for seconds from here on."""
        self.wait_until(
            lambda: self.is_over() or len(self.ranks()) == 2,
            "two ranks",
            every_s=0.1,  # it searches all processes
        )

    def resumed_step(self) -> int:
        """The step that this start resumed from."""
        return resumed_step(self.output)

    def has_stepped(self) -> bool:
        """Whether this start has made a step of its own."""
        return re.search(r"^step \d+/", self.output, re.MULTILINE) is not None

    def step(self) -> int:
        """The latest step of this start; 0 before it has made or resumed one."""
        found = status(self.folder)
        mine = found.get("started") or 0.0
        return int(found.get("step") or 0) if mine >= self.began_at else 0

    def end(self, within_s: float = DEADLINE_S) -> int:
        """Wait until no process of the run is left; returns the exit code that its starter saw."""
        code = self.process.wait(DEADLINE_S)
        deadline = time.monotonic() + within_s
        while left := self.processes():
            if time.monotonic() > deadline:
                names = [" ".join(_line(process))[-80:] for process in left]
                self.kill()
                raise AssertionError(f"still there after {within_s} s: {names}\n{self.output}")
            time.sleep(0.05)
        return code

    def kill(self) -> None:
        """SIGKILL to everything."""
        for process in self.processes():
            send(process, signal.SIGKILL)
        self.process.wait(DEADLINE_S)


def start(
    run_file: Path, *overrides: str, before: tuple[str, ...] = (), log: Path | None = None
) -> Started:
    """Start a run as a user does; its output goes to `log`, by default beside the run file.

    `before` are words in front of the command, such as of setpriv.
    """
    log = log or run_file.with_suffix(".log")
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    clean |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *before, BIN / "deepspeed", "--num_accelerators", "2",
                "--master_port", str(free_port()),
                "launch/train.py", run_file, *overrides,
            ],
            cwd=ROOT, env=clean, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Started(run_file, process, log)


def finish(run_file: Path) -> str:
    """Start, and wait for the end of the run; returns the output.

    In the short form the ranks are forked without DeepSpeed's launcher, which matters only for runs
    that are disturbed.
    """
    if IS_FULL:
        started = start(run_file)
        code, output = started.end(), started.output
    else:
        code, output = run("launch/train.py", run_file, ranks=2)
    assert code == 0, output
    folder = Path(yaml.safe_load(run_file.read_text())["output_dir"])
    assert status(folder)["state"] == "done", output
    return output


def resumed_step(output: str) -> int:
    """The step that a start logged to resume from."""
    found = re.findall(r"resuming from step (\d+)", output)
    return int(found[-1]) if found else 0


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


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
