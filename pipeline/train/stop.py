"""Signals, the stop file and the time limit: reasons to end with a checkpoint.

A rank only notes what it has been asked; the loop adds the notes of all ranks up once a step, so
that all of them stop at the same one.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import psutil

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """What this rank has been asked. A second Ctrl-C ends the process at once."""

    def __init__(self, run_folder: Path, time_limit_s: float | None) -> None:
        self._file = run_folder / "stop"
        began = psutil.Process().create_time()  # the scheduler's clock runs since then
        self._deadline = None if time_limit_s is None else began + time_limit_s
        self._signal: signal.Signals | None = None

    def listen(self) -> None:
        """Replace the handlers of the signals that ask a process to end."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        if self._file.exists():
            return f"the file {self._file}"
        if self._deadline is not None and time.time() > self._deadline:
            return "time_limit"
        return None

    def clear(self) -> None:
        """Forget the stop file, so that the next start does not stop at once."""
        self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            os._exit(128 + number)
        if self._signal is None and os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nstopping with a checkpoint after this step ...\n")  # safe in a handler
        self._signal = signal.Signals(number)
