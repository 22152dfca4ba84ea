"""Requests to stop a run: a signal, the file `stop`, the time limit, or the end of the launcher.

A rank only records a request. In the training loop the ranks exchange their requests at the start
of each step, and in long steps several times, so that all ranks stop before the same micro-batch.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from pipeline.cluster.exits import end_process
from pipeline.errors import Stopped

_POLL_S = 0.5
_FINAL_STATUS_S = 1.0  # time to write the run's status after a second Ctrl-C
STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGHUP,  # the terminal has closed
)  # fmt: skip


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process at once, until `StopRequests.install_handlers` is called.

    Python's own handler would not run while torch waits for other ranks at the rendezvous, and
    shells ignore SIGINT in jobs started with `&`.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopAgreed(Exception):
    """Raised on all ranks when they have agreed to stop. The message is this rank's reason."""


class _StopRequested(BaseException):
    """Raised to interrupt the main thread. `except Exception` does not catch a BaseException."""


class StopRequests:
    """The stop requests of this rank. A second Ctrl-C ends the process at once.

    `reads_stop_file`: whether this rank checks for the file `stop` in the run folder; one rank
    does. `is_in_loop`: set when the training loop has started; from then on the ranks agree on
    stops in each step.
    """

    def __init__(
        self, run_folder: Path, time_limit_s: float | None, *, reads_stop_file: bool
    ) -> None:
        self._file, self._reads_stop_file = run_folder / "stop", reads_stop_file
        process_start = psutil.Process().create_time()
        self._deadline = None if time_limit_s is None else process_start + time_limit_s
        self._request: str | None = None  # the reason of the first request
        self._num_interrupts = 0
        self._on_second_interrupt: Callable[[], None] = lambda: None
        self._is_interrupting = False
        self._is_printed = False
        self.is_in_loop = False

    def install_handlers(self, on_second_interrupt: Callable[[], None]) -> None:
        """Handle STOP_SIGNALS in the main thread and in a helper thread.

        Python runs no signal handler while the main thread is in a library call, which may take
        minutes. So Python also writes the signal numbers to a pipe (signal.set_wakeup_fd), from
        which the helper thread reads them at once. After a second Ctrl-C the helper thread calls
        `on_second_interrupt` and ends the process within a second.
        """
        self._on_second_interrupt = on_second_interrupt
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        threading.Thread(
            target=self._read_signals, args=(readable,), name="signals", daemon=True
        ).start()
        for number in STOP_SIGNALS:
            is_under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_under_nohup:
                signal.signal(number, self._handle)

    def request(self, reason: str) -> None:
        """Request a stop of this rank, from any thread."""
        self._request = self._request or reason
        os.kill(os.getpid(), signal.SIGTERM)  # interrupts the main thread if it is waiting

    def reason(self) -> str | None:
        """Why this rank should stop; None if there is no request."""
        if self._request is not None:
            return self._request
        if self._reads_stop_file and self._file.exists():
            return f"the file {self._file}"
        if self._deadline is not None and time.time() > self._deadline:
            return "time_limit"
        return None

    def stop_reason_before_loop(self) -> str | None:
        """Reason of a stop request that ends all ranks before the training loop; None without one.

        Before the loop nothing has been trained, so no checkpoint is needed.
        """
        return None if self.is_in_loop or self._is_interrupting else self.reason()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Context manager that raises Stopped in its body as soon as a stop is requested.

        Only for work that a single rank does, because the requests of other ranks are not read.
        """
        is_over = threading.Event()
        try:
            self._is_interrupting = True
            try:
                self._raise_if_requested()
                threading.Thread(
                    target=self._poll, args=(is_over,), name="stops", daemon=True
                ).start()
                yield
            finally:
                # The handler of a signal may raise _StopRequested here too. The outer `try`
                # catches it.
                self._is_interrupting = False
                is_over.set()
        except _StopRequested as request:
            self.remove_stop_file()
            raise Stopped(stopped_early(str(request))) from None

    def remove_stop_file(self) -> None:
        """Remove the stop file, so that the next start does not stop at once."""
        with suppress(OSError):  # the disk may have become read-only, which the next start reports
            self._file.unlink(missing_ok=True)

    def _poll(self, is_over: threading.Event) -> None:
        """Request a stop if the stop file appears or the time limit has passed.

        In the training loop, the loop itself checks for these.
        """
        while not is_over.wait(_POLL_S):
            if self._request is None and (reason := self.reason()) is not None:
                self.request(reason)
                return

    def _raise_if_requested(self) -> None:
        if self._request is not None:
            self._is_interrupting = False
            raise _StopRequested(self._request)

    def _read_signals(self, readable: int) -> None:
        """Read signal numbers from a pipe, one byte each. Runs in the helper thread."""
        while numbers := os.read(readable, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._num_interrupts += number == signal.SIGINT
                    if self._num_interrupts > 1:
                        self._end_at_once()
                    self._record(number)
                    self._print_once()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._record(number)
        if self._is_interrupting:
            self._raise_if_requested()

    def _end_at_once(self) -> NoReturn:
        code = 128 + signal.SIGINT
        # The timer ends the process if writing the final status hangs.
        threading.Timer(_FINAL_STATUS_S, end_process, (code,)).start()
        self._on_second_interrupt()
        end_process(code)

    def _record(self, number: int) -> None:
        """Record the request of a signal."""
        self._request = self._request or f"signal {signal.Signals(number).name}"

    def _print_once(self) -> None:
        """Print that the run stops. Called by the helper thread.

        The handler in the main thread cannot print, because the signal may have interrupted another
        print. `sys.stderr` is not bypassed: while a bar is drawn, rich prints above it.
        """
        if self._is_printed or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self._is_printed = True
        with_checkpoint = " with a checkpoint" if self.is_in_loop else ""
        with suppress(OSError):  # the terminal or the pipe may be closed
            print(f"\nstopping{with_checkpoint} ...", file=sys.stderr, flush=True)  # noqa: T201


def stopped_early(reason: str) -> str:
    """Message of a stop before the first step."""
    return f"stopped before the first step ({reason}); start again to resume"
