"""slurm/*.sbatch with stand-ins for srun and scontrol: their requests, and how they end.

test_jobs.py runs the same text under a real Slurm.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster.stop import StopRequests
from tests.messages import assert_mentions
from tests.slurm.fake_slurm import ROOT, Job, make_job, ranks, status

pytestmark = pytest.mark.unit

BIN = Path(sys.executable).parent
TEXTS = [
    *sorted((ROOT / "slurm").glob("*.*sh")), *sorted((ROOT / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "tests/slurm").glob("*.sh")),
]  # fmt: skip


@pytest.fixture
def job(tmp_path) -> Job:
    return make_job(tmp_path)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    assert shellcheck is not None, "run `make install`"
    found = subprocess.run(
        [shellcheck, "--external-sources", f"--source-path={ROOT}", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_one_task_a_gpu_is_started_from_any_folder(job):
    code, output = job.train(ranks(status("done")), "lr=1e-4")
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


def test_another_working_folder_does_not_matter(job):
    """As with --chdir: paths in the run file are relative to it, and the project is still found."""
    elsewhere = job.folder / "elsewhere"
    elsewhere.mkdir()
    (job.submit / "my run.yaml").rename(elsewhere / "my run.yaml")
    process = job.start("train.sbatch", "my run.yaml", do=ranks(status("done")), cwd=elsewhere)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (elsewhere / "run/logs/7/start-0").is_dir()


def test_without_gpus_a_rank_a_task_and_the_cpus_that_were_asked_for(job):
    del job.environment["SLURM_GPUS_ON_NODE"]
    asked = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "1"}
    assert job.train(ranks(status("done")), **asked)[0] == 0
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"} <= set(job.calls("srun")[-1])
    assert job.variable("OMP_NUM_THREADS") == "1"


@pytest.mark.parametrize(
    ("gpus", "given", "options"),
    [
        ("2", {"SLURM_GPUS": "4"}, {"--ntasks=4", "--cpus-per-task=32"}),
        ("2", {"SLURM_GPUS": "h100:2,a100:2"}, {"--ntasks=4"}),
        ("3", {"SLURM_GPUS": "4"}, ["--gpus=4", "2 nodes", "--gpus-per-node"]),
        # The node with the fewest CPUs counts, and never more than there are.
        ("8", {"SLURM_JOB_CPUS_PER_NODE": "64,16(x2)"}, {"--ntasks=16", "--cpus-per-task=2"}),
        ("8", {"SLURM_CPUS_PER_TASK": "32"}, {"--ntasks=16", "--cpus-per-task=8"}),
        ("8", {"SLURM_CPUS_PER_TASK": "3"}, {"--ntasks=16", "--cpus-per-task=3"}),
        ("8", {"SLURM_JOB_CPUS_PER_NODE": "1(x2)"}, ["1 CPUs", "8 ranks", "--cpus-per-gpu=4"]),
        ("", {"SLURM_NTASKS": "4"}, {"--ntasks=4", "--ntasks-per-node=2"}),
        ("", {"SLURM_NTASKS": "3"}, ["--ntasks=3", "--ntasks-per-node"]),
        ("", {}, {"--ntasks=2", "--ntasks-per-node=1"}),
    ],
)
def test_ranks_and_cpus_that_every_node_has(job, gpus, given, options):
    code, output = job.train(ranks(status("done")), **given, SLURM_GPUS_ON_NODE=gpus)
    if isinstance(options, list):
        assert code == 2, output
        assert_mentions(output, *options)
        assert len(job.calls("srun")) == 1  # the nodes' folders
    else:
        assert code == 0, output
        assert options <= set(job.calls("srun")[-1])


def test_a_step_that_cannot_start_ends_with_slurms_message(job):
    """srun --immediate gives up."""
    refusal = "srun: error: Unable to create step for job 7: Requested nodes are busy"
    code, output = job.train(ranks("", 1, f"echo '{refusal}' >&2"))
    assert (code, refusal in output, job.requeued()) == (1, True, []), output


def test_the_environment_of_the_ranks(job):
    job.train(
        ranks(status("done")), SLURM_GPUS_PER_TASK="1", SLURM_CPUS_PER_GPU="4", TMPDIR="/fast"
    )
    assert job.variable("HF_HUB_OFFLINE") == "1"
    assert job.variable("TRITON_CACHE_DIR") == f"/fast/rankzero-{os.getuid()}/triton"
    assert job.variable("OMP_NUM_THREADS") == "8"
    assert job.variable("SLURM_GPUS_PER_TASK") is None  # it would hide the node's other GPUs
    assert job.variable("SLURM_CPUS_PER_GPU") is None
    first = job.calls("srun")[0]
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(first)
    assert first[-1] == f"/fast/rankzero-{os.getuid()}"


def test_the_projects_own_environment_is_used_where_none_is_active(job):
    python = job.folder / "fake/bin/python"
    own = job.folder / "my checkout/.venv/bin/python"
    own.parent.mkdir(parents=True)
    python.rename(own)
    python.write_text("#!/bin/bash\nexit 1\n")
    python.chmod(0o755)
    assert job.train(ranks(status("done")))[0] == 0
    own.unlink()
    code, output = job.train(ranks(status("done")))
    assert (code, "make install" in output) == (1, True), output


RAN_BEFORE = status("stopped", started=1.5)


@pytest.mark.parametrize(
    ("do", "code", "again", "part"),
    [
        (ranks(status("stopped"), 75), 75, True, "stopped at step 4; requeued"),
        # A lost node: srun's 0 is not believed.
        (ranks(status("running"), 0), 1, False, "status.json: running at step 4"),
        (ranks(status("failed", exit_code=1, reason='rank 1: "a, b",'), 137), 1, False, "a, b"),
        (ranks(status("failed", exit_code=2, reason="data"), 143), 2, False, "at step 4: data"),
        (ranks(code=137, more='echo "srun: error: n: task 1: Exited with exit code 2" >&2'),
         2, False, "task 1: Exited with exit code 2"),
        (ranks(code=1), 1, False, "not requeued"),
        (ranks(code=0), 1, False, "not requeued"),
        # The status file of an earlier start says nothing about this start.
        (ranks(RAN_BEFORE, 1), 1, False, "not requeued"),
        (ranks(status("done", started=1.5), 2), 2, False, "not requeued"),
        (ranks(status("done", started=1.5), 0), 0, False, ""),
    ],
)  # fmt: skip
def test_status_json_alone_decides(job, do, code, again, part):
    if "1.5" in do:
        (job.submit / "run").mkdir()
        (job.submit / "run/status.json").write_text(RAN_BEFORE)
    found, output = job.train(do)
    assert found == code, output
    assert job.requeued() == (["7"] if again else []), output
    assert part in output


def test_the_log_of_a_failed_rank_is_shown_and_the_reason_is_last(job):
    say = 'for i in 3 4; do echo "it broke" >"$LOGS/rank-$i.log"; done\n'
    say += 'echo "step 1" >>"$LOGS/rank-0.log"'
    do = ranks(status("failed", exit_code=1, reason="rank 3: it broke"), 1, say)
    _, output = job.train(do)
    assert "rank-3.log:\nit broke" in output
    assert output.count("it broke") == 2  # there, and in the reason
    assert output.count("step 1") == 1
    assert output.splitlines()[-1].endswith("failed at step 4: rank 3: it broke")


def test_without_a_new_status_the_last_line_is_rank_zeros(job):
    say = 'echo "srun: it broke" >&2; echo "rank 3 fell" >"$LOGS/rank-3.log"\n'
    say += 'echo "cannot write" >>"$LOGS/rank-0.log"'
    _, output = job.train(ranks("", 1, say))
    assert output.index("srun: it broke") < output.index("rank 3 fell")
    assert output.splitlines()[-1].endswith("rank 0: cannot write")


@pytest.mark.parametrize(
    ("state", "again"),
    [
        ("CANCELLED Reason=None", []),
        ("COMPLETING Reason=None", []),  # cancelled, or requeued by Slurm
        ("COMPLETING Reason=TimeLimit", ["7"]),  # the warning came too late
    ],
)
def test_a_job_that_slurm_or_a_person_ends_is_not_requeued_from_here(job, state, again):
    (job.folder / "fake/job_state").write_text(state)
    code, output = job.train(ranks(status("stopped"), 75))
    assert (code, job.requeued()) == (75, again), output


def test_the_stop_file_stops_the_job_for_good(job):
    """The reason is the text that the run itself writes."""
    folder = job.submit / "run"
    folder.mkdir()
    (folder / "stop").touch()
    asked = StopRequests(folder, None, is_first=True).reason()
    reason = f"stopped at step 4 of 9 ({asked}); start again to go on"
    code, output = job.train(ranks(status("stopped", reason=reason), 75))
    assert (code, job.requeued()) == (75, []), output
    assert_mentions(output, "run/stop", "not requeued")


def test_where_slurm_refuses_the_checkpoint_is_kept_and_that_is_status(job):
    (job.folder / "fake/no_requeue").touch()
    code, output = job.train(ranks(status("stopped"), 75))
    assert (code, "not requeued" in output) == (75, True), output


@pytest.mark.parametrize("asked", ["show", "requeue"])
def test_a_moment_without_slurmctld_is_waited_out(job, asked):
    (job.folder / f"fake/away-{asked}").write_text("2")
    code, output = job.train(ranks(status("stopped"), 75))
    assert (code, job.requeued()[-1:]) == (75, ["7"]), output
    assert "not requeued" not in output


def test_without_slurmctld_the_job_ends_and_says_so(job):
    (job.folder / "fake/away-show").write_text("99")
    code, output = job.train(ranks(status("stopped"), 75))
    assert (code, "slurmctld does not answer" in output) == (75, True), output
    (job.folder / "fake/away-show").write_text("0")
    lose = 'echo 99 >"$FAKE/away-show"'
    code, output = job.train(ranks(status("stopped"), 75, lose))
    assert (code, job.requeued()) == (75, []), output
    assert "stopped at step 4; slurmctld does not answer" in output


def test_requeues_without_progress_come_to_an_end(job):
    stands = [job.train(ranks(status("stopped", started=n), 75))[1] for n in range(2, 6)]
    assert len(job.requeued()) == 3
    assert_mentions(stands[-1], "3 requeues", "step 4")
    job.train(ranks(status("stopped", started=6.0, step=5), 75))  # progress: the count starts at 0
    assert len(job.requeued()) == 4


def test_a_stop_while_loading_is_no_progress(job):
    """Its step is 0, between two starts that reached step 4."""
    for n, step in enumerate([4, 0, 4, 0]):
        _, output = job.train(ranks(status("stopped", started=n + 2.5, step=step), 75))
    assert len(job.requeued()) == 3
    assert_mentions(output, "not requeued", "3 requeues")


@pytest.mark.parametrize("step", ["null", '"x[$(touch injected)]"', "4.5", "-1", "9" * 40])
def test_a_step_that_is_no_number_counts_as_none(job, step):
    """Somebody's editor, or a disk that was full: and bash would run $(...) in arithmetic."""
    text = status("stopped").replace('"step": 4', f'"step": {step}')
    code, output = job.train(ranks(text, 75))
    assert (code, job.requeued()) == (75, ["7"]), output
    assert_mentions(output, "status.json: step is not a number", "stopped at step 0")
    assert not (job.submit / "injected").exists()


