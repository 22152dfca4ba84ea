"""`--watch` writes the page until the run ends, and leaves one that does not reload itself."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.errors import UserError
from pipeline.report import watch
from pipeline.report.page import write_report
from pipeline.report.watch import watch_run
from tests.messages import assert_mentions
from tests.report.folders import FILES, build_run

pytestmark = pytest.mark.unit


def write_state(run, **fields):
    """Write status.json with these changes."""
    status = FILES["status.json"] | fields
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")


def page_of(run):
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_page_is_written_until_the_run_ends(tmp_path, monkeypatch):
    run = build_run(tmp_path)
    write_state(run, state="running", step=10)
    pages = []  # at the end of each interval, while the run is running
    announced_paths = []

    def store_page_and_train(seconds):
        if seconds < watch.INTERVAL_S:  # the state is read again
            return
        pages.append(page_of(run))
        is_last = len(pages) == 2
        write_state(run, state="done" if is_last else "running", step=10 + 10 * len(pages))

    monkeypatch.setattr(watch.time, "sleep", store_page_and_train)
    assert watch_run(run, announced_paths.append) == "done"
    assert announced_paths == [run / "report.html"]
    for page, step in zip(pages, ("10 of 80", "20 of 80"), strict=True):
        assert step in page
        assert 'data-refresh="5"' in page
    assert "30 of 80" in page_of(run)
    assert "data-refresh" not in page_of(run)


def test_an_interrupt_leaves_a_page_that_does_not_reload_itself(tmp_path, monkeypatch):
    run = build_run(tmp_path)
    write_state(run, state="running")

    def interrupt(seconds):
        assert seconds >= watch.INTERVAL_S
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch_run(run, lambda path: None)
    assert "data-refresh" not in page_of(run)


@pytest.mark.parametrize("fields", [{"state": "failed"}, None])
def test_a_run_is_followed_while_it_replaces_the_files_of_an_earlier_one(
    tmp_path, monkeypatch, fields
):
    """`clear_run` of pipeline/train/folder.py marks the earlier run as failed and removes it."""
    run = build_run(tmp_path, without=("metrics.jsonl",))
    write_state(run, state="running", step=10)
    states = [fields, {"state": "running", "step": 20}, {"state": "done", "step": 30}]

    def change_state(_):
        if states:
            (run / "status.json").unlink(missing_ok=True)
            if (change := states.pop(0)) is not None:
                write_state(run, **change)

    monkeypatch.setattr(watch.time, "sleep", change_state)
    assert watch_run(run, lambda path: None) == "done"
    assert states == []


@pytest.mark.parametrize(("seconds", "last"), [(20, "done"), (None, "stopped")])
def test_a_stopped_run_is_followed_again_if_it_is_started_within_a_minute(
    tmp_path, monkeypatch, seconds, last
):
    run = build_run(tmp_path)
    write_state(run, state="running", step=10)
    clock = {"stopped_s": 0.0, "is_restarted": False}

    def pass_time(_seconds):
        if clock["is_restarted"]:
            write_state(run, state="done", step=30)
            return
        write_state(run, state="stopped", step=10)
        clock["stopped_s"] += 1
        if clock["stopped_s"] == seconds:
            clock["is_restarted"] = True
            write_state(run, state="running", step=20)

    monkeypatch.setattr(watch.time, "sleep", pass_time)
    assert watch_run(run, lambda path: None) == last


def test_a_page_that_cannot_be_written_ends_the_command(tmp_path, monkeypatch):
    run = build_run(tmp_path)
    write_state(run, state="running")
    (run / "report.html").mkdir()
    attempts = []

    def write_at_most_5_times(*args, **options):
        attempts.append(args)
        assert len(attempts) <= 5, "the page is written without end"
        return write_report(*args, **options)

    monkeypatch.setattr(watch, "write_report", write_at_most_5_times)
    with pytest.raises(UserError) as error:
        watch_run(run, lambda path: None)
    assert_mentions(error.value, "report.html", "cannot be written")


def test_a_run_whose_process_has_ended_is_not_followed(tmp_path):
    run = build_run(tmp_path)
    write_state(run, state="running", machine="another machine", heartbeat=1.0)
    assert watch_run(run, lambda path: None) == "dead"


def test_a_run_that_begins_later_is_waited_for(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def begin(_):
        build_run(run)

    monkeypatch.setattr(watch.time, "sleep", begin)
    watch.wait_for_run(run)
    assert (run / "status.json").is_file()


def test_option_watch_says_that_it_waits_for_the_run(tmp_path):
    folder = tmp_path / "later"
    waiting = subprocess.Popen(
        [sys.executable, "launch/report.py", "--watch", folder],
        env=os.environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert_mentions(waiting.stdout.readline(), folder, "waiting")
        build_run(folder)
        assert_mentions(waiting.communicate(timeout=60)[0], folder / "report.html", "done")
        assert waiting.returncode == 0
    finally:
        waiting.kill()


def test_option_watch_refuses_a_file(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text("")
    done = subprocess.run(
        [sys.executable, "launch/report.py", "--watch", path],
        env=os.environ, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert_mentions(done.stderr, path, "output_dir")


def test_option_watch_follows_one_run_and_refuses_two(tmp_path):
    run = build_run(tmp_path / "a")
    script = [sys.executable, "launch/report.py", "--watch"]
    options = {"capture_output": True, "text": True, "timeout": 60, "env": os.environ}
    done = subprocess.run([*script, run], check=False, **options)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, str(run / "report.html"))
    assert_mentions(done.stdout, "done")
    two = subprocess.run([*script, run, build_run(tmp_path / "b")], check=False, **options)
    assert two.returncode == 2
    assert_mentions(two.stderr, "--watch")
