"""status.json: the truth about a run, replaced atomically, and its one living owner."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import dump_json, write_text
from pipeline.train.owner import OWNER, TRAINING, Ownership, identity, is_living

_ONE_BEAT_S = 12.0  # owner.py beats every 10


@dataclass
class RunStatus:
    """What status.json says; rank 0 owns it. A thread keeps the heartbeat young."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock, self._is_closed = threading.Lock(), False
        self._ownership = Ownership(self.path.parent, TRAINING, self._beat)

    def own(self) -> None:
        """Become the folder's one owner and start the heartbeat; status.json stays as it is.

        Raises UserError where another start is its owner.
        """
        self._ownership.take()

    def claim(self, earlier: dict[str, Any] | None = None) -> None:
        """From here on status.json speaks of this start, which goes on from an earlier one."""
        assert self._ownership.is_held, "own() comes first"
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
        """Change fields and write the file; a disk that does not take it is tried again."""
        with self._lock:
            if self._is_closed:
                return
            self.fields |= fields | {"heartbeat": time.time()}
            with suppress(OSError):  # reported by what it keeps from being saved
                write_text(self.path, dump_json(self.fields))

    def end(self, state: str, exit_code: int, reason: str | None, *, is_last: bool = False) -> None:
        """How this start of the run has ended, if it came as far as to claim the folder.

        The last word is the watchdog's: what the main thread says after it does not count.
        """
        if self.fields:
            self.update(state=state, exit_code=exit_code, reason=reason, ended=time.time())
        with self._lock:
            self._is_closed |= is_last
        self._ownership.release()

    def _beat(self) -> None:
        if self.fields:
            self.update()


def end_for_dead_owner(path: Path, reason: str) -> None:
    """The last word about a run whose owner, rank 0, is dead; from a rank that is left.

    Of another machine's a heartbeat is waited for, which does not come.
    """
    fields = read_status(path)
    if fields is None or fields.get("state") != "running":
        return
    if fields.get("machine") != identity()["machine"]:
        time.sleep(_ONE_BEAT_S)
        is_dead = (read_status(path) or {}).get("heartbeat") == fields.get("heartbeat")
    else:
        is_dead = not is_alive(fields)
    if is_dead:
        fields |= {"state": "failed", "exit_code": 1, "reason": reason, "ended": time.time()}
        with suppress(OSError):
            write_text(path, dump_json(fields))
            (path.parent / OWNER).unlink(missing_ok=True)  # or it would count on other machines


def read_status(path: Path) -> dict[str, Any] | None:
    """The fields of a status file, or None where there is none or it is not readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_done(folder: Path) -> bool:
    """Whether a finished run is in the folder."""
    return (read_status(folder / "status.json") or {}).get("state") == "done"


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the run's owner is still at work."""
    return status.get("state") == "running" and is_living(status)