def test_a_tally_that_is_no_number_is_not_read(job):
    (job.submit / "run/logs/7").mkdir(parents=True)
    (job.submit / "run/logs/7/requeues").write_text("x[$(touch injected)] 9\n")
    code, output = job.train(ranks(status("stopped"), 75))
    assert (code, job.requeued()) == (75, ["7"]), output
    assert not (job.submit / "injected").exists()
    assert (job.submit / "run/logs/7/requeues").read_text() == "4 1\n"


@pytest.mark.parametrize("script", ["train.sbatch", "debug.sbatch"])
def test_a_node_without_scontrol_is_named_at_once(job, script):
    """For example in a container; nothing is retried."""
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
    code, output = job.train(ranks(status("done")), SLURM_HET_SIZE="2")
    assert code == 2, output
    assert_mentions(output, "heterogeneous", "2 components")
    assert not (job.folder / "fake/calls").exists()


# Containers, with stand-ins: none of pyxis, enroot and apptainer is installed for the tests.


@pytest.mark.parametrize("script", ["train.sbatch", "debug.sbatch"])
@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("apptainer exec --nv /i/rankzero.sif", ["apptainer", "exec", "--nv", "/i/rankzero.sif"]),
        ('--container-image=/i/r.sqsh --container-mounts="/a b:/c"',
         ["--container-image=/i/r.sqsh", "--container-mounts=/a b:/c"]),
    ],
    ids=["apptainer", "pyxis"],
)  # fmt: skip
def test_ranks_and_the_run_files_check_run_in_the_container(job, script, words, call):
    job.use_container(words)
    code, output = job.run(script, "my run.yaml", do=ranks(status("done")))
    assert code == 0, output
    srun = job.calls("srun")[-1]
    start = srun.index("python")
    assert srun[start - len(call) : start] == call
    if script == "train.sbatch":
        program = "apptainer" if call[0] == "apptainer" else "srun"
        checks = [words for words in job.calls(program) if {"-P", "-c"} <= set(words)]
        assert len(checks) == 2  # RankZero is there, and the run file loads


