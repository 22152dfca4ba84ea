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
TRAINING = "a run"
_HEARTBEAT_S = 10.0
_LOCKED_S = 0.1  # until another has looked whether the owner lives
# An owner on another machine counts as living while its heartbeat is younger than this.
_SILENCE_S = 60.0


class Ownership:
    """The right to change a run folder. Called on rank 0.

    `doing` tells others what for. While it is held, `on_beat` is called every 10 s, in a thread.
    """

    def __init__(
        self, folder: Path, doing: str, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._doing, self._on_beat = folder / OWNER, doing, on_beat
        self._text = ""
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
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._is_made():
                self._remove_dead()
        except OSError as error:
            raise UserError(
                f"output_dir: {self._path.parent} cannot be written to ({error.strerror}); "
                "make room, or give another folder"
            ) from None
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """The next start may have the folder."""
        self._released.set()
        if self.is_held and self._is_mine():
            with suppress(OSError):
                self._path.unlink()
        self.is_held = False

    def _is_made(self) -> bool:
        """Whether the file could be made, which one of those that try at once can."""
        self._text = json.dumps(identity() | {"doing": self._doing, "started": time.time()})
        try:
            file = self._path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text)
        except BaseException:  # a full disk, or a stop: nobody owns it
            self._path.unlink(missing_ok=True)
            raise
        self.is_held = True
        return True

    def _remove_dead(self) -> None:
        """Take away what a dead owner left. One at a time does, while the file keeps others out."""
        lock = self._path.with_name(f"{OWNER}.lock")
        try:
            lock.open("x").close()
        except FileExistsError:
            with suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > _SILENCE_S:  # of one that was killed
                    lock.unlink()
            time.sleep(_LOCKED_S)
            return
        try:
            now = lock.stat().st_mtime  # by the clock that the file's own time is of
            with suppress(FileNotFoundError):
                found = self._read()
                if is_living(found, now):
                    raise UserError(in_use(self._path.parent, found))
                self._path.unlink()
        finally:
            lock.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        text = self._path.read_text(encoding="utf-8")
        beat = self._path.stat().st_mtime
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:  # it is being written, or a power cut left it so
            found = {"host": "another machine", "machine": "?", "pids": ["?"]}
        return found | {"heartbeat": beat}

    def _beat(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            if self._is_mine():
                with suppress(OSError):
                    os.utime(self._path)
            self._on_beat()

    def _is_mine(self) -> bool:
        """Whether the file is the one made here: after long silence another may own the folder."""
        try:
            return self._path.read_text(encoding="utf-8") == self._text
        except OSError:
            return False


def identity() -> dict[str, Any]:
    """Which process this is: `machine` tells hosts of one name, and containers, apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # a container that hides them
        machine = socket.gethostname()
    return {"host": socket.gethostname(), "machine": machine, "pids": [os.getpid()]}


def is_living(owner: dict[str, Any], now: float | None = None) -> bool:
    """Whether the process is there that says so by `identity`, `started` and `heartbeat`.

    `now`: the time by the clock of the heartbeat, where that is not this machine's.
    """
    if owner.get("machine") != identity()["machine"]:
        now = time.time() if now is None else now
        return now - float(owner.get("heartbeat") or 0) < _SILENCE_S
    return any(_started_before(pid, owner) for pid in owner.get("pids") or [])


def in_use(folder: Path, owner: dict[str, Any]) -> str:
    """The message of who finds a living owner."""
    doing = owner.get("doing", TRAINING)
    stop = f", or stop it with `touch {folder / 'stop'}`" if doing == TRAINING else ""
    return (
        f"output_dir: {folder} is in use by {doing} (process {owner['pids'][0]} on "
        f"{owner['host']}); wait for it{stop}"
    )


def _started_before(pid: int, owner: dict[str, Any]) -> bool:
    """The process exists and is not a later one that was given the same number."""
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE or pid == os.getpid()
        return not is_gone and process.create_time() <= float(owner.get("started") or 0)
    except psutil.Error:
        return False
