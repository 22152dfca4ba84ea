"""The timeline has every start, stop, resume and step without an update."""

import json

import pytest

from pipeline.report.folder import read_run_folder
from pipeline.report.timeline import timeline_of, wall_seconds
from tests.report.folders import build_failed_run, build_run

pytestmark = pytest.mark.unit


def test_starts_ends_and_skipped_steps_are_events(tmp_path):
    timeline = timeline_of(read_run_folder(build_failed_run(tmp_path)))
    assert [(event.step, event.text) for event in timeline.events] == [
        ("0", "started"),
        ("40", "stopped (exit code 75)"),
        ("30", "resumed from step 30"),
        ("44", "failed (exit code 1)"),
        ("21", "3 steps without an update: a gradient was not finite"),
        ("44", "1 step with a loss that is not finite"),
    ]
    assert timeline.events[4].reason == "steps 21 to 23"
    assert timeline.marks.resumed == [30]
    assert timeline.marks.skipped == [(21, 23)]


def test_the_timeline_of_a_killed_run_ends_with_its_last_heartbeat(tmp_path):
    # Times are seconds since 1970. The process is on another machine, so only its heartbeat counts.
    status = {"state": "running", "machine": "x", "started": 0, "heartbeat": 120.0, "step": 7}
    (tmp_path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    run = read_run_folder(tmp_path)
    assert (run.state, timeline_of(run).events[-1].time) == ("dead", "1970-01-01 00:02 UTC")


def test_wall_time_is_the_sum_over_all_starts(tmp_path):
    # 09:12:00 to 09:14:00, and 09:14:00 to 09:15:41
    assert wall_seconds(read_run_folder(build_run(tmp_path))) == 120 + 101


def test_the_timeline_of_a_status_without_earlier_starts_has_the_last_start(tmp_path):
    status = {"state": "done", "step": 9, "started": 0, "ended": 60, "exit_code": 0}
    (tmp_path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    events = timeline_of(read_run_folder(tmp_path)).events
    assert [(event.step, event.text) for event in events] == [("", "started"), ("9", "finished")]
