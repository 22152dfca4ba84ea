"""Jobs on a real Slurm of two nodes: to the end, limited, requeued, killed, lost, wrong, an array.

A rank that is stopped in the middle keeps the others waiting, so that a test acts on a job before
its end. While a job waits, the job of the next test runs.
"""

import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.messages import assert_mentions
from tests.slurm.cluster import Job, status, wait_until
from tests.slurm.conftest import CPUS, DEBUG, TRAIN, TWO_BY_TWO

pytestmark = pytest.mark.timeout(900)


def same_adapter(one: Path, other: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_two_nodes_train_to_the_end(straight):
    assert status(straight)["state"] == "done"
    (logs,) = (straight / "logs").glob("*/start-0")
    assert {path.name for path in logs.glob("rank-*")} == {f"rank-{i}.log" for i in range(4)}
    assert "step 18/18" in (logs / "rank-0.log").read_text()


def test_a_time_limit_in_the_middle_costs_nothing(limited, straight):
    job, run = limited
    wait_until(lambda: job.restarts == 1, "requeue", job.tell)
    job.limit(30)
    job.end("COMPLETED")
    assert job.restarts == 1
    assert "resuming from step" in job.output
    assert job.output.splitlines()[-1].endswith("done: runs/limited")
    assert same_adapter(run, straight), job.tell()


def test_requeued_and_warned_from_outside(cluster, train, straight):
    job, run = train("outside", *TWO_BY_TWO)
    held = job.hold(run, rank=3, step=2)
    cluster.run("scontrol", "requeue", job.number)
    held.send_signal(signal.SIGCONT)
    held = job.hold(run, rank=2, step=5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    held.send_signal(signal.SIGCONT)
    job.end("COMPLETED")
    assert job.restarts == 2
    assert job.output.count("a checkpoint was written") == 2
    assert same_adapter(run, straight), job.tell()


def test_a_cancelled_job_stays_cancelled(cluster, train):
    job, run = train("cancelled", "--nodes=1", "--gpus-per-node=2", CPUS)
    held = job.hold(run, rank=1, step=2)
    cluster.run("scancel", job.number)
    held.send_signal(signal.SIGCONT)
    wait_until(lambda: status(run).get("state") == "stopped", "checkpoint", job.tell)
    job.end("CANCELLED")
    assert job.restarts == 0


def test_a_killed_rank_ends_the_job_and_is_named_last(train):
    job, run = train("killed", *TWO_BY_TWO)
    job.hold(run, rank=3, step=2).kill()
    killed = time.monotonic()
    job.end("FAILED", within_s=60)
    assert time.monotonic() - killed < 60
    assert job.restarts == 0
    assert_mentions(job.output.splitlines()[-1], "rank 3 ended")


@pytest.fixture(scope="module")
def beside(lost):
    """Options of a job on the node that is not lost."""
    return ("--nodelist=node1", "--nodes=1", CPUS, "--gpus-per-node=1")


@pytest.mark.parametrize(
    ("settings", "fact"),
    [({"lora_rr": 4}, "lora_rr"), ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl")],
    ids=["the batch script sees it", "a rank sees it"],
)
def test_a_wrong_run_file_is_exit_2_and_not_requeued(
    cluster, submit, run_file, beside, settings, fact
):
    path = run_file("wrong", **settings)
    job = cluster.sbatch(submit, *beside[:-1], "--gpus-per-node=2", TRAIN, path.name)
    job.end("FAILED")
    assert (job.show("ExitCode"), job.restarts) == ("2:0", 0), job.tell()
    assert_mentions(job.output, fact)
    assert "Traceback" not in job.output


def test_an_array_trains_a_line_each(cluster, submit, run_file, beside):
    run_file("sweep", global_batch_size=2)
    lines = ["# rates", "lr=1e-3", "lr=2e-3 output_dir='runs/two e-3'", "lr=3e-3"]
    (submit / "rates.txt").write_text("\n".join(lines))
    array = cluster.sbatch(submit, "--array=1-3", *beside, TRAIN, "sweep run.yaml", "@rates.txt")
    runs = [submit / "runs" / name for name in ("sweep-1", "two e-3", "sweep-3")]
    jobs = [Job(cluster, f"{array.number}_{task}", submit) for task in (1, 2, 3)]
    held = jobs[2].hold(runs[2], rank=0, step=2)  # the last has the number of the array itself
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[2].number)
    held.send_signal(signal.SIGCONT)
    for job in jobs:
        job.end("COMPLETED")
    assert [job.restarts for job in jobs] == [0, 0, 1]
    assert [yaml.safe_load((run / "run.yaml").read_text())["lr"] for run in runs] == [
        1e-3, 2e-3, 3e-3,
    ]  # fmt: skip
    assert {status(run)["state"] for run in runs} == {"done"}


def test_preflight_starts_no_run(cluster, submit, run_file, beside):
    run_file("checked")
    flags = (*beside[:-1], "--gpus-per-node=2")
    job = cluster.sbatch(submit, *flags, TRAIN, "--preflight", "checked run.yaml")
    job.end("COMPLETED")
    assert job.output.count("ok    settings") == 1
    assert status(submit / "runs/checked") == {}


def test_debug_on_one_gpu(cluster, submit, run_file, beside):
    run_file("tried")
    job = cluster.sbatch(submit, "--nodelist=node1", DEBUG, "tried run.yaml")
    job.end("COMPLETED")
    assert job.show("TimeLimit") == "00:10:00"
    assert_mentions(job.output, "debug", "lora_B", "frozen weight")
    assert status(submit / "runs/tried-debug")["state"] == "done"


def test_after_a_lost_node_the_run_resumes(cluster, lost, straight):
    job, run = lost
    wait_until(lambda: job.show("JobState") == "PENDING", "requeue by Slurm", job.tell)
    cluster.reboot("node2")
    job.end("COMPLETED")
    assert job.restarts == 1
    assert "resuming from step" in job.output
    assert same_adapter(run, straight), job.tell()