def test_a_wrong_run_file_is_named_by_the_containers_python(job):
    job.use_container("apptainer exec /i/rankzero.sif")
    code, output = job.train(ranks(status("done")), "lorar=1")
    assert code == 2, output
    assert_mentions(output, "lorar", "lora_r")


def test_a_container_without_rankzero_is_named(job):
    job.use_container("apptainer exec /i/empty.sif")
    (job.folder / "fake/image/python").write_text("#!/bin/bash\nexit 1\n")
    code, output = job.train(ranks(status("done")))
    assert code == 1, output
    assert_mentions(output, "apptainer exec /i/empty.sif", "env.sh")


WORK = "touch there; for i in {1..300}; do /bin/sleep 0.1; done"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_a_warning_before_there_are_ranks_starts_none(job):
    (job.folder / "fake/slow_disk").touch()
    process = job.start("train.sbatch", "my run.yaml")
    wait_for(job.submit / "there")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeued()) == (75, ["7"]), output
    assert len(job.calls("srun")) == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_the_ranks_and_their_checkpoint_is_waited_for(job, number):
    write = "touch told; for i in {1..15}; do /bin/sleep 0.1; done; " + ranks(status("stopped"), 75)
    do = f"leave() {{ {write} }}\ntrap leave USR1\n{WORK}"
    process = job.start("train.sbatch", "my run.yaml", do=do)
    wait_for(job.submit / "there")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (job.submit / "told").exists(), output
    assert "stopped at step 4; requeued" in output
    assert (process.returncode, job.requeued()) == (75, ["7"]), output


