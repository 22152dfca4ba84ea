"""End of a process: error message, exit code, and output that could not be written."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from tempfile import gettempdir
from typing import Any, NoReturn, TextIO

from pipeline.cluster.logs import configure_logging, current_local_rank, current_rank
from pipeline.errors import RankZeroError, SingleRankError, Stopped, shorten

# Time that a rank waits to be ended by its launcher. DeepSpeed's node launcher checks once a second
# whether a rank has ended, and then terminates the others.
_GRACE_S = 10.0
_DUMB_TERMINALS = (None, "dumb", "unknown")  # values of TERM without escape sequences
# Texts in errors of gloo, NCCL and the key-value store if another rank has ended.
_CONNECTION_ERRORS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe",
    "remote process exited", "communicator was aborted",
)  # fmt: skip


def run_main(
    body: Callable[[], None], *, tracebacks: bool = False, needs_output: bool = True
) -> NoReturn:
    """Run a command and end the process with the matching exit code.

    A RankZeroError is raised on all ranks. So only local rank 0 prints its message, and the other
    ranks wait until their launcher ends them. An error of the file system becomes a message that
    names the file. Any other exception is a bug of this project or of a library, and is shown with
    its traceback. `tracebacks`: also show the tracebacks of the other errors. `needs_output`: end
    with exit code 1 if output is lost, for example on a full disk.
    """
    out = _guard_output()
    configure_logging()
    try:
        body()
    except SingleRankError as error:
        _report(f"rank {current_rank()}: {error}", tracebacks=tracebacks)
        _flush_and_end(error.exit_code)
    except RankZeroError as error:
        if not isinstance(error, Stopped) or current_local_rank() == 0:
            is_failure = error.exit_code == 1  # neither wrong input nor a stop
            _report(str(error), tracebacks=tracebacks and is_failure, is_on_all_ranks=True)
        _flush_and_end(error.exit_code)
    except KeyboardInterrupt:
        if current_local_rank() == 0:
            _report("stopped by Ctrl-C")
        _flush_and_end(128 + signal.SIGINT)
    except Exception as error:  # noqa: BLE001 - the outermost handler of a process
        if is_lost_connection(error) and not tracebacks:
            # In this time the watchdog may find the dead rank, and end this process.
            time.sleep(_GRACE_S)
            _report(f"rank {current_rank()}: lost its connection to another rank: {error}")
        elif (text := _file_error(error)) and not tracebacks:
            _report(f"rank {current_rank()}: {text}")
        else:
            _report(f"rank {current_rank()}: unexpected error\n{traceback.format_exc()}")
        _flush_and_end(1)
    out.flush()
    if out.lost is not None and needs_output:
        _report(f"standard output: {out.lost.strerror}: a part of the output is lost")
        _flush_and_end(1)
    _flush_and_end(0)


def end_process(code: int) -> NoReturn:
    """End this process at once, from any thread. Only this function calls `os._exit`.

    No exit handler runs and no thread is joined, because threads of a broken process group may
    never end. A progress bar may have hidden the cursor of the terminal, so it is shown again.
    """
    with suppress(OSError):
        if os.isatty(1) and os.environ.get("TERM") not in _DUMB_TERMINALS:
            os.write(1, b"\x1b[?25h")
    os._exit(code)


class _GuardedStream:
    """Output stream that ignores errors of a closed terminal, a closed pipe or a full disk.

    `lost`: the error because of which output is lost, such as a full disk. It stays None if the
    reader has closed the pipe or the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        with self._record_lost_output():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._record_lost_output():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _record_lost_output(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # EPIPE and EIO: the reader or the terminal has closed.
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.lost = error


def _guard_output() -> _GuardedStream:
    """Replace stdout and stderr, so that output that cannot be written or encoded raises no error.

    A standard input that was closed before the start becomes an empty one. Returns the new stdout.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - for the process
    guarded = []
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed by the program that started this one
            # Opened, because otherwise the next file would get the number of the closed stream.
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PLW2901, PTH123, SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        guarded.append(_GuardedStream(stream))
    sys.stdout, sys.stderr = guarded
    return guarded[0]


def _file_error(error: Exception) -> str | None:
    """Message for an error of the file system; None for any other error."""
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return shorten(f"{error}: remove the link")  # of Path.resolve, before Python 3.13
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    if error.filename is not None:
        return shorten(f"{os.fsdecode(error.filename)}: {error.strerror}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        limit = "; ulimit -f is the limit" if error.errno == errno.EFBIG else ""
        return f"a file could not be written: {error.strerror} (TMPDIR is {gettempdir()}){limit}"
    return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of gloo, NCCL or the store means that another rank has ended."""
    if isinstance(error, OSError):  # raised by Python for a terminal or a file
        return False
    class_names = {cls.__name__ for cls in type(error).__mro__}  # without an import of torch
    has_text = any(text in str(error) for text in _CONNECTION_ERRORS)
    return has_text or "DistNetworkError" in class_names


def _report(message: str, *, tracebacks: bool = False, is_on_all_ranks: bool = False) -> None:
    """Print an error; if all ranks have it, only local rank 0 usually lives until it prints."""
    if is_on_all_ranks and current_local_rank() > 0:
        # If this rank ended first, the launcher would kill local rank 0 before it prints. So this
        # rank waits for the launcher's SIGTERM, which its default handler obeys at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_S)
    if tracebacks:
        traceback.print_exc()
    sys.stdout.flush()
    print_last_message(message)


def print_last_message(message: str) -> None:
    """Print why this process ends, in place of a line that a progress bar of any rank has left."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in _DUMB_TERMINALS:
        message = f"\r\x1b[K{message}"
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - the message of the error


def _flush_and_end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    end_process(code)
