"""status.json: the state of a run, replaced atomically and kept fresh by a heartbeat thread."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import atomic_file, dump_json, read_json, write_text
from pipeline.train.owner import OWNER, TRAINING, Ownership, identity, is_living

_ONE_HEARTBEAT_S = 12.0  # owner.py touches its file every 10 s


@dataclass
class RunStatus:
    """The fields of status.json; on rank 0 only. Holds the ownership of the run folder."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock, self._is_final = threading.Lock(), False
        self._before: bytes | None = None  # the file as an earlier start left it
        self._ownership = Ownership(self.path.parent, TRAINING, self.update)

    def own(self) -> None:
        """Become the folder's owner and start the heartbeat; status.json stays as it is.

        Raises UserError where another start is the owner.
        """
        self._ownership.take()

    def claim(self, earlier: dict[str, Any] | None = None) -> None:
        """Make status.json that of this start; `earlier`: the status of the run it resumes."""
        assert self._ownership.is_held, "own() comes first"
        if not self.fields:
            with suppress(OSError):
                self._before = self.path.read_bytes()
        kept = ("step", "total_steps", "saved_step")
        self.fields = {
            "state": "running",
            "step": 0,
            "total_steps": None,
            "exit_code": None,
            "reason": None,
            **identity(),
            "started": time.time(),
            "ended": None,
            **{name: earlier[name] for name in kept if earlier and name in earlier},
        }
        self.update()

    def update(self, **fields: Any) -> None:
        """Change fields and write the file, once this start has claimed it.

        A failed write is repaired by the next one.
        """
        with self._lock:
            if self._is_final or not self.fields:
                return
            self.fields |= fields | {"heartbeat": time.time()}
            with suppress(OSError):  # a full disk is reported by the checkpoint that fails
                write_text(self.path, dump_json(self.fields))

    def restore_earlier(self) -> None:
        """Put the file back as an earlier start left it, if there was one; the status is final."""
        with self._lock:
            if self._before is None:
                return
            self._is_final = True
            with suppress(OSError), atomic_file(self.path) as temporary:
                temporary.write_bytes(self._before)

    def end(
        self, state: str, exit_code: int, reason: str | None, *, is_final: bool = False
    ) -> None:
        """Record how this start ended, if it has claimed the file, and release the folder.

        `is_final`: no later call changes the status. The watchdog's is, because the main thread
        runs on until the process ends.
        """
        self.update(state=state, exit_code=exit_code, reason=reason, ended=time.time())
        with self._lock:
            self._is_final |= is_final
        self._ownership.release()


def end_for_dead_owner(path: Path, reason: str) -> None:
    """Record the end of a run whose rank 0 is dead, from another rank.

    If rank 0 ran on another machine, it counts as dead when its heartbeat does not come.
    """
    fields = read_status(path)
    if fields is None or fields.get("state") != "running":
        return
    if fields.get("machine") != identity()["machine"]:
        time.sleep(_ONE_HEARTBEAT_S)
        is_dead = (read_status(path) or {}).get("heartbeat") == fields.get("heartbeat")
    else:
        is_dead = not is_alive(fields)
    if is_dead:
        fields |= {"state": "failed", "exit_code": 1, "reason": reason, "ended": time.time()}
        with suppress(OSError):
            write_text(path, dump_json(fields))
            (path.parent / OWNER).unlink(missing_ok=True)  # or other machines would wait for it


def read_status(path: Path) -> dict[str, Any] | None:
    """The fields of a status file; None where there is none or it is damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def is_done(folder: Path) -> bool:
    """Whether the folder holds a finished run."""
    return (read_status(folder / "status.json") or {}).get("state") == "done"


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the process of a run still works."""
    return status.get("state") == "running" and is_living(status)
