"""status.json: the truth about a run, replaced atomically, and its one living owner."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import UserError
from pipeline.plan.plan import dump_json

_HEARTBEAT_S = 10.0
# An owner on another machine counts as living while its heartbeat is younger than this.
_SILENCE_S = 60.0


@dataclass
class RunStatus:
    """What status.json says; rank 0 owns it. A thread keeps the heartbeat young."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)

    def claim(self, total_steps: int | None = None) -> None:
        """Become the owner and start the heartbeat."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.fields = {
            "state": "running",
            "step": 0,
            "total_steps": total_steps,
            "exit_code": None,
            "reason": None,
            "host": socket.gethostname(),
            "pids": [os.getpid()],
            "started": time.time(),
            "ended": None,
        }
        self.update()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def update(self, **fields: Any) -> None:
        """Change fields and write the file; a disk that does not take it is tried again."""
        with self._lock:
            self.fields |= fields | {"heartbeat": time.time()}
            with suppress(OSError):  # reported by what it keeps from being saved
                write_atomically(self.path, dump_json(self.fields))

    def end(self, state: str, exit_code: int, reason: str | None) -> None:
        """The last word about this start of the run."""
        self._ended.set()
        self.update(state=state, exit_code=exit_code, reason=reason, ended=time.time())

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_S):
            self.update()


def end_for_dead_owner(path: Path, reason: str) -> None:
    """The last word about a run whose owner, rank 0, is dead; from a rank that is left."""
    fields = read_status(path)
    if fields is not None and fields.get("state") == "running" and not is_alive(fields):
        fields |= {"state": "failed", "exit_code": 1, "reason": reason, "ended": time.time()}
        with suppress(OSError):
            write_atomically(path, dump_json(fields))


def read_status(path: Path) -> dict[str, Any] | None:
    """The fields of a status file, or None where there is none or it is not readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def require_no_owner(folder: Path) -> None:
    """Raise UserError where a run is at work in a folder."""
    status = read_status(folder / "status.json")
    if status is not None and is_alive(status):
        raise UserError(
            f"output_dir: {folder} belongs to a run that is at work (process {status['pids'][0]} "
            f"on {status['host']}); wait for it, or stop it with `touch {folder / 'stop'}`"
        )


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the run's owner is still at work."""
    if status.get("state") != "running":
        return False
    if status.get("host") != socket.gethostname():
        return time.time() - float(status.get("heartbeat") or 0) < _SILENCE_S
    return any(_started_before(pid, status) for pid in status.get("pids") or [])


def _started_before(pid: int, status: dict[str, Any]) -> bool:
    """The process exists and is not a later one that was given the same number."""
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE or pid == os.getpid()
        return not is_gone and process.create_time() <= float(status.get("started") or 0)
    except psutil.Error:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