def test_a_warning_just_as_the_ranks_are_started_reaches_them(job):
    """Between the check whether to start them and their start."""
    script = job.folder / "my checkout/slurm/train.sbatch"
    question = "if [[ ! $stop_requested ]]; then\n"
    text = script.read_text()
    assert text.count(question) == 1
    script.write_text(text.replace(question, f"{question}kill -s USR1 $$\n"))
    code, output = job.train(
        f"for i in {{1..50}}; do /bin/sleep 0.1; done; {ranks(status('done'))}"
    )
    assert (code, job.requeued()) == (75, ["7"]), output


def test_a_warning_before_the_ranks_handle_signals_requeues_too(job):
    """The ranks die of it and write no status."""
    process = job.start("train.sbatch", "my run.yaml", do=WORK)
    wait_for(job.submit / "there")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeued()) == (75, ["7"]), output
    assert (job.submit / "run/logs/7/requeues").read_text() == "0 1\n"


SWEEP = """\
# one line a task
lr=1e-4 lora_target_modules="[q_proj, v_proj]"

output_dir='runs/a b' lr=$(touch_nothing)
"""


def test_a_task_of_an_array_takes_its_line_and_requeues_itself_alone(job):
    (job.submit / "my sweep.txt").write_text(SWEEP)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    do = ranks(status("stopped"), 75).replace("run/", "run-1/")
    code, output = job.train(do, "@my sweep.txt", "epochs=2", **array)
    assert code == 75, output
    srun = job.calls("srun")[-1]
    assert srun[-5:] == [
        "my run.yaml", "epochs=2", "lr=1e-4", "lora_target_modules=[q_proj, v_proj]",
        "output_dir=run-1",
    ]  # fmt: skip
    assert job.requeued() == ["7_1"]  # `7` would be all tasks of the array


