"""Ownership of a run folder: only one process at a time may change it.

The process that creates the file `.owner` is the owner. It updates the file's modification time
every 10 s; other machines read this time to see whether the owner is alive (its heartbeat). File
system locks are not used, because shared disks may not support them.
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
_HEARTBEAT_S = 10.0  # seconds between heartbeats
_LOCK_WAIT_S = 0.1  # seconds to wait while another process checks whether the owner is alive
# An owner on another machine counts as alive if its heartbeat is younger than this many seconds.
_SILENCE_S = 60.0
# The clocks of two machines differ by less. A heartbeat further in the future is from before a
# clock was set back.
_CLOCK_DIFFERENCE_S = 86_400.0


class Ownership:
    """The ownership of a run folder by this process, on rank 0.

    `purpose`: what the process does, such as "a run", for messages of other processes.
    `on_heartbeat`: a thread calls it every 10 s while the folder is owned.
    """

    def __init__(
        self, folder: Path, purpose: str, on_heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._purpose, self._on_heartbeat = folder / OWNER, purpose, on_heartbeat
        self._text = ""  # content of the owner file that this process wrote
        self._released = threading.Event()
        self.is_held = False

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Become the owner.

        Raises UserError if another process that is alive is the owner, or if the folder cannot be
        written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_dead_owner()
        except OSError as error:
            raise UserError(
                f"output_dir: {self._path.parent} cannot be written to ({error.strerror}); "
                "free some space, or set another output_dir"
            ) from None
        threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """Give up the ownership."""
        self._released.set()
        if self.is_held and self._is_mine():
            with suppress(OSError):
                self._path.unlink()
        self.is_held = False

    def _create(self) -> bool:
        """Create the owner file with O_EXCL; True for exactly one of several concurrent starts."""
        self._text = json.dumps(identity() | {"doing": self._purpose, "started": time.time()})
        try:
            file = self._path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text)
        except BaseException:  # such as a full disk or a stop; then this process is not the owner
            self._path.unlink(missing_ok=True)
            raise
        self.is_held = True
        return True

    def _remove_dead_owner(self) -> None:
        """Remove the owner file if its process is dead. Raises UserError if the process runs.

        This process creates `.owner.lock` for the check; if another process has this file, the
        function waits for a moment and returns, and the caller tries again.
        """
        lock = self._path.with_name(f"{OWNER}.lock")
        try:
            lock.open("x").close()
        except FileExistsError:
            with suppress(FileNotFoundError):
                # A lock file of this age belongs to a process that was killed.
                if time.time() - lock.stat().st_mtime > _SILENCE_S:
                    lock.unlink()
            time.sleep(_LOCK_WAIT_S)
            return
        try:
            # Both this time and the heartbeat come from the clock of the file server.
            now = lock.stat().st_mtime
            with suppress(FileNotFoundError):
                owner = self._read_owner()
                if is_running(owner, now):
                    raise UserError(in_use_message(self._path.parent, owner))
                self._path.unlink()
        finally:
            lock.unlink(missing_ok=True)

    def _read_owner(self) -> dict[str, Any]:
        text = self._path.read_text(encoding="utf-8")
        heartbeat = self._path.stat().st_mtime
        try:
            owner = json.loads(text)
        except ValueError:  # the file is being written, or was damaged by a power cut
            owner = None
        if not isinstance(owner, dict) or not describes_process(owner):
            owner = {"host": "another machine", "machine": "?", "pids": []}
        return owner | {"heartbeat": heartbeat}

    def _keep_alive(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            if self._is_mine():
                with suppress(OSError):
                    os.utime(self._path)
            self._on_heartbeat()

    def _is_mine(self) -> bool:
        """Whether the owner file was written by this process.

        If this process was suspended for over 60 s, another one may have become the owner.
        """
        try:
            return self._path.read_text(encoding="utf-8") == self._text
        except OSError:
            return False


def identity() -> dict[str, Any]:
    """Identity of this process: host name, machine and process id.

    `machine` differs between hosts with the same name and between containers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # these files may be hidden in a container
        machine = socket.gethostname()
    return {"host": socket.gethostname(), "machine": machine, "pids": [os.getpid()]}


def describes_process(fields: dict[str, Any]) -> bool:
    """Whether the fields of an owner or status file that describe a process have valid types.

    Each may be missing. A file that a user or a damaged disk has changed may have other types.
    """
    pids = fields.get("pids", [])
    times = [fields.get(name, 0) for name in ("started", "heartbeat")]
    return (
        isinstance(pids, list)
        and all(type(pid) is int and pid >= 0 for pid in pids)
        and all(type(value) in (int, float) for value in times)
    )


def is_running(owner: dict[str, Any], now: float | None = None) -> bool:
    """Whether the process described by an owner file or a status file still runs.

    On this machine its process id is checked, on another one the age of its heartbeat. `now`: the
    current time of the clock that set the heartbeat; None for this machine's clock.
    """
    if owner.get("machine") != identity()["machine"]:
        now = time.time() if now is None else now
        age = now - float(owner.get("heartbeat", 0))
        return -_CLOCK_DIFFERENCE_S < age < _SILENCE_S
    return any(_is_owner_process(pid, owner) for pid in owner.get("pids", ()))


def in_use_message(folder: Path, owner: dict[str, Any]) -> str:
    """Message about a folder whose owner is running."""
    purpose = owner.get("doing", TRAINING)
    process, host = (*owner.get("pids", ()), "?")[0], owner.get("host", "another machine")
    stop = f", or stop it with `touch {folder / 'stop'}`" if purpose == TRAINING else ""
    return (
        f"output_dir: {folder} is in use by {purpose} (process {process} on {host}); wait until it "
        f"has ended{stop}"
    )


def _is_owner_process(pid: int, owner: dict[str, Any]) -> bool:
    """Whether the process with this id is still the one that wrote the owner file.

    A process that started after the file was written only reuses the id; so does this process.
    """
    if pid == os.getpid():
        return False
    try:
        process = psutil.Process(pid)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return not is_zombie and process.create_time() <= owner.get("started", 0)
    except psutil.Error:
        return False
