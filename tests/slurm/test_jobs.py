"""Jobs on a real Slurm of two nodes: time limits, requeues, kills, a lost node, an array.

A test stops a rank (SIGSTOP), so that the other ranks wait for it and the test can act on the job
before its end. The jobs that wait for a time limit or for a lost node are submitted by fixtures,
and the jobs of other tests run in the meantime.
"""

import signal
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


def test_two_nodes_train_to_the_end(uninterrupted_run):
    assert status(uninterrupted_run)["state"] == "done"
    (logs,) = (uninterrupted_run / "logs").glob("*/start-0")
    assert {path.name for path in logs.glob("rank-*")} == {f"rank-{i}.log" for i in range(4)}
    assert "step 18/18" in (logs / "rank-0.log").read_text()


def test_a_run_requeued_at_its_time_limit_equals_the_uninterrupted_run(
    time_limit_job, uninterrupted_run
):
    job, run = time_limit_job
    wait_until(lambda: job.restarts == 1, "requeue", job.diagnosis)
    job.set_time_limit(30)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "resuming from step" in job.output
    assert job.output.splitlines()[-1].endswith("done: runs/limited")
    assert have_same_adapter(run, uninterrupted_run), job.diagnosis()


def test_a_run_requeued_and_signalled_by_a_user_equals_the_uninterrupted_run(
    cluster, submit_training, uninterrupted_run
):
    job, run = submit_training("requeued-by-user", *TWO_BY_TWO)
    stopped_rank = job.stop_rank(run, rank=3, step=2)
    cluster.run("scontrol", "requeue", job.number)
    stopped_rank.send_signal(signal.SIGCONT)
    stopped_rank = job.stop_rank(run, rank=2, step=5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    stopped_rank.send_signal(signal.SIGCONT)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 2
    assert job.output.count("a checkpoint was written") == 2
    assert have_same_adapter(run, uninterrupted_run), job.diagnosis()


def test_a_cancelled_job_stays_cancelled(cluster, submit_training):
    job, run = submit_training("cancelled", "--nodes=1", "--gpus-per-node=2", CPUS)
    stopped_rank = job.stop_rank(run, rank=1, step=2)
    cluster.run("scancel", job.number)
    stopped_rank.send_signal(signal.SIGCONT)
    wait_until(lambda: status(run).get("state") == "stopped", "checkpoint", job.diagnosis)
    job.wait_for_end("CANCELLED")
    assert job.restarts == 0


def test_a_killed_rank_ends_the_job_and_is_named_in_the_last_line(submit_training):
    job, run = submit_training("killed", *TWO_BY_TWO)
    job.stop_rank(run, rank=3, step=2).kill()
    job.wait_for_end("FAILED", within_s=60)
    assert job.restarts == 0
    assert_mentions(job.output.splitlines()[-1], "rank 3 ended")


@pytest.fixture(scope="module")
def on_node1(lost_node_job):
    """Options of sbatch for a job on node1, while `lost_node_job` waits for node2."""
    return ("--nodelist=node1", "--nodes=1", CPUS)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [({"lora_rr": 4}, "lora_rr"), ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl")],
    ids=["refused by the batch script", "refused by a rank"],
)
def test_a_wrong_run_file_ends_the_job_with_exit_2_and_is_not_requeued(
    cluster, submit_folder, run_file, on_node1, settings, fact
):
    path = run_file("wrong", **settings)
    job = cluster.sbatch(submit_folder, *on_node1, "--gpus-per-node=2", TRAIN, path.name)
    job.wait_for_end("FAILED")
    assert (job.show("ExitCode"), job.restarts) == ("2:0", 0), job.diagnosis()
    assert_mentions(job.output, fact)
    assert "Traceback" not in job.output


def test_each_task_of_an_array_trains_with_the_settings_of_its_line(
    cluster, submit_folder, run_file, on_node1
):
    run_file("sweep", global_batch_size=2)
    lines = ["# rates", "lr=1e-3", "lr=2e-3 output_dir='runs/two e-3'", "lr=3e-3"]
    (submit_folder / "rates.txt").write_text("\n".join(lines))
    options = ("--array=1-3", *on_node1, "--gpus-per-node=1")
    array = cluster.sbatch(submit_folder, *options, TRAIN, "sweep run.yaml", "@rates.txt")
    runs = [submit_folder / "runs" / name for name in ("sweep-1", "two e-3", "sweep-3")]
    jobs = [Job(cluster, f"{array.number}_{task}", submit_folder) for task in (1, 2, 3)]
    stopped_rank = jobs[2].stop_rank(runs[2], rank=0, step=2)
    # The last task has the job id of the array.
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[2].number)
    stopped_rank.send_signal(signal.SIGCONT)
    for job in jobs:
        job.wait_for_end("COMPLETED")
    assert [job.restarts for job in jobs] == [0, 0, 1]
    assert [yaml.safe_load((run / "run.yaml").read_text())["lr"] for run in runs] == [
        1e-3, 2e-3, 3e-3,
    ]  # fmt: skip
    assert {status(run)["state"] for run in runs} == {"done"}


def test_preflight_starts_no_run(cluster, submit_folder, run_file, on_node1):
    run_file("checked")
    options = (*on_node1, "--gpus-per-node=2")
    job = cluster.sbatch(submit_folder, *options, TRAIN, "--preflight", "checked run.yaml")
    job.wait_for_end("COMPLETED")
    assert job.output.count("ok    settings") == 1
    assert status(submit_folder / "runs/checked") == {}


@pytest.mark.usefixtures("lost_node_job")
def test_debug_runs_on_one_gpu(cluster, submit_folder, run_file):
    run_file("debugged")
    job = cluster.sbatch(submit_folder, "--nodelist=node1", DEBUG, "debugged run.yaml")
    job.wait_for_end("COMPLETED")
    assert job.show("TimeLimit") == "00:10:00"
    assert_mentions(job.output, "debug", "lora_B", "frozen weight")
    assert status(submit_folder / "runs/debugged-debug")["state"] == "done"


def test_a_run_that_lost_a_node_resumes_and_equals_the_uninterrupted_run(
    cluster, lost_node_job, uninterrupted_run
):
    job, run = lost_node_job
    wait_until(lambda: job.show("JobState") == "PENDING", "requeue by Slurm", job.diagnosis)
    cluster.reboot("node2")
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "resuming from step" in job.output
    assert have_same_adapter(run, uninterrupted_run), job.diagnosis()
