"""What only all ranks together can find out before there is a process group: clocks and folder.

Each look is a collective: every rank, in the table's order.
"""

import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.preflight.check import Finding, ProbeResults, fail, ok, warn
from pipeline.preflight.context import RankContext
from pipeline.preflight.inputs import check_output, nearest

# A new start takes a run's owner on another machine for dead after 60 s of silence by its clock
# (train/owner.py).
_WRONG_CLOCK_S, _ODD_CLOCK_S = 30.0, 2.0
# A network file system may show a file of another machine only after its attribute cache ran out
# (nfs(5): acdirmax is 60 s, names never asked for before are looked up at once).
_APPEARS_WITHIN_S = 10.0


def probe_clock(context: RankContext) -> float:
    """Seconds by which this clock is ahead of rank 0's, too large by the way of one message."""
    session = context.session
    session.gather_objects(None)  # all wait for the time by now
    of_first = float(session.rank_zero_first(time.time))
    return 0.0 if session.is_rank_zero else time.time() - of_first


def assess_clock(seen: ProbeResults) -> Iterable[Finding]:
    """Clocks that agree."""
    furthest = max(seen.answers, key=lambda rank: abs(seen.answers[rank]))
    skew = abs(seen.answers[furthest])
    if skew < _ODD_CLOCK_S:
        yield ok("less than 2 s apart")
        return
    ranks = [rank for rank, ahead in seen.answers.items() if abs(ahead) >= _ODD_CLOCK_S]
    text = f"{seen.where(ranks)}: up to {skew:.0f} s away from rank 0's clock"
    remedy = "synchronise the clocks (chronyd, or the administrator)"
    if skew < _WRONG_CLOCK_S:
        yield warn(text, remedy, ranks)
    else:
        yield fail(f"{text}; whether a run's owner lives is told by the clock", remedy, ranks)


def probe_folder(context: RankContext) -> dict[str, Any]:
    """Whether this rank reads what rank 0 writes where the run folder is or will be.

    Raises UserError on all ranks where rank 0 cannot write.
    """
    session, token = context.session, uuid.uuid4().hex
    given = session.rank_zero_first(lambda: _write(context.folder, token))
    path = Path(given["path"])
    found = _read(path, given["token"])
    context.beat("after reading")
    session.gather_objects(None)  # all have looked

    def remove() -> None:
        with suppress(OSError):
            path.unlink()

    session.rank_zero_first(remove)
    return {"found": found, "folder": str(path.parent)}


def assess_folder(seen: ProbeResults) -> Iterable[Finding]:
    """Every rank has read it."""
    blind = [rank for rank, answer in seen.answers.items() if not answer["found"]]
    folder = seen.answers[0]["folder"]
    if blind:
        yield fail(
            f"{seen.where(blind)}: a file that rank 0 wrote in {folder} is not there after "
            f"{_APPEARS_WITHIN_S:.0f} s",
            "put output_dir on a file system that every machine has",
            blind,
        )
    elif len(seen.answers) == 1:
        yield ok(f"{folder} can be written in")
    else:
        yield ok(f"{folder}: written by rank 0, read by all")


def _write(folder: Path, token: str) -> dict[str, str]:
    """A file as checkpoints are written: beside, synced, renamed."""
    check_output(folder)
    path = nearest(folder) / f".preflight-{token}"
    beside = path.with_suffix(".tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"output_dir: {path.parent}: {error.strerror}; free some space or give another folder"
        ) from None
    return {"path": str(path), "token": token}


def _read(path: Path, token: str) -> bool:
    end = time.monotonic() + _APPEARS_WITHIN_S
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
