"""Progress of work that takes longer than a few seconds, shown by rank 0.

In a terminal the progress is a bar that disappears when the work is done, or a spinner if the
amount of work is unknown. Otherwise the progress is shown in log lines: one after a second, or
sooner if there has been no output for four seconds, and then one every four seconds, even if the
work does not advance. So a user sees a line at least every five seconds.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pipeline.cluster.logs import current_rank, seconds_without_output

logger = logging.getLogger(__name__)

_FIRST_LINE_S = 1.0  # shorter work is reported only after a silence
_LINE_INTERVAL_S = 4.0
_MIN_SHARE_FOR_ESTIMATE = 0.05  # of the work, before the remaining time is estimated from it
_bars: list[Progress] = []  # nested bars in the terminal; only the last one is drawn
_stops: list[Callable[[], None]] = []  # for each bar, view or thread that shows progress: its stop
_is_over = threading.Event()  # set by `stop_displays`


class Work:
    """Work in progress, shown in log lines. `advance` may be called from another thread.

    `text`: description of the work. `total`: its amount in any unit; None if it is unknown.
    `in_bytes`: whether the unit is bytes, so that MB/s are shown too.
    """

    def __init__(self, text: str, total: int | None, *, in_bytes: bool = False) -> None:
        self.done = 0
        self._text, self._total, self._in_bytes = text, total, in_bytes
        self._start = self._last = time.monotonic()  # `_last`: of the last `advance`

    def advance(self, amount: int = 1) -> None:
        """Count finished work, in the units of `total`."""
        self.done += amount
        self._last = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the work while the body runs."""
        is_over = threading.Event()
        thread = threading.Thread(target=self._log_lines, args=(is_over,), daemon=True)
        thread.start()
        try:
            with stopped_before_end(is_over.set):
                yield
        finally:
            is_over.set()
            thread.join()

    def as_line(self) -> str:
        """The log line: description of the work, its progress and the elapsed time.

        The elapsed time shows that the work goes on if the percentage stays the same.
        """
        seconds = max(time.monotonic() - self._start, 1e-3)
        if not self._total or not self.done:
            count = f"{self.done:,}, " if self.done else ""
            return f"{self._text}: {count}{duration(seconds)} elapsed"
        share = self.done / self._total
        line = f"{self._text}: {100 * share:.0f} %"
        if share < _MIN_SHARE_FOR_ESTIMATE:
            return f"{line}, {duration(seconds)} elapsed"
        # At the rate until the last `advance`, so that the remaining time falls until the next one.
        remaining_s = max(0.0, (self._last - self._start) / share - seconds)
        rate = f"{self.done / seconds / 1e6:,.0f} MB/s, " if self._in_bytes else ""
        return f"{line}, {rate}{duration(remaining_s)} left, {duration(seconds)} elapsed"

    def _log_lines(self, is_over: threading.Event) -> None:
        # Several kinds of short work may follow one another.
        silence_left = max(0.0, _LINE_INTERVAL_S - seconds_without_output())
        if is_over.wait(min(_FIRST_LINE_S, silence_left)):
            return
        logger.info("%s ...", self._text)
        while not is_over.wait(_LINE_INTERVAL_S):
            logger.info("%s", self.as_line())


class _TerminalWork(Work):
    """Work that is shown by a bar in the terminal instead of log lines."""

    def __init__(
        self, text: str, total: int | None, console: Console, *, in_bytes: bool = False
    ) -> None:
        super().__init__(text, total)
        description = TextColumn("{task.description}", markup=False)  # a path may have brackets
        columns: tuple[ProgressColumn, ...] = (SpinnerColumn(), description, TimeElapsedColumn())
        if total:
            percentage = TextColumn("{task.percentage:.0f} %")
            rate = (TransferSpeedColumn(),) if in_bytes else ()
            columns = (
                SpinnerColumn(),
                description,
                BarColumn(),
                percentage,
                *rate,
                TimeRemainingColumn(),
            )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(text, total=total)

    def advance(self, amount: int = 1) -> None:
        super().advance(amount)
        self._bar.update(self._task, completed=self.done)

    @contextmanager
    def shown(self) -> Iterator[None]:
        outer = _bars[-1] if _bars else None
        if outer is not None:
            outer.stop()  # both would be drawn in the same line
        _bars.append(self._bar)
        try:
            with self._bar, stopped_before_end(self._bar.stop):
                yield
        finally:
            _bars.remove(self._bar)
            if outer is not None and not _is_over.is_set():
                outer.start()


@contextmanager
def show_progress(text: str, total: int | None = None, *, in_bytes: bool = False) -> Iterator[Work]:
    """Show on rank 0 the progress of the work in the body of the `with` statement.

    The body calls `advance` of the yielded `Work`. `text`: the work, such as "loading the model".
    `total` and `in_bytes`: see `Work`.
    """
    work = Work(text, total, in_bytes=in_bytes)
    if current_rank() != 0 or not logger.isEnabledFor(logging.INFO) or _is_over.is_set():
        yield work
        return
    console = terminal()
    if can_redraw(console):
        work = _TerminalWork(text, total, console, in_bytes=in_bytes)
    with work.shown():
        yield work


@contextmanager
def stopped_before_end(stop: Callable[[], None]) -> Iterator[None]:
    """Let `stop_displays` call `stop` while the body of the `with` statement runs."""
    _stops.append(stop)
    try:
        yield
    finally:
        _stops.remove(stop)


def stop_displays() -> None:
    """Stop all bars, views and log lines of progress, and show no new ones.

    Called by a thread that prints the last message of this process and then ends it. Until then the
    main thread continues, and its progress would be shown below the message.
    """
    _is_over.set()
    for stop in reversed([*_stops]):
        stop()


def terminal() -> Console:
    """A rich console for standard output."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def can_redraw(console: Console) -> bool:
    """Whether a console can show a bar or a live view; not in a file or with TERM=dumb."""
    return console.is_terminal and not console.is_dumb_terminal


def duration(seconds: float) -> str:
    """Seconds as `H:MM:SS`."""
    minutes, seconds_of_minute = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds_of_minute:02d}"
