"""slurm/*.sbatch with fakes of srun and scontrol: the steps that they start, and how they end.

The fixture `job` (conftest.py) is a job of 2 nodes with 8 GPUs each, in which the fake srun runs a
shell script, `do`, instead of the ranks. Such scripts write a status.json, at step 4 by default.
test_jobs.py runs the same scripts under a real Slurm.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.stop import StopRequests
from tests.messages import assert_mentions
from tests.slurm.fake_slurm import ROOT, ranks_script, status

pytestmark = pytest.mark.unit

BIN = Path(sys.executable).parent
SCRIPTS = [
    *sorted((ROOT / "slurm").glob("*.*sh")), *sorted((ROOT / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "tests/slurm").glob("*.sh")),
]  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_passes_shellcheck(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    assert shellcheck is not None, "run `make install`"
    result = subprocess.run(
        [shellcheck, "--external-sources", f"--source-path={ROOT}", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout == ""


def test_one_task_is_started_for_each_gpu(job):
    code, output = job.train(ranks_script(status("done")), "lr=1e-4")
    assert code == 0, output
    assert "done: run" in output
    srun = job.calls("srun")[-1]
    assert srun[srun.index("python") :] == [
        "python", "-P", "-m", "pipeline.cli.train", "my run.yaml", "lr=1e-4",
    ]  # fmt: skip
    for option in (
        "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=8",
        "--distribution=block:block", "--kill-on-bad-exit=1", "--export=ALL", "--immediate=60",
        "--output=run/logs/7/start-0/rank-%t.log",
    ):  # fmt: skip
        assert option in srun, option
    assert job.requeued() == []


def test_a_job_may_have_another_working_folder(job):
    """With --chdir, paths of the run file are relative to that folder."""
    elsewhere = job.folder / "elsewhere"
    elsewhere.mkdir()
    (job.submit_folder / "my run.yaml").rename(elsewhere / "my run.yaml")
    process = job.start(
        "train.sbatch", "my run.yaml", do=ranks_script(status("done")), cwd=elsewhere
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (elsewhere / "run/logs/7/start-0").is_dir()


def test_without_gpus_each_task_is_a_rank_with_the_requested_cpus(job):
    del job.environment["SLURM_GPUS_ON_NODE"]
    requested = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "1"}
    assert job.train(ranks_script(status("done")), **requested)[0] == 0
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"} <= set(job.calls("srun")[-1])
    assert job.variable("OMP_NUM_THREADS") == "1"


@pytest.mark.parametrize(
    ("gpus", "variables", "options"),
    [
        ("2", {"SLURM_GPUS": "4"}, {"--ntasks=4", "--cpus-per-task=32"}),
        ("2", {"SLURM_GPUS": "h100:2,a100:2"}, {"--ntasks=4"}),
        # The node with the fewest CPUs counts, and never more CPUs than it has.
        ("8", {"SLURM_JOB_CPUS_PER_NODE": "64,16(x2)"}, {"--ntasks=16", "--cpus-per-task=2"}),
        ("8", {"SLURM_CPUS_PER_TASK": "32"}, {"--ntasks=16", "--cpus-per-task=8"}),
        ("8", {"SLURM_CPUS_PER_TASK": "3"}, {"--ntasks=16", "--cpus-per-task=3"}),
        ("", {"SLURM_NTASKS": "4"}, {"--ntasks=4", "--ntasks-per-node=2"}),
        ("", {}, {"--ntasks=2", "--ntasks-per-node=1"}),
    ],
)
def test_ranks_and_cpus_are_those_that_every_node_has(job, gpus, variables, options):
    code, output = job.train(ranks_script(status("done")), **variables, SLURM_GPUS_ON_NODE=gpus)
    assert code == 0, output
    assert options <= set(job.calls("srun")[-1])


@pytest.mark.parametrize(
    ("gpus", "variables", "facts"),
    [
        ("3", {"SLURM_GPUS": "4"}, ["--gpus=4", "2 nodes", "--gpus-per-node"]),
        ("8", {"SLURM_JOB_CPUS_PER_NODE": "1(x2)"}, ["1 CPUs", "8 ranks", "--cpus-per-gpu=4"]),
        ("", {"SLURM_NTASKS": "3"}, ["--ntasks=3", "--ntasks-per-node"]),
    ],
)
def test_an_allocation_that_differs_between_nodes_or_lacks_cpus_is_refused(
    job, gpus, variables, facts
):
    code, output = job.train(ranks_script(status("done")), **variables, SLURM_GPUS_ON_NODE=gpus)
    assert code == 2, output
    assert_mentions(output, *facts)
    # The only call creates folders on the nodes; no call starts ranks.
    assert len(job.calls("srun")) == 1


def test_a_step_that_cannot_start_ends_the_job_with_slurm_s_message(job):
    """`srun --immediate=60` fails if the step has not started after 60 s."""
    refusal = "srun: error: Unable to create step for job 7: Requested nodes are busy"
    code, output = job.train(ranks_script("", 1, f"echo '{refusal}' >&2"))
    assert (code, refusal in output, job.requeued()) == (1, True, []), output


def test_ranks_have_node_local_caches_and_no_variables_that_hide_gpus(job):
    job.train(
        ranks_script(status("done")),
        SLURM_GPUS_PER_TASK="1",
        SLURM_CPUS_PER_GPU="4",
        TMPDIR="/fast",
    )
    assert job.variable("HF_HUB_OFFLINE") == "1"
    assert job.variable("TRITON_CACHE_DIR") == f"/fast/rankzero-{os.getuid()}/triton"
    assert job.variable("OMP_NUM_THREADS") == "8"
    assert job.variable("SLURM_GPUS_PER_TASK") is None  # it would hide the other GPUs of the node
    assert job.variable("SLURM_CPUS_PER_GPU") is None
    first = job.calls("srun")[0]
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(first)
    assert first[-1] == f"/fast/rankzero-{os.getuid()}"


def test_the_environment_of_the_project_is_used_if_none_is_active(job):
    python = job.folder / "fake/bin/python"
    project_python = job.folder / "my checkout/.venv/bin/python"
    project_python.parent.mkdir(parents=True)
    python.rename(project_python)
    python.write_text("#!/bin/bash\nexit 1\n")
    python.chmod(0o755)
    assert job.train(ranks_script(status("done")))[0] == 0
    project_python.unlink()
    code, output = job.train(ranks_script(status("done")))
    assert (code, "make install" in output) == (1, True), output


EARLIER_STATUS = status("stopped", started=1.5)  # other starts have a later time


@pytest.mark.parametrize(
    # script of the ranks, exit code of the job, requeued job ids, and a part of the output
    ("do", "code", "requeued", "part"),
    [
        (ranks_script(status("stopped"), 75), 75, ["7"], "stopped at step 4; requeued"),
        # A node was lost: srun's exit code 0 does not count.
        (ranks_script(status("running"), 0), 1, [], "status.json: running at step 4"),
        (ranks_script(status("failed", exit_code=1, reason='rank 1: "a, b",'), 137), 1, [], "a, b"),
        (ranks_script(status("failed", exit_code=2, reason="data"), 143), 2, [], "at step 4: data"),
        (ranks_script(code=137, more='echo "srun: error: n: task 1: Exited with exit code 2" >&2'),
         2, [], "task 1: Exited with exit code 2"),
        (ranks_script(code=1), 1, [], "not requeued"),
        (ranks_script(code=0), 1, [], "not requeued"),
    ],
)  # fmt: skip
def test_status_json_decides_the_exit_code_and_the_requeue(job, do, code, requeued, part):
    exit_code, output = job.train(do)
    assert exit_code == code, output
    assert job.requeued() == requeued, output
    assert part in output


@pytest.mark.parametrize(
    ("do", "code", "part"),
    [
        (ranks_script(EARLIER_STATUS, 1), 1, "not requeued"),
        (ranks_script(status("done", started=1.5), 2), 2, "not requeued"),
        (ranks_script(status("done", started=1.5), 0), 0, ""),
    ],
)
def test_the_status_of_an_earlier_start_does_not_requeue_the_job(job, do, code, part):
    (job.submit_folder / "run").mkdir()
    (job.submit_folder / "run/status.json").write_text(EARLIER_STATUS)
    exit_code, output = job.train(do)
    assert exit_code == code, output
    assert job.requeued() == [], output
    assert part in output


def test_the_log_of_a_failed_rank_is_shown_and_the_reason_is_last(job):
    write_logs = 'for i in 3 4; do echo "it broke" >"$LOGS/rank-$i.log"; done\n'
    write_logs += 'echo "step 1" >>"$LOGS/rank-0.log"'
    do = ranks_script(status("failed", exit_code=1, reason="rank 3: it broke"), 1, write_logs)
    _, output = job.train(do)
    assert "rank-3.log:\nit broke" in output
    assert output.count("it broke") == 2  # in the log, and in the reason
    assert output.count("step 1") == 1
    assert output.splitlines()[-1].endswith("failed at step 4: rank 3: it broke")


def test_without_a_new_status_the_last_line_of_rank_0_is_the_last_line(job):
    write_logs = 'echo "srun: it broke" >&2; echo "rank 3 failed" >"$LOGS/rank-3.log"\n'
    write_logs += 'echo "cannot write" >>"$LOGS/rank-0.log"'
    _, output = job.train(ranks_script("", 1, write_logs))
    assert output.index("srun: it broke") < output.index("rank 3 failed")
    assert output.splitlines()[-1].endswith("rank 0: cannot write")


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("CANCELLED Reason=None", []),
        ("COMPLETING Reason=None", []),  # cancelled, or requeued by Slurm
        ("COMPLETING Reason=TimeLimit", ["7"]),  # the warning came too late
    ],
)
def test_a_job_that_slurm_or_a_user_ends_is_not_requeued_by_the_script(job, state, requeued):
    (job.folder / "fake/job_state").write_text(state)
    code, output = job.train(ranks_script(status("stopped"), 75))
    assert (code, job.requeued()) == (75, requeued), output


def test_a_job_stopped_by_the_stop_file_is_not_requeued(job):
    """The reason in status.json is the text that a run writes."""
    folder = job.submit_folder / "run"
    folder.mkdir()
    (folder / "stop").touch()
    stop_reason = StopRequests(folder, None, reads_stop_file=True).reason()
    reason = f"stopped at step 4 of 9 ({stop_reason}); start again to resume"
    code, output = job.train(ranks_script(status("stopped", reason=reason), 75))
    assert (code, job.requeued()) == (75, []), output
    assert_mentions(output, "run/stop", "not requeued")


def test_a_refused_requeue_ends_with_the_code_of_a_stopped_run(job):
    (job.folder / "fake/no_requeue").touch()
    code, output = job.train(ranks_script(status("stopped"), 75))
    assert (code, "not requeued" in output) == (75, True), output


@pytest.mark.parametrize("command", ["show", "requeue"])
def test_the_script_retries_during_a_short_outage_of_slurmctld(job, command):
    (job.folder / f"fake/away-{command}").write_text("2")
    code, output = job.train(ranks_script(status("stopped"), 75))
    assert (code, job.requeued()[-1:]) == (75, ["7"]), output
    assert "not requeued" not in output


def test_a_long_outage_of_slurmctld_ends_the_job_with_a_message(job):
    (job.folder / "fake/away-show").write_text("99")
    code, output = job.train(ranks_script(status("stopped"), 75))
    assert (code, "slurmctld does not answer" in output) == (75, True), output
    (job.folder / "fake/away-show").write_text("0")
    outage = 'echo 99 >"$FAKE/away-show"'
    code, output = job.train(ranks_script(status("stopped"), 75, outage))
    assert (code, job.requeued()) == (75, []), output
    assert "stopped at step 4; slurmctld does not answer" in output


def test_after_three_requeues_without_progress_a_job_is_not_requeued(job):
    outputs = [
        job.train(ranks_script(status("stopped", started=start_time), 75))[1]
        for start_time in range(2, 6)
    ]
    assert len(job.requeued()) == 3
    assert_mentions(outputs[-1], "3 requeues", "step 4")
    # The step is larger, so the count of requeues without progress starts at 0 again.
    job.train(ranks_script(status("stopped", started=6.0, step=5), 75))
    assert len(job.requeued()) == 4


def test_a_stop_while_loading_does_not_count_as_progress(job):
    """The step of such a stop is 0, between two starts that reached step 4."""
    for index, step in enumerate([4, 0, 4, 0]):
        _, output = job.train(ranks_script(status("stopped", started=index + 2.5, step=step), 75))
    assert len(job.requeued()) == 3
    assert_mentions(output, "not requeued", "3 requeues")


@pytest.mark.parametrize("step", ["null", '"x[$(touch injected)]"', "4.5", "-1", "9" * 40])
def test_a_step_in_status_json_that_is_not_a_number_counts_as_0(job, step):
    """A damaged or edited file; bash arithmetic would execute $(...)."""
    text = status("stopped").replace('"step": 4', f'"step": {step}')
    code, output = job.train(ranks_script(text, 75))
    assert (code, job.requeued()) == (75, ["7"]), output
    assert_mentions(output, "status.json: step is not a number", "stopped at step 0")
    assert not (job.submit_folder / "injected").exists()


def test_a_count_of_requeues_that_is_not_a_number_is_ignored(job):
    (job.submit_folder / "run/logs/7").mkdir(parents=True)
    (job.submit_folder / "run/logs/7/requeues").write_text("x[$(touch injected)] 9\n")
    code, output = job.train(ranks_script(status("stopped"), 75))
    assert (code, job.requeued()) == (75, ["7"]), output
    assert not (job.submit_folder / "injected").exists()
    assert (job.submit_folder / "run/logs/7/requeues").read_text() == "4 1\n"


@pytest.mark.parametrize("script", ["train.sbatch", "debug.sbatch"])
def test_a_node_without_scontrol_is_refused_at_once(job, script):
    """This happens in a container; retries would be useless."""
    (job.folder / "fake/bin/scontrol").unlink()
    system = job.folder / "system"  # this machine may have Slurm
    system.mkdir()
    for program in ("bash", "hostname", "env"):
        (system / program).symlink_to(shutil.which(program))
    code, output = job.run(script, "my run.yaml", PATH=f"{job.folder / 'fake/bin'}:{system}")
    assert code == 2, output
    assert_mentions(output, "scontrol", "PATH", "container")
    assert "sleeps" not in output
    assert not (job.folder / "fake/calls").exists()


def test_a_heterogeneous_job_is_refused(job):
    code, output = job.train(ranks_script(status("done")), SLURM_HET_SIZE="2")
    assert code == 2, output
    assert_mentions(output, "heterogeneous", "2 components")
    assert not (job.folder / "fake/calls").exists()


@pytest.mark.parametrize(("host", "waits"), [("a-lost-node", True), (os.uname().nodename, False)])
def test_a_start_waits_only_for_a_status_written_on_another_node(job, host, waits):
    (job.submit_folder / "run").mkdir()
    (job.submit_folder / "run/status.json").write_text(status("running", host=host, started=1.5))
    code, output = job.train(ranks_script(status("done")), SLURM_RESTART_COUNT="1")
    assert (code, "sleeps 61" in output) == (0, waits), output
    assert (job.submit_folder / "run/logs/7/start-1").is_dir()


def test_preflight_checks_and_is_not_requeued(job):
    (job.submit_folder / "run").mkdir()
    (job.submit_folder / "run/status.json").write_text(EARLIER_STATUS)
    write_log = 'echo "all well" >>"$LOGS/rank-0.log"'
    code, output = job.run(
        "train.sbatch", "--preflight", "my run.yaml", do=ranks_script("", 0, write_log)
    )
    assert (code, "all well" in output) == (0, True), output
    assert job.calls("srun")[-1][-2:] == ["pipeline.cli.preflight", "my run.yaml"]
    code, output = job.run("train.sbatch", "--preflight", "my run.yaml", "--json", "lr=1e-4")
    assert code == 0, output
    assert job.calls("srun")[-1][-3:] == ["my run.yaml", "lr=1e-4", "--json"]
    code, _ = job.run("train.sbatch", "--preflight", "my run.yaml", do=ranks_script("", 1))
    assert (code, job.requeued()) == (1, [])


@pytest.mark.parametrize("script", ["train.sbatch", "debug.sbatch"])
def test_a_script_copied_without_env_sh_is_refused_with_the_path_to_submit(job, script):
    (job.folder / "my checkout/slurm/env.sh").rename(job.folder / "env.sh")
    code, output = job.run(script, "my run.yaml", do=ranks_script(status("done")))
    assert (code, f"slurm/{script}" in output) == (2, True), output


def test_debug_starts_one_process(job):
    code, output = job.run("debug.sbatch", "my run.yaml", "lr=1e-4", do="exit 2")
    assert code == 2, output
    srun = job.calls("srun")[-1]
    assert "--ntasks=1" in srun
    assert srun[srun.index("python") :] == [
        "python", "-P", "-m", "pipeline.cli.train", "my run.yaml", "lr=1e-4", "--debug",
    ]  # fmt: skip


def test_status_json_has_the_layout_that_the_script_reads(tmp_path):
    """sed reads it: one field in each line, indented by two spaces."""
    lines = status("failed", reason='a "b", c').splitlines()
    assert '  "state": "failed",' in lines
    assert json.loads("\n".join(lines))["reason"] == 'a "b", c'
