"""Jobs on a real Slurm of two nodes: time limits, requeues, kills, a lost node, an array.

A test stops a rank (SIGSTOP), so that the other ranks wait for it and the test can act on the job
before its end. While a job waits, the job of the next test runs.
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


def have_same_adapter(one: Path, other: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_two_nodes_train_to_the_end(uninterrupted):
    assert status(uninterrupted)["state"] == "done"
    (logs,) = (uninterrupted / "logs").glob("*/start-0")
    assert {path.name for path in logs.glob("rank-*")} == {f"rank-{i}.log" for i in range(4)}
    assert "step 18/18" in (logs / "rank-0.log").read_text()


def test_a_run_that_reaches_its_time_limit_is_requeued_and_bitwise_equal(limited, uninterrupted):
    job, run = limited
    wait_until(lambda: job.restarts == 1, "requeue", job.diagnosis)
    job.limit(30)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "resuming from step" in job.output
    assert job.output.splitlines()[-1].endswith("done: runs/limited")
    assert have_same_adapter(run, uninterrupted), job.diagnosis()


def test_a_run_that_is_requeued_or_signalled_by_a_user_is_bitwise_equal(
    cluster, train, uninterrupted
):
    job, run = train("requeued-by-user", *TWO_BY_TWO)
    held = job.hold(run, rank=3, step=2)
    cluster.run("scontrol", "requeue", job.number)
    held.send_signal(signal.SIGCONT)
    held = job.hold(run, rank=2, step=5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    held.send_signal(signal.SIGCONT)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 2
    assert job.output.count("a checkpoint was written") == 2
    assert have_same_adapter(run, uninterrupted), job.diagnosis()


def test_a_cancelled_job_stays_cancelled(cluster, train):
    job, run = train("cancelled", "--nodes=1", "--gpus-per-node=2", CPUS)
    held = job.hold(run, rank=1, step=2)
    cluster.run("scancel", job.number)
    held.send_signal(signal.SIGCONT)
    wait_until(lambda: status(run).get("state") == "stopped", "checkpoint", job.diagnosis)
    job.wait_for_end("CANCELLED")
    assert job.restarts == 0


def test_a_killed_rank_ends_the_job_and_is_named_in_the_last_line(train):
    job, run = train("killed", *TWO_BY_TWO)
    job.hold(run, rank=3, step=2).kill()
    killed = time.monotonic()
    job.wait_for_end("FAILED", within_s=60)
    assert time.monotonic() - killed < 60
    assert job.restarts == 0
    assert_mentions(job.output.splitlines()[-1], "rank 3 ended")


@pytest.fixture(scope="module")
def other_node(lost):
    """Options of sbatch for a job with one GPU (the last option) on the node that is not lost."""
    return ("--nodelist=node1", "--nodes=1", CPUS, "--gpus-per-node=1")


@pytest.mark.parametrize(
    ("settings", "fact"),
    [({"lora_rr": 4}, "lora_rr"), ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl")],
    ids=["found by the batch script", "found by a rank"],
)
def test_a_wrong_run_file_ends_the_job_with_exit_2_and_is_not_requeued(
    cluster, submit, run_file, other_node, settings, fact
):
    path = run_file("wrong", **settings)
    job = cluster.sbatch(submit, *other_node[:-1], "--gpus-per-node=2", TRAIN, path.name)
    job.wait_for_end("FAILED")
    assert (job.show("ExitCode"), job.restarts) == ("2:0", 0), job.diagnosis()
    assert_mentions(job.output, fact)
    assert "Traceback" not in job.output


def test_each_task_of_an_array_trains_its_line(cluster, submit, run_file, other_node):
    run_file("sweep", global_batch_size=2)
    lines = ["# rates", "lr=1e-3", "lr=2e-3 output_dir='runs/two e-3'", "lr=3e-3"]
    (submit / "rates.txt").write_text("\n".join(lines))
    array = cluster.sbatch(
        submit, "--array=1-3", *other_node, TRAIN, "sweep run.yaml", "@rates.txt"
    )
    runs = [submit / "runs" / name for name in ("sweep-1", "two e-3", "sweep-3")]
    jobs = [Job(cluster, f"{array.number}_{task}", submit) for task in (1, 2, 3)]
    held = jobs[2].hold(runs[2], rank=0, step=2)  # the last task has the job id of the array
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[2].number)
    held.send_signal(signal.SIGCONT)
    for job in jobs:
        job.wait_for_end("COMPLETED")
    assert [job.restarts for job in jobs] == [0, 0, 1]
    assert [yaml.safe_load((run / "run.yaml").read_text())["lr"] for run in runs] == [
        1e-3, 2e-3, 3e-3,
    ]  # fmt: skip
    assert {status(run)["state"] for run in runs} == {"done"}


def test_preflight_starts_no_run(cluster, submit, run_file, other_node):
    run_file("checked")
    flags = (*other_node[:-1], "--gpus-per-node=2")
    job = cluster.sbatch(submit, *flags, TRAIN, "--preflight", "checked run.yaml")
    job.wait_for_end("COMPLETED")
    assert job.output.count("ok    settings") == 1
    assert status(submit / "runs/checked") == {}


def test_debug_runs_on_one_gpu(cluster, submit, run_file, other_node):
    run_file("tried")
    job = cluster.sbatch(submit, "--nodelist=node1", DEBUG, "tried run.yaml")
    job.wait_for_end("COMPLETED")
    assert job.show("TimeLimit") == "00:10:00"
    assert_mentions(job.output, "debug", "lora_B", "frozen weight")
    assert status(submit / "runs/tried-debug")["state"] == "done"


def test_a_run_that_lost_a_node_resumes_and_is_bitwise_equal(cluster, lost, uninterrupted):
    job, run = lost
    wait_until(lambda: job.show("JobState") == "PENDING", "requeue by Slurm", job.diagnosis)
    cluster.reboot("node2")
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "resuming from step" in job.output
    assert have_same_adapter(run, uninterrupted), job.diagnosis()