def test_a_line_may_name_its_folder_and_nothing_in_it_is_run(job):
    (job.submit / "s.txt").write_text(SWEEP.replace("lr=$(touch_nothing)", "seed=1"))
    do = ranks(status("done")).replace("run/", "'runs/a b/'")
    code, output = job.train(do, "@s.txt", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert code == 0, output
    assert job.calls("srun")[-1][-2:] == ["output_dir=runs/a b", "seed=1"]
    (job.submit / "s.txt").write_text(SWEEP)
    code, output = job.train(do, "@s.txt", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert (code, "found '$(touch_nothing)'" in output) == (2, True), output


@pytest.mark.parametrize(
    ("words", "task", "facts"),
    [
        ([], None, ["run file first"]),
        (["lr=1"], None, ["run file first"]),
        (["my run.yaml", "lorar=1"], None, ["lorar", "lora_r"]),
        (["nowhere.yaml"], None, ["nowhere.yaml"]),
        (["my run.yaml", "@s.txt"], None, ["--array=1-N", "@SWEEP.txt"]),
        (["my run.yaml"], "1", ["--array=1-N", "@SWEEP.txt"]),
        (["my run.yaml", "@s.txt"], "3", ["s.txt", "line 3"]),
        (["my run.yaml", "@s.txt"], "0", ["task 0", "--array=1-N"]),
        (["my run.yaml", "@nowhere.txt"], "1", ["nowhere.txt"]),
        (["my run.yaml", "@s.txt", "@t.txt"], "1", ["@s.txt", "@t.txt"]),
        (["my run.yaml", "@broken.txt"], "2", ["broken.txt:4", "lr=2 name='x y", "unmatched"]),
    ],
)
def test_wrong_input_is_exit_2_before_a_rank_is_started(job, words, task, facts):
    (job.submit / "s.txt").write_text(SWEEP)
    (job.submit / "broken.txt").write_text("# rates\nlr=1\n\nlr=2 name='x y\n")
    array = {} if task is None else {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}
    code, output = job.run("train.sbatch", *words, **array)
    assert code == 2, output
    assert_mentions(output, *facts)
    assert len(job.calls("srun")) == 1  # the nodes' folders
    assert job.requeued() == []
    assert not (job.submit / "run").exists()


@pytest.mark.parametrize(("host", "waits"), [("a-lost-node", True), (os.uname().nodename, False)])
def test_the_status_of_a_lost_node_is_waited_out(job, host, waits):
    (job.submit / "run").mkdir()
    (job.submit / "run/status.json").write_text(status("running", host=host, started=1.5))
    code, output = job.train(ranks(status("done")), SLURM_RESTART_COUNT="1")
    assert (code, "sleeps 61" in output) == (0, waits), output
    assert (job.submit / "run/logs/7/start-1").is_dir()


def test_preflight_only_checks(job):
    (job.submit / "run").mkdir()
    (job.submit / "run/status.json").write_text(RAN_BEFORE)
    say = 'echo "all well" >>"$LOGS/rank-0.log"'
    code, output = job.run("train.sbatch", "--preflight", "my run.yaml", do=ranks("", 0, say))
    assert (code, "all well" in output) == (0, True), output
    assert job.calls("srun")[-1][-2:] == ["pipeline.cli.preflight", "my run.yaml"]
    code, output = job.run("train.sbatch", "--preflight", "my run.yaml", "--json", "lr=1e-4")
    assert code == 0, output
    assert job.calls("srun")[-1][-3:] == ["my run.yaml", "lr=1e-4", "--json"]
    code, _ = job.run("train.sbatch", "--preflight", "my run.yaml", do=ranks("", 1))
    assert (code, job.requeued()) == (1, [])


@pytest.mark.parametrize("script", ["train.sbatch", "debug.sbatch"])
def test_a_copy_elsewhere_names_where_it_must_be(job, script):
    (job.folder / "my checkout/slurm/env.sh").rename(job.folder / "env.sh")
    code, output = job.run(script, "my run.yaml", do=ranks(status("done")))
    assert (code, f"slurm/{script}" in output) == (2, True), output


def test_debug_is_one_process(job):
    code, output = job.run("debug.sbatch", "my run.yaml", "lr=1e-4", do="exit 2")
    assert code == 2, output
    srun = job.calls("srun")[-1]
    assert "--ntasks=1" in srun
    assert srun[srun.index("python") :] == [
        "python", "-P", "-m", "pipeline.cli.train", "my run.yaml", "lr=1e-4", "--debug",
    ]  # fmt: skip


def test_the_status_that_the_script_reads_is_the_one_that_runs_write(tmp_path):
    """One field a line, two spaces in: sed reads it so."""
    lines = status("failed", reason='a "b", c').splitlines()
    assert '  "state": "failed",' in lines
    assert json.loads("\n".join(lines))["reason"] == 'a "b", c'
