"""Full, read-only, forbidden and deleted folders: training continues, and older files are kept."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from tests.faults.runs import (
    IS_FULL,
    TOTAL_STEPS,
    adapter,
    losses,
    run_to_end,
    start,
    start_ranks,
    status,
    steps_on_disk,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
needs_time = pytest.mark.skipif(not IS_FULL, reason="in `make faults` only")
# Root can write everywhere unless it drops these capabilities.
WITHOUT_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")


@contextmanager
def small_disk(folder, size: str):
    """Mount a tmpfs of this size at the folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder) -> None:
    """Fill the disk completely."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def content(folder, step: int) -> dict[str, bytes]:
    """The bytes of each file of a checkpoint."""
    path = folder / f"checkpoints/step-{step:08d}"
    return {file.name: file.read_bytes() for file in path.iterdir()}


@needs_root
def test_a_full_disk_only_prevents_saves(run_file, workspace, uninterrupted):
    with small_disk(workspace / "full", "4m") as folder:
        run = start_ranks(run_file("full", save_total_limit=1))
        run.wait_for_step(4)
        fill(folder)
        run.wait_until(lambda: "is not saved" in run.output, "a failed save")
        newest = steps_on_disk(folder)[-1]
        kept = content(folder, newest)
        failed_at = status(folder).get("step")
        run.wait_until(lambda: run.output.count("is not saved") >= 3, "more failed saves")
        assert content(folder, newest) == kept
        (folder / "ballast").unlink()
        run.wait_until(lambda: steps_on_disk(folder)[-1] > newest, "a save that succeeds")
        assert run.wait_for_end() == 0, run.output
        assert failed_at is not None
        assert adapter(folder) == adapter(uninterrupted)
        assert losses(folder) == losses(uninterrupted)  # lines that did not fit were written later


@needs_time
@needs_root
def test_a_log_on_a_full_disk_does_not_end_the_run(run_file, workspace, uninterrupted):
    path, folder = run_file("logged"), workspace / "logged"
    with small_disk(workspace / "logs", "1m") as logs:
        run = start(path, log=logs / "run.log")
        run.wait_for_step(4)
        fill(logs)
        assert run.wait_for_end() == 0, run.output
        assert f"step {TOTAL_STEPS}/" not in run.output
    assert adapter(folder) == adapter(uninterrupted)
    assert losses(folder) == losses(uninterrupted)


@needs_time
@needs_root
def test_save_must_succeed_ends_the_run_and_keeps_the_older_checkpoint(
    run_file, workspace, uninterrupted
):
    with small_disk(workspace / "must", "4m") as folder:
        path = run_file("must", save_total_limit=1, save_must_succeed=True)
        run = start(path)
        run.wait_for_step(4)
        fill(folder)
        assert run.wait_for_end() == 1, run.output
        assert "save_must_succeed" in run.output
        assert "Traceback" not in run.output
        (folder / "ballast").unlink()
        newest = steps_on_disk(folder)[-1]
        assert f"resuming from step {newest}" in run_to_end(path)
        assert adapter(folder) == adapter(uninterrupted)


@needs_time
@needs_root
def test_a_stop_on_a_full_disk_fails_and_names_the_checkpoint(run_file, workspace, uninterrupted):
    with small_disk(workspace / "stopped", "4m") as folder:
        path = run_file("stopped", save_total_limit=1)
        run = start(path)
        run.wait_for_step(4)
        fill(folder)
        run.wait_until(lambda: "is not saved" in run.output, "a failed save")
        (folder / "stop").touch()
        assert run.wait_for_end() == 1, run.output
        assert "earlier checkpoints are unchanged" in run.output
        assert not (folder / "stop").exists()  # else the next start would stop at once
        (folder / "ballast").unlink()
        run_to_end(path)
        assert adapter(folder) == adapter(uninterrupted)


@needs_time
@needs_root
def test_a_folder_that_becomes_read_only_ends_the_run_and_it_resumes_bitwise(
    run_file, workspace, uninterrupted
):
    path, folder = run_file("readonly"), workspace / "readonly"
    run = start(path)
    run.wait_for_step(4)
    with read_only(folder):
        assert run.wait_for_end() == 1, (
            run.output
        )  # trained to the end, but the adapter cannot be written
    assert "is not saved" in run.output
    assert "adapter cannot be written" in run.output
    assert "start again to resume" in run.output
    assert "Traceback" not in run.output
    newest = steps_on_disk(folder)[-1]
    assert f"resuming from step {newest}" in run_to_end(path)
    assert adapter(folder) == adapter(uninterrupted)


@contextmanager
def read_only(folder):
    """Mount the folder read-only."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@needs_time
def test_a_folder_without_permission_only_prevents_saves(run_file, workspace, uninterrupted):
    path, folder = run_file("denied"), workspace / "denied"
    run = start(path, before=WITHOUT_OVERRIDE if os.geteuid() == 0 else ())
    run.wait_for_step(4)
    (folder / "checkpoints").chmod(0o555)
    run.wait_until(lambda: "is not saved" in run.output, "a failed save")
    (folder / "checkpoints").chmod(0o755)
    assert run.wait_for_end() == 0, run.output
    assert "Permission denied" in run.output
    assert adapter(folder) == adapter(uninterrupted)
    assert steps_on_disk(folder)[-1] == TOTAL_STEPS


@needs_time
def test_a_run_whose_folder_is_deleted_writes_it_again(run_file, workspace, uninterrupted):
    path, folder = run_file("deleted"), workspace / "deleted"
    run = start(path)
    run.wait_for_step(4)
    while folder.exists():  # the run may write a file between two of the deletions
        shutil.rmtree(folder, ignore_errors=True)
    run.wait_until(lambda: (folder / "checkpoints").is_dir() and steps_on_disk(folder), "a save")
    run.kill()
    output = run_to_end(path)  # the folder has a complete run again
    assert "resuming from step" in output
    assert adapter(folder) == adapter(uninterrupted)
