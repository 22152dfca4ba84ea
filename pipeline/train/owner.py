"""Ownership of a run folder: one process at a time, also of two that start in the same second.

File system locks are not used, because shared disks may lack them. The process that creates
`.owner` is the owner; its modification time is the heartbeat for other machines.
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
_LOCKED_S = 0.1  # while another process checks whether the owner lives
# An owner on another machine counts as living while its heartbeat is younger than this.
_SILENCE_S = 60.0


class Ownership:
    """The right to change a run folder. Called on rank 0.

    `purpose` is shown to other processes. While the folder is owned, a thread calls `on_heartbeat`
    every 10 s.
    """

    def __init__(
        self, folder: Path, purpose: str, on_heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._purpose, self._on_heartbeat = folder / OWNER, purpose, on_heartbeat
        self._text = ""
        self._released = threading.Event()
        self.is_held = False

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Become the owner.

        Raises UserError where a living process is the owner or the folder cannot be written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_dead()
        except OSError as error:
            raise UserError(
                f"output_dir: {self._path.parent} cannot be written to ({error.strerror}); "
                "make room, or give another folder"
            ) from None
        threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """Let another process own the folder."""
        self._released.set()
        if self.is_held and self._is_mine():
            with suppress(OSError):
                self._path.unlink()
        self.is_held = False

    def _create(self) -> bool:
        """Create the file with O_EXCL; True for exactly one of several concurrent starts."""
        self._text = json.dumps(identity() | {"doing": self._purpose, "started": time.time()})
        try:
            file = self._path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text)
        except BaseException:  # a full disk or a stop: there is no owner
            self._path.unlink(missing_ok=True)
            raise
        self.is_held = True
        return True

    def _remove_dead(self) -> None:
        """Remove the file of a dead owner, under a lock file that one process holds at a time."""
        lock = self._path.with_name(f"{OWNER}.lock")
        try:
            lock.open("x").close()
        except FileExistsError:
            with suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > _SILENCE_S:  # its process was killed
                    lock.unlink()
            time.sleep(_LOCKED_S)
            return
        try:
            now = lock.stat().st_mtime  # by the file server's clock, like the heartbeat
            with suppress(FileNotFoundError):
                owner = self._read()
                if is_living(owner, now):
                    raise UserError(in_use(self._path.parent, owner))
                self._path.unlink()
        finally:
            lock.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        text = self._path.read_text(encoding="utf-8")
        heartbeat = self._path.stat().st_mtime
        try:
            owner: dict[str, Any] = json.loads(text)
        except ValueError:  # it is being written, or a power cut damaged it
            owner = {"host": "another machine", "machine": "?", "pids": ["?"]}
        return owner | {"heartbeat": heartbeat}

    def _keep_alive(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            if self._is_mine():
                with suppress(OSError):
                    os.utime(self._path)
            self._on_heartbeat()

    def _is_mine(self) -> bool:
        """Whether the file is this process's: after a long silence another may own the folder."""
        try:
            return self._path.read_text(encoding="utf-8") == self._text
        except OSError:
            return False


def identity() -> dict[str, Any]:
    """This process: `machine` tells apart hosts of the same name, and containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # hidden in a container
        machine = socket.gethostname()
    return {"host": socket.gethostname(), "machine": machine, "pids": [os.getpid()]}


def is_living(owner: dict[str, Any], now: float | None = None) -> bool:
    """Whether the process of `identity`, `started` and `heartbeat` still runs.

    `now`: the current time by the clock that the heartbeat has, if it is not this machine's.
    """
    if owner.get("machine") != identity()["machine"]:
        now = time.time() if now is None else now
        return now - float(owner.get("heartbeat") or 0) < _SILENCE_S
    return any(_started_before(pid, owner) for pid in owner.get("pids") or [])


def in_use(folder: Path, owner: dict[str, Any]) -> str:
    """The message about a living owner."""
    purpose = owner.get("doing", TRAINING)
    stop = f", or stop it with `touch {folder / 'stop'}`" if purpose == TRAINING else ""
    return (
        f"output_dir: {folder} is in use by {purpose} (process {owner['pids'][0]} on "
        f"{owner['host']}); wait for it{stop}"
    )


def _started_before(pid: int, owner: dict[str, Any]) -> bool:
    """Whether the process exists and is not a later one with the same number."""
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE or pid == os.getpid()
        return not is_gone and process.create_time() <= float(owner.get("started") or 0)
    except psutil.Error:
        return False
