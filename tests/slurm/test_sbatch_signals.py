"""The warning of Slurm before a time limit: ranks write a checkpoint, and the job is requeued."""

import signal
import time
from pathlib import Path

import pytest

from tests.slurm.fake_slurm import ranks_script, status

pytestmark = pytest.mark.unit


# The script of ranks that work for 30 s.
WORK = "touch started; for i in {1..300}; do /bin/sleep 0.1; done"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_after_a_warning_before_their_start_no_ranks_are_started(job):
    """The signal arrives in the srun step that creates folders on the nodes, made slow here."""
    (job.folder / "fake/slow_disk").touch()
    process = job.start("train.sbatch", "my run.yaml")
    wait_for(job.submit_folder / "started")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeued()) == (75, ["7"]), output
    assert len(job.calls("srun")) == 1  # that step; no step of ranks


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_the_ranks_and_the_script_waits_for_their_checkpoint(job, number):
    write = "touch signalled; for i in {1..15}; do /bin/sleep 0.1; done; " + ranks_script(
        status("stopped"), 75
    )
    do = f"on_signal() {{ {write} }}\ntrap on_signal USR1\n{WORK}"
    process = job.start("train.sbatch", "my run.yaml", do=do)
    wait_for(job.submit_folder / "started")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (job.submit_folder / "signalled").exists(), output
    assert "stopped at step 4; requeued" in output
    assert (process.returncode, job.requeued()) == (75, ["7"]), output


def test_a_warning_between_the_last_check_and_the_start_reaches_the_ranks(job):
    """The signal arrives when the script has decided to start the ranks."""
    script = job.folder / "my checkout/slurm/train.sbatch"
    check = "if [[ ! $stop_requested ]]; then\n"
    text = script.read_text()
    assert text.count(check) == 1
    script.write_text(text.replace(check, f"{check}kill -s USR1 $$\n"))
    code, output = job.train(
        f"for i in {{1..50}}; do /bin/sleep 0.1; done; {ranks_script(status('done'))}"
    )
    assert (code, job.requeued()) == (75, ["7"]), output


def test_a_warning_before_the_ranks_handle_signals_requeues_the_job(job):
    """The signal ends the ranks, and they write no status."""
    process = job.start("train.sbatch", "my run.yaml", do=WORK)
    wait_for(job.submit_folder / "started")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeued()) == (75, ["7"]), output
    # highest step so far, and number of requeues since it was reached
    assert (job.submit_folder / "run/logs/7/requeues").read_text() == "0 1\n"
