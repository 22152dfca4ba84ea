"""Who owns a run folder: one start at a time, also of two that begin in the same second.

No lock of the file system is used: a cluster's may not have them. `.owner` is made by the one start
that creates it; its heartbeat says to other machines that it lives.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from pipeline.errors import UserError

OWNER = ".owner"
_HEARTBEAT_S = 10.0
# An owner on another machine counts as living while its heartbeat is younger than this.
_SILENCE_S = 60.0


class Ownership:
    """The right to change a run folder. Called on rank 0.

    While it is held, `on_beat` is called every 10 seconds, in a thread.
    """

    def __init__(self, folder: Path, on_beat: Callable[[], None] = lambda: None) -> None:
        self._path, self._on_beat = folder / OWNER, on_beat
        self._released = threading.Event()
        self.is_held = False

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Become the owner. Raises UserError where another start is it and lives.

        Also where the folder cannot be written to.
        """
        try:
            self._take()
        except OSError as error:
            raise UserError(
                f"output_dir: {self._path.parent} cannot be written to ({error.strerror}); "
                "make room, or give another folder"
            ) from None
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _take(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        mine = {"host": socket.gethostname(), "pids": [os.getpid()], "started": time.time()}
        while True:
            try:
                number = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._put_aside()
                continue
            with os.fdopen(number, "w", encoding="utf-8") as file:
                json.dump(mine, file)
            self.is_held = True
            return

    def release(self) -> None:
        """The next start may have the folder."""
        self._released.set()
        if self.is_held:
            self.is_held = False
            with suppress(OSError):
                self._path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self._path)
            self._on_beat()

    def _put_aside(self) -> None:
        """Take away what a dead owner left."""
        aside = self._path.with_name(f"{OWNER}.{os.getpid()}")
        with suppress(FileNotFoundError):
            found = self._read()
            if is_living(found):
                raise UserError(in_use(self._path.parent, found))
            self._path.rename(aside)
            if aside.read_text(encoding="utf-8") != found["text"]:  # of one that was quicker
                aside.rename(self._path)
                raise UserError(in_use(self._path.parent, found))
            aside.unlink()

    def _read(self) -> dict[str, Any]:
        text = self._path.read_text(encoding="utf-8")
        beat = self._path.stat().st_mtime
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:  # it is being written, or a power cut left it so
            found = {"host": "another machine", "pids": ["?"]}
        return found | {"text": text, "heartbeat": beat}


def is_living(owner: dict[str, Any]) -> bool:
    """Whether the process is there that says so by `host`, `pids`, `started` and `heartbeat`."""
    if owner.get("host") != socket.gethostname():
        return time.time() - float(owner.get("heartbeat") or 0) < _SILENCE_S
    return any(_started_before(pid, owner) for pid in owner.get("pids") or [])


def in_use(folder: Path, owner: dict[str, Any]) -> str:
    """The message of who finds a living owner."""
    return (
        f"output_dir: {folder} is in use (process {owner['pids'][0]} on {owner['host']}); wait for "
        f"it, or stop the run there with `touch {folder / 'stop'}`"
    )


def _started_before(pid: int, owner: dict[str, Any]) -> bool:
    """The process exists and is not a later one that was given the same number."""
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE or pid == os.getpid()
        return not is_gone and process.create_time() <= float(owner.get("started") or 0)
    except psutil.Error:
        return False
