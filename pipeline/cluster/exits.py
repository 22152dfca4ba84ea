"""How a process of a run ends: one clear message, the right exit code, no rank left hanging."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from pipeline.cluster.logs import configure_logging, current_rank
from pipeline.errors import OfOneRank, RankZeroError, Stopped

# DeepSpeed's node launcher looks once a second for a rank that ended and terminates the others.
_GRACE_S = 10.0
_LOCAL_RANKS = (
    "LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
)  # fmt: skip


def run_main(body: Callable[[], None], *, tracebacks: bool = False) -> NoReturn:
    """Run a script's body and leave the process with the exit code of what happened.

    A RankZeroError shows its message only. All ranks meet it together, so local rank 0 prints it
    and the others wait to be ended by their launcher. Anything else is a defect of ours or of a
    library and shows its traceback.
    """
    configure_logging()
    try:
        body()
    except OfOneRank as error:
        _say(f"rank {current_rank()}: {error}", tracebacks=tracebacks)
        _leave(error.exit_code)
    except RankZeroError as error:
        if not isinstance(error, Stopped) or _local_rank() == 0:
            is_failure = error.exit_code == 1  # not a mistake in the run file, nor a stop
            _say(str(error), tracebacks=tracebacks and is_failure, is_common=True)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except Exception as error:  # noqa: BLE001 - the last resort of a process; shown whole
        if is_lost_connection(error) and not tracebacks:
            time.sleep(_GRACE_S)  # the watchdog ends this process as soon as it knows who is gone
            _say(f"rank {current_rank()}: lost its connection to another rank: {error}")
        else:
            _say(f"rank {current_rank()}: unexpected error\n{traceback.format_exc()}")
        _leave(1)
    _leave(0)


class _Forgiving:
    """A stream for which a terminal that is gone, or a log on a full disk, is no error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive_output() -> None:
    """From here on nothing that this process says can end it: what counts is in its files."""
    sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)


def _say(message: str, *, tracebacks: bool = False, is_common: bool = False) -> None:
    if is_common and _local_rank() > 0:
        # Ending first would make the launcher kill local rank 0 before it has spoken.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_S)
    if tracebacks:
        traceback.print_exc()
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - the one message


def is_lost_connection(error: BaseException) -> bool:
    """An error of the transport (gloo, NCCL, the store): another rank is gone, and says why."""
    if isinstance(error, OSError):  # of Python's own: a terminal or a file
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    said = (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe",
        "remote process exited", "communicator was aborted",
    )  # fmt: skip
    return "DistNetworkError" in names or any(text in str(error) for text in said)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for a library's threads: a broken process group may never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _local_rank() -> int:
    """Also before the placement is known, when only the launcher's own variable is there."""
    found = (os.environ.get(name, "") for name in _LOCAL_RANKS)
    return next((int(value) for value in found if value.isdigit()), 0)
