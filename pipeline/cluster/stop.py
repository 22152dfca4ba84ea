"""Signals, the stop file, the time limit, a dead launcher: reasons to end with a checkpoint.

A rank only notes what it has been asked; the loop asks all ranks before each micro-batch, so that
all of them stop at the same one.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from pipeline.errors import Stopped

_LOOK_S, _LAST_WORD_S = 0.5, 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopAgreed(Exception):
    """All ranks have agreed to stop here; the message is this rank's reason."""


class _Wish(BaseException):
    """A request that breaks work off. No Exception: those are taken for errors of the work."""


class StopRequests:
    """What this rank has been asked. A second Ctrl-C ends the process at once.

    `is_first` marks the rank that looks for the stop file, one look for the whole run.
    """

    def __init__(self, run_folder: Path, time_limit_s: float | None, *, is_first: bool) -> None:
        self._file, self._is_first = run_folder / "stop", is_first
        began = psutil.Process().create_time()  # the scheduler's clock runs since then
        self._deadline = None if time_limit_s is None else began + time_limit_s
        self._asked: str | None = None
        self._num_interrupts = 0
        self._on_second: Callable[[], None] = lambda: None
        self._is_raising = False
        self.is_agreed = False  # all ranks have come to where they agree on stops

    def listen(self, on_second: Callable[[], None]) -> None:
        """Replace the handlers of the signals that ask a process to end.

        Python's own run in the main thread alone, which may be in a library for minutes: a thread
        hears of each signal at once. `on_second` is called there before a second Ctrl-C ends the
        process; it is given a second.
        """
        self._on_second = on_second
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(heard,), name="signals", daemon=True).start()
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def ask(self, reason: str) -> None:
        """Ask this rank to stop, from any thread."""
        self._asked = self._asked or reason
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread hears of it where it waits, too

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self._asked is not None:
            return self._asked
        if self._is_first and self._file.exists():
            return f"the file {self._file}"
        if self._deadline is not None and time.time() > self._deadline:
            return "time_limit"
        return None

    def reason_to_leave(self) -> str | None:
        """Why all ranks should leave at once: asked to before any of them could lose something."""
        return None if self.is_agreed or self._is_raising else self.reason()

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise Stopped where a request comes: in work of one rank before there is a step."""
        over = threading.Event()
        try:
            self._is_raising = True
            try:
                self._raise_if_asked()
                threading.Thread(target=self._look, args=(over,), name="stops", daemon=True).start()
                yield
            finally:  # a request may come here as well
                self._is_raising = False
                over.set()
        except _Wish as wish:
            self.clear()
            raise Stopped(stopped_early(str(wish))) from None

    def _look(self, over: threading.Event) -> None:
        """Look for the stop file and the time limit where no step does."""
        while not over.wait(_LOOK_S):
            if self._asked is None and (reason := self.reason()) is not None:
                self.ask(reason)
                return

    def clear(self) -> None:
        """Forget the stop file, so that the next start does not stop at once."""
        try:
            self._file.unlink(missing_ok=True)
        except OSError:
            return  # a folder that is read-only by now: the next start will say so

    def _raise_if_asked(self) -> None:
        if self._asked is not None:
            self._is_raising = False
            raise _Wish(self._asked)

    def _hear(self, heard: int) -> None:
        while numbers := os.read(heard, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._num_interrupts += number == signal.SIGINT
                    if self._num_interrupts > 1:
                        self._end_at_once()
                    self._note(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._note(number)
        if self._is_raising:
            self._raise_if_asked()

    def _end_at_once(self) -> NoReturn:
        code = 128 + signal.SIGINT
        late = threading.Timer(_LAST_WORD_S, os._exit, (code,))  # a disk may stand still
        late.start()
        self._on_second()
        os._exit(code)

    def _note(self, number: int) -> None:
        if self._asked is not None:
            return
        self._asked = f"signal {signal.Signals(number).name}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            how = b" with a checkpoint" if self.is_agreed else b""
            with suppress(OSError):  # the terminal may be gone, or what the output is piped to
                os.write(2, b"\nstopping" + how + b" ...\n")  # safe in a handler


def stopped_early(reason: str) -> str:
    """The message of a stop before there is a step."""
    return f"stopped before the first step ({reason}); start again to go on"
