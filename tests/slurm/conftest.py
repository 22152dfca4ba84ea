"""Fixtures: a real Slurm, the folder from which jobs are submitted, and a job on a fake Slurm."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import ROOT, Cluster, reason_unavailable, wait_until
from tests.slurm.fake_slurm import FakeJob, make_job
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
def submit_folder(tmp_path_factory) -> Path:
    """The folder from which jobs are submitted, next to a link to the project, both with spaces."""
    folder = tmp_path_factory.mktemp("home") / "my work"
    folder.mkdir()
    (folder.parent / "my checkout").symlink_to(ROOT)
    make_rows(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="session")
def run_file(submit_folder, tiny_model) -> Callable[..., Path]:
    """Function: name of a run folder, and settings -> path of its run file, which is written."""

    def write(name: str, **settings) -> Path:
        paths = {
            "model": str(tiny_model),
            "train_data": "train.jsonl",
            "output_dir": f"runs/{name}",
        }
        path = submit_folder / f"{name} run.yaml"
        path.write_text(yaml.safe_dump(paths | SETTINGS | settings))
        return path

    return write


@pytest.fixture(scope="session")
def submit_training(cluster, submit_folder, run_file):
    """Function: name of a run, and options of sbatch -> its submitted job, and its run folder."""

    def submit(name: str, *options: str):
        job = cluster.sbatch(submit_folder, *options, TRAIN, run_file(name).name)
        return job, submit_folder / "runs" / name

    return submit


@pytest.fixture(scope="session")
def time_limit_job(submit_training):
    """Job and run folder of a run that reaches its time limit.

    A rank is stopped after the first steps, and the limit is set to one or two minutes from then.
    So the test does not depend on the duration of the start. When Slurm has sent its warning, the
    stopped rank continues.
    """
    job, run = submit_training("limited", *TWO_BY_TWO, "--time=30", "--signal=B:USR1@60")
    stopped_rank = job.stop_rank(run, rank=3, step=4)
    hours, minutes, _ = (int(part) for part in job.show("RunTime").split(":"))
    job.set_time_limit(60 * hours + minutes + 2)

    def continue_rank() -> None:
        wait_until(lambda: "stop requested" in job.output, "warning", job.diagnosis)
        stopped_rank.send_signal(signal.SIGCONT)

    threading.Thread(target=continue_rank, daemon=True).start()
    return job, run


@pytest.fixture(scope="session")
def uninterrupted_run(time_limit_job, submit_training) -> Path:
    """The folder of an uninterrupted run, which trains while `time_limit_job` waits."""
    job, run = submit_training("uninterrupted", *TWO_BY_TWO)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 0
    return run


@pytest.fixture
def job(tmp_path) -> FakeJob:
    """A job with fake srun and scontrol."""
    return make_job(tmp_path)


@pytest.fixture(scope="session")
def lost_node_job(cluster, uninterrupted_run, submit_training):
    """Job and run folder of a run on both nodes, after slurmd of node2 was killed in training."""
    job, run = submit_training("lost", *TWO_BY_TWO)
    job.stop_rank(run, rank=3, step=4)
    cluster.kill_slurmd("node2")
    return job, run
