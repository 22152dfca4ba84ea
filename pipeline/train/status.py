"""status.json: the state of a run, replaced atomically, with a heartbeat from a thread."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import atomic_file, dump_json, read_json_or_empty, write_text
from pipeline.train.owner import OWNER, TRAINING, Ownership, describes_process, identity, is_running

_ONE_HEARTBEAT_S = 12.0  # longer than the 10 s between two heartbeats (owner.py)
# Fields that status.json keeps of each earlier start, in the list `earlier_starts`. `first_step`:
# step of the checkpoint from which that start resumed; 0 if it began at step 0.
_START_FIELDS = ("started", "ended", "first_step", "step", "state", "exit_code", "reason")
_MAX_STARTS = 1000  # the oldest are dropped, because every heartbeat writes the whole file


@dataclass
class RunStatus:
    """The fields of status.json, and the ownership of the run folder; on rank 0 only.

    A start is one launch of the training program; a run that was resumed has several. The field
    `earlier_starts` lists those before the present one, oldest first.
    """

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock, self._is_final = threading.Lock(), False
        self._earlier_content: bytes | None = None  # content of the file before this start
        self._ownership = Ownership(self.path.parent, TRAINING, self.update)

    def take_ownership(self) -> None:
        """Become the owner of the folder and start the heartbeat, without changing status.json.

        Raises UserError if another start is the owner.
        """
        self._ownership.take()

    def write_start(self, earlier: dict[str, Any] | None = None) -> None:
        """Write the status of this start. `earlier`: status that the resumed run had, if any."""
        assert self._ownership.is_held, "call take_ownership() first"
        if not self.fields:
            with suppress(OSError):
                self._earlier_content = self.path.read_bytes()
        resumed_fields = ("step", "total_steps", "saved_step")
        self.fields = {
            "state": "running",
            "step": 0,
            "total_steps": None,
            "exit_code": None,
            "reason": None,
            **identity(),
            "started": time.time(),
            "ended": None,
            **{name: earlier[name] for name in resumed_fields if earlier and name in earlier},
            "first_step": None if earlier else 0,
            "earlier_starts": [] if earlier is None else _starts_up_to(earlier),
        }
        self.update()

    def update(self, **fields: Any) -> None:
        """Change fields and write the file, if this start has called `write_start`.

        If the write fails, the next update writes the fields.
        """
        with self._lock:
            if self._is_final or not self.fields:
                return
            self.fields |= fields | {"heartbeat": time.time()}
            with suppress(OSError):  # a full disk is reported by the checkpoint that fails
                write_text(self.path, dump_json(self.fields))

    def restore_earlier(self) -> None:
        """If `write_start` replaced a status.json, restore it, and ignore later updates."""
        with self._lock:
            if self._earlier_content is None:
                return
            self._is_final = True
            with suppress(OSError), atomic_file(self.path) as temporary:
                temporary.write_bytes(self._earlier_content)

    def end(
        self, state: str, exit_code: int, reason: str | None, *, is_final: bool = False
    ) -> None:
        """Record how this start ended, if it has called `write_start`, and release the folder.

        `is_final`: later calls do not change the status. The watchdog sets it, because the main
        thread continues until the process ends.
        """
        self.update(state=state, exit_code=exit_code, reason=reason, ended=time.time())
        with self._lock:
            self._is_final |= is_final
        self._ownership.release()


def _starts_up_to(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The starts of a run up to the one that wrote this status, oldest first."""
    start = {name: status.get(name) for name in _START_FIELDS}
    if start["state"] == "running":  # it was killed some time after its last heartbeat
        start |= {"state": "killed", "ended": status.get("heartbeat")}
    return [*status.get("earlier_starts", []), start][-_MAX_STARTS:]


def end_for_dead_owner(path: Path, reason: str) -> None:
    """Record that the run failed, if its rank 0 is dead. Called on another rank.

    A rank 0 on another machine counts as dead if status.json gets no heartbeat for 12 s.
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
            # While the owner file exists, other machines wait until its heartbeat is too old.
            (path.parent / OWNER).unlink(missing_ok=True)


def read_status(path: Path) -> dict[str, Any] | None:
    """The fields of a status file; None if the file is missing or damaged."""
    fields = read_json_or_empty(path)
    starts = fields.get("earlier_starts", [])
    has_starts = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
    return fields if fields and has_starts and describes_process(fields) else None


def is_done(folder: Path) -> bool:
    """Whether the folder has a finished run."""
    return (read_status(folder / "status.json") or {}).get("state") == "done"


def is_alive(status: dict[str, Any]) -> bool:
    """Whether a run is in progress and its process still runs."""
    return status.get("state") == "running" and is_running(status)
