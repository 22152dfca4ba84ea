"""Progress of long work: log lines outside a terminal, on rank 0 only."""

import logging
from collections.abc import Iterator

import pytest

from pipeline.cluster import progress
from pipeline.cluster.progress import duration, show_progress
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Clock]:
    caplog.set_level(logging.INFO, logger="pipeline")
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    return clock


def wait_for_message(caplog: pytest.LogCaptureFixture) -> None:
    """Wait for the thread that announces the work."""
    import time

    deadline = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.001)


def test_short_work_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    with show_progress("hashing", total=10) as work:
        work.advance(10)
    assert not caplog.messages


def test_long_work_is_announced_and_then_reported_every_ten_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("hashing", total=100) as work:
        wait_for_message(caplog)
        for clock.now in (4.0, 9.0, 12.0, 15.0, 21.0, 24.0):
            work.advance(10)
    assert len(caplog.messages) == 3
    assert_mentions(caplog.messages[0], "hashing")
    assert_mentions(caplog.messages[1], "hashing", "30 %", "0:00:28")


def test_other_ranks_are_silent(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with show_progress("hashing", total=100) as work:
        for clock.now in (20.0, 40.0):
            work.advance(10)
    assert (work.done, caplog.messages) == (20, [])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (7384, "2:03:04")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_work_in_bytes_shows_its_rate_and_the_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with show_progress("copying", total=80_000_000, in_bytes=True) as work:
        wait_for_message(caplog)
        clock.now = 20.0
        work.advance(20_000_000)
    assert_mentions(caplog.messages[1], "copying", "25 %", "1 MB/s", "0:01:00")
