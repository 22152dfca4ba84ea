"""A Slurm for all tests here, and the folder from which they submit."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import ROOT, Cluster, reason_unavailable, wait_until
from tests.tiny import make_rows

# 3 epochs of 6 steps, a sequence on each of 4 ranks.
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": 3, "global_batch_size": 4,
    "batch_size": 1, "max_length": 128, "save_steps": 2, "logging_steps": 1, "bf16": False,
    "fp16": False, "packing": False,
}  # fmt: skip

CPUS = "--cpus-per-gpu=4"
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2", CPUS)
# As seen from the folder in which jobs are submitted.
TRAIN, DEBUG = "../my checkout/slurm/train.sbatch", "../my checkout/slurm/debug.sbatch"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes, node1 and node2, of eight made-up GPUs each."""
    if "SLURM_TESTS" not in os.environ:
        pytest.skip("minutes on a Slurm of its own: `make test-slurm` runs it")
    if (reason := reason_unavailable()) is not None:
        pytest.skip(f"a Slurm here {reason}")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def submit(tmp_path_factory) -> Path:
    """A folder with spaces in its path, far from the project, which a link there leads to."""
    folder = tmp_path_factory.mktemp("home") / "my work"
    folder.mkdir()
    (folder.parent / "my checkout").symlink_to(ROOT)
    make_rows(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="session")
def run_file(submit, tiny_model) -> Callable[..., Path]:
    """Write the run file of a run folder of the same name: name, settings -> its path."""

    def write(name: str, **settings) -> Path:
        paths = {
            "model": str(tiny_model),
            "train_data": "train.jsonl",
            "output_dir": f"runs/{name}",
        }
        path = submit / f"{name} run.yaml"
        path.write_text(yaml.safe_dump(paths | SETTINGS | settings))
        return path

    return write


@pytest.fixture(scope="session")
def train(cluster, submit, run_file):
    """Submit a run on two ranks of each node: name, sbatch's flags -> the job, the run folder."""

    def start(name: str, *flags: str):
        return cluster.sbatch(submit, *flags, TRAIN, run_file(name).name), submit / "runs" / name

    return start


@pytest.fixture(scope="session")
def limited(train):
    """A run that its time limit hits in the middle: it waits for a rank until it is warned.

    However long its start took: the limit is set once it is there, to one or two minutes more.
    """
    job, run = train("limited", *TWO_BY_TWO, "--time=30", "--signal=B:USR1@60")
    held = job.hold(run, rank=3, step=4)
    hours, minutes, _ = (int(part) for part in job.show("RunTime").split(":"))
    job.limit(60 * hours + minutes + 2)

    def let_go() -> None:
        wait_until(lambda: "stop requested" in job.output, "warning", job.tell)
        held.send_signal(signal.SIGCONT)

    threading.Thread(target=let_go, daemon=True).start()
    return job, run


@pytest.fixture(scope="session")
def straight(limited, train) -> Path:
    """The folder of a run that nothing interrupts, made while the limited one waits."""
    job, run = train("straight", *TWO_BY_TWO)
    job.end("COMPLETED")
    assert job.restarts == 0
    return run


@pytest.fixture(scope="session")
def lost(cluster, straight, train):
    """A run that has lost the daemon of its second node in the middle, just now."""
    job, run = train("lost", *TWO_BY_TWO)
    job.hold(run, rank=3, step=4)
    cluster.kill_slurmd("node2")
    return job, run
