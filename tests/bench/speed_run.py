"""One measured run of a tool: its environment, its command, its time, tokens and memory."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from tests import ROOT
from tests.bench.speed_cells import PEERS, Tool
from tests.commands import free_port

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankzero-bench"
RANKS = 2
_LIMIT_S = 420.0  # of one run
_POLL_S, _MEMORY_POLLS = 0.1, 10  # memory is read at every tenth poll: each reading costs 20 ms
_LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node", str(RANKS))


def install(name: str) -> Path:
    """The Python of a peer's environment, which is installed if its requirements are new."""
    requirements = PEERS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    folder = CACHE / name
    python, installed = folder / "bin/python", folder / "requirements.sha256"
    if installed.is_file() and installed.read_text() == digest:
        return python
    print(f"installing {requirements.name} into {folder} (some minutes)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if index := os.environ.get("TORCH_INDEX"):
        torch = next(line for line in requirements.open() if line.startswith("torch=="))
        subprocess.run([*pip, "--index-url", index, torch.strip()], check=True)
    # The file lists every package, so that the environment is the same in a year.
    subprocess.run([*pip, "--no-deps", "-r", requirements], check=True)
    installed.write_text(digest)
    return python


def build_operators(name: str | None) -> None:
    """Compile DeepSpeed's operator for sums over CPU ranks, which a first run would wait for.

    Each environment has a folder of its own: with a common one, every change of the environment
    compiles the operator again. Without a compiler DeepSpeed runs without the operator.
    """
    environment = _environment(name)
    folder = Path(environment["TORCH_EXTENSIONS_DIR"])
    if any(folder.rglob("*.so")):
        return
    shutil.rmtree(folder, ignore_errors=True)  # the lock of an interrupted compilation
    print("compiling an operator of DeepSpeed ...", flush=True)
    code = "from deepspeed.comm.torch import build_shm_op as build; build()"
    python = install(name) if name else Path(sys.executable)
    subprocess.run([python, "-c", code], env=environment, check=False, capture_output=True)


def bare_rate(model: str) -> float:
    """FLOP/s of matrix products in the faster of bf16 and fp32, on all ranks at the same time."""
    command = [sys.executable, PEERS / "bare_products.py", model]
    processes = [
        subprocess.Popen(command, env=_environment(None), stdout=subprocess.PIPE, text=True)
        for _ in range(RANKS)
    ]
    return sum(float(process.communicate()[0]) for process in processes)


def measure(tool: Tool, case: dict[str, object], folder: Path) -> dict[str, object]:
    """Run a tool; the measured numbers, or `error` with the end of its output."""
    (folder / "case.json").write_text(json.dumps(case))
    command = _rankzero_command(case, folder)
    steps = folder / "run/metrics.jsonl"
    if tool.script is not None:
        python = install(tool.environment) if tool.environment else Path(sys.executable)
        command = [str(python), *_LAUNCH, str(tool.script), str(folder / "case.json")]
        steps = folder / "steps-0.jsonl"
    log = folder / "output.log"
    load = os.getloadavg()[0]  # processes that other programs keep busy, before the run
    started = time.time()
    code, peak_pss, first_step = _run_and_watch(command, _environment(tool.environment), log, steps)
    wall_s = time.time() - started
    if code:
        return {"error": f"exit code {code}: {_end_of_output(log)}"}
    summarise = _rankzero_steps if tool.script is None else _peer_steps
    summary = summarise(steps.parent, int(case["first_measured"]))
    return {
        **summary,
        "first_step_s": round(first_step - started, 1),
        "wall_s": round(wall_s, 1),
        "pss_bytes": peak_pss,
        "load": load,
    }


def _end_of_output(log: Path) -> str:
    """The last 1500 characters of the output, without torchrun's summary of its ranks."""
    text = log.read_text(errors="replace")
    return re.split(r"\n[EW]\d{4} [^\n]*torch/distributed/elastic", text)[0][-1500:]


def _environment(name: str | None) -> dict[str, str]:
    """One thread for each rank, no hub, compiled modules, and `bin` of this environment in PATH.

    The path of this environment is in the name of its folder of operators: with another path, as in
    another checkout, the first run would compile the operator again.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // RANKS)
    own = f"project-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]}"
    # Otherwise each start would compile all modules of this project, but none of the packages.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {
        "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(CACHE / f"extensions-{name or own}"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip


def _run_and_watch(
    command: list[str], environment: dict[str, str], log: Path, steps: Path
) -> tuple[int, int, float]:
    """Exit code, peak bytes of all processes (proportional set size), and time of the first step.

    `steps`: file in which the run writes a line at the end of each step.
    """
    deadline, peak_pss, first_step, polls = time.time() + _LIMIT_S, 0, 0.0, 0
    with log.open("wb") as output, subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            if polls % _MEMORY_POLLS == 0:
                peak_pss = max(peak_pss, _proportional_bytes(tree))
            if not first_step and steps.is_file() and steps.stat().st_size:
                first_step = time.time()
            if time.time() > deadline:
                for child in [*tree.children(recursive=True), tree]:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            polls += 1
            time.sleep(_POLL_S)
    return process.returncode, peak_pss, first_step


def _proportional_bytes(tree: psutil.Process) -> int:
    """Sum of PSS over a process and its descendants: shared pages count once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in [tree, *tree.children(recursive=True)]:
            with suppress(OSError):
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += 1024 * int(text.split("\nPss:")[1].split()[0])
    return total


def _rankzero_command(case: dict[str, object], folder: Path) -> list[str]:
    settings = {
        "model": case["model"], "train_data": case["rows"], "output_dir": str(folder / "run"),
        "bf16": True, "fp16": False, "lora_target_modules": case["targets"],
        "gradient_accumulation_steps": case["accumulation_steps"], "save_strategy": "no",
        "logging_steps": 1, **{key: case[key] for key in (
            "zero_stage", "gradient_checkpointing", "packing", "load_in_4bit", "batch_size",
            "max_length", "max_steps", "lora_r", "lora_alpha", "lora_dropout", "lr", "seed",
        )},
    }  # fmt: skip
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings))
    launcher = ["deepspeed", "--quiet", "--num_accelerators", str(RANKS)]
    return [*launcher, "--master_port", str(free_port()), "launch/train.py", str(run_file)]


def _rankzero_steps(folder: Path, first: int) -> dict[str, float]:
    """Rates of a run of this project. `first`: number of the first measured step, from 1."""
    steps = json_lines(folder / "metrics.jsonl")[first - 1 :]
    seconds = sum(step["step_seconds"] for step in steps)
    return {
        "useful_per_s": sum(step["tokens"] for step in steps) / seconds,
        "supervised_per_s": sum(step["supervised_tokens"] for step in steps) / seconds,
        "step_s": seconds / len(steps),
    }


def _peer_steps(folder: Path, first: int) -> dict[str, float]:
    """Rates of another tool, summed over the ranks; the time is that of rank 0.

    `first`: number of the first measured step, from 1. It begins at the end of the step before it.
    """
    ranks = [json_lines(path) for path in folder.glob("steps-*.jsonl")]
    end_times = [step["time"] for step in json_lines(folder / "steps-0.jsonl")]
    seconds = end_times[-1] - end_times[first - 2]

    def rate(key: str) -> float:
        return sum(step[key] for rank in ranks for step in rank[first - 1 :]) / seconds

    tokens = rate("tokens")
    return {
        "useful_per_s": tokens,
        "supervised_per_s": rate("supervised_tokens"),
        "padding_share": 1 - tokens / rate("computed_tokens"),
        "step_s": seconds / (len(end_times) - first + 1),
    }


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
