"""Progress of long work, on rank 0 only: bars in a terminal, else log lines."""

import logging
import threading
from collections.abc import Iterator
from functools import partial
from io import StringIO

import pytest
from rich.console import Console

from pipeline.cluster import progress
from pipeline.cluster.progress import can_redraw, duration, show_progress
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Clock]:
    """A clock that the test sets; log lines have intervals of a millisecond in real time."""
    caplog.set_level(logging.INFO, logger="pipeline")
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.001)
    return clock


def wait_for_message(caplog: pytest.LogCaptureFixture, text: str) -> str:
    """Wait until the progress thread has logged a message with this text; returns the message."""
    import time

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for message in caplog.messages:
            if text in message:
                return message
        time.sleep(0.001)
    raise AssertionError(f"no message has {text}: {caplog.messages}")


def test_short_work_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    with show_progress("hashing", total=10) as work:
        work.advance(10)
    assert not caplog.messages


def test_short_work_after_a_silence_of_four_seconds_is_announced_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise several short pieces of work in a row could print nothing for over five seconds."""
    caplog.set_level(logging.INFO, logger="pipeline")
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 60.0)
    monkeypatch.setattr(progress, "seconds_without_output", lambda: 4.0)
    with show_progress("hashing"):
        wait_for_message(caplog, "hashing")


def test_long_work_is_announced_and_its_progress_logged_repeatedly(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("hashing", total=100) as work:
        wait_for_message(caplog, "hashing")
        clock.now = 12.0
        work.advance(30)
        assert_mentions(wait_for_message(caplog, "0:00:28"), "hashing", "30 %")
        work.advance(30)
        assert_mentions(wait_for_message(caplog, "0:00:08"), "hashing", "60 %")


def test_the_remaining_time_falls_while_work_does_not_advance(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("hashing", total=100) as work:
        clock.now = 10.0
        work.advance(50)
        wait_for_message(caplog, "50 %, 0:00:10 left")
        clock.now = 14.0
        wait_for_message(caplog, "50 %, 0:00:06 left")
        clock.now = 30.0
        wait_for_message(caplog, "50 %, 0:00:00 left")


@pytest.mark.parametrize("percent", [0, 1, 50])
def test_each_line_differs_from_the_one_before_while_the_percentage_stays_the_same(
    clock: Clock, percent: int
) -> None:
    work = progress.Work("scoring", 100)
    clock.now = 10.0
    work.advance(percent)
    lines = []
    for clock.now in (20.0, 24.0, 28.0):
        lines.append(work.as_line())
    assert len(set(lines)) == 3


def test_work_of_unknown_length_shows_its_time_even_if_it_does_not_advance(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("loading"):
        clock.now = 65.0
        assert_mentions(wait_for_message(caplog, "0:01:05"), "loading")


def test_no_line_follows_the_end_of_the_work(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("loading"):
        wait_for_message(caplog, "elapsed")
    count = len(caplog.messages)
    threading.Event().wait(0.05)
    assert len(caplog.messages) == count


def test_other_ranks_are_silent(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with show_progress("hashing", total=100) as work:
        work.advance(20)
        threading.Event().wait(0.05)
    assert (work.done, caplog.messages) == (20, [])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (7384, "2:03:04")]
)
def test_a_duration_is_shown_as_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_work_in_bytes_shows_its_rate_and_the_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("copying", total=80_000_000, in_bytes=True) as work:
        clock.now = 20.0
        work.advance(20_000_000)
        assert_mentions(wait_for_message(caplog, "1 MB/s"), "copying", "25 %", "0:01:00")


def test_a_bar_shows_a_path_with_brackets() -> None:
    output = StringIO()
    console = Console(file=output, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with progress._TerminalWork("hashing /models/[old]", 10, console).shown():
        pass
    assert "hashing /models/[old]" in output.getvalue()


@pytest.fixture
def undo_stop_displays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the effect of `stop_displays` to the test; otherwise it lasts for the process."""
    monkeypatch.setattr(progress, "_is_over", threading.Event())


def test_no_line_of_progress_follows_stop_displays(
    clock: Clock, caplog: pytest.LogCaptureFixture, undo_stop_displays: None
) -> None:
    with show_progress("loading"):
        wait_for_message(caplog, "elapsed")
        progress.stop_displays()
        count = len(caplog.messages)
        with show_progress("reading"):
            threading.Event().wait(0.05)
    assert len(caplog.messages) == count


def test_no_bar_is_drawn_after_stop_displays(undo_stop_displays: None) -> None:
    output = StringIO()
    console = partial(Console, file=output, force_terminal=True, _environ={"TERM": "xterm"})
    outer, inner = (progress._TerminalWork(text, None, console()) for text in ("outer", "inner"))
    with outer.shown():
        with inner.shown():
            progress.stop_displays()
            assert not inner._bar.live.is_started
        assert not outer._bar.live.is_started


def test_only_the_innermost_bar_is_drawn() -> None:
    output = StringIO()
    console = partial(Console, file=output, force_terminal=True, _environ={"TERM": "xterm"})
    outer, inner = (progress._TerminalWork(text, None, console()) for text in ("outer", "inner"))
    with outer.shown():
        with inner.shown():
            assert not outer._bar.live.is_started
            assert inner._bar.live.is_started
        assert outer._bar.live.is_started
    assert not outer._bar.live.is_started


@pytest.mark.parametrize(("term", "is_redrawn"), [("xterm", True), ("dumb", False)])
def test_a_terminal_without_escape_sequences_gets_lines(term: str, is_redrawn: bool) -> None:
    console = Console(force_terminal=True, _environ={"TERM": term})
    assert can_redraw(console) == is_redrawn
