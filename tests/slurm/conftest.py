"""Fixtures: a real Slurm, the folder from which jobs are submitted, and a job on fakes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import ROOT, Cluster, reason_unavailable, wait_until
from tests.slurm.fake_slurm import Job, make_job
from tests.tiny import make_rows

# 3 epochs of 6 steps, with one sequence on each of 4 ranks.
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": 3, "global_batch_size": 4,
    "batch_size": 1, "max_length": 128, "save_steps": 2, "logging_steps": 1, "bf16": False,
    "fp16": False, "packing": False,
}  # fmt: skip

CPUS = "--cpus-per-gpu=4"
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2", CPUS)
# Relative to the folder from which jobs are submitted.
TRAIN, DEBUG = "../my checkout/slurm/train.sbatch", "../my checkout/slurm/debug.sbatch"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A Slurm of two nodes, node1 and node2, each with eight fake GPUs."""
    if "SLURM_TESTS" not in os.environ:
        pytest.skip("takes minutes and starts a Slurm: `make test-slurm`")
    if (reason := reason_unavailable()) is not None:
        pytest.skip(f"Slurm {reason}")
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="session")
def submit(tmp_path_factory) -> Path:
    """A submit folder with spaces in its path; a link next to it leads to the project."""
    folder = tmp_path_factory.mktemp("home") / "my work"
    folder.mkdir()
    (folder.parent / "my checkout").symlink_to(ROOT)
    make_rows(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="session")
def run_file(submit, tiny_model) -> Callable[..., Path]:
    """Function: name of a run folder, and settings -> path of its run file, which is written."""

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
    """Function: name of a run, and options of sbatch -> its submitted job, and its run folder."""

    def start(name: str, *flags: str):
        return cluster.sbatch(submit, *flags, TRAIN, run_file(name).name), submit / "runs" / name

    return start


@pytest.fixture(scope="session")
def limited(train):
    """Job and folder of a run that reaches its time limit.

    Its ranks wait for a stopped one until Slurm warns of the limit, and then continue.

    The limit is set after the first steps, to one or two minutes from then, so that the test does
    not depend on how long the start takes.
    """
    job, run = train("limited", *TWO_BY_TWO, "--time=30", "--signal=B:USR1@60")
    held = job.hold(run, rank=3, step=4)
    hours, minutes, _ = (int(part) for part in job.show("RunTime").split(":"))
    job.limit(60 * hours + minutes + 2)

    def continue_rank() -> None:
        wait_until(lambda: "stop requested" in job.output, "warning", job.diagnosis)
        held.send_signal(signal.SIGCONT)

    threading.Thread(target=continue_rank, daemon=True).start()
    return job, run


@pytest.fixture(scope="session")
def uninterrupted(limited, train) -> Path:
    """The folder of an uninterrupted run, trained while the limited one waits."""
    job, run = train("uninterrupted", *TWO_BY_TWO)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 0
    return run


@pytest.fixture
def job(tmp_path) -> Job:
    """A job on fakes of srun and scontrol."""
    return make_job(tmp_path)


@pytest.fixture(scope="session")
def lost(cluster, uninterrupted, train):
    """Job and folder of a run whose second node has just lost its slurmd, during training."""
    job, run = train("lost", *TWO_BY_TWO)
    job.hold(run, rank=3, step=4)
    cluster.kill_slurmd("node2")
    return job, run
