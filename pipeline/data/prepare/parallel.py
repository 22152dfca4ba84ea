"""Work on many pieces in several processes, with the results in the order of the pieces."""

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import RankZeroError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

# Below this, starting processes (a second each) costs more than it saves.
_FEW_PIECES = 32
_AHEAD = 3  # pieces a process that wait or are done: bounds what is in memory

_work: Callable[[Any], Any] | None = None  # of this process, made with its first piece


def in_order(
    pieces: Iterable[Piece],
    make_work: Callable[[], Callable[[Piece], Result]],
    *,
    processes: int | None = None,
    needs_torch: bool = False,
) -> Generator[Result, None, None]:
    """The result of each piece, in order, whatever the number of processes.

    `make_work` is called once in each process and is sent there, as pieces and results are. By
    default there are as many processes as CPUs that this one may use, and for a few pieces only
    this one. Whoever iterates must close the generator. Errors of the work are raised here.
    """
    left = iter(pieces)
    first = list(islice(left, _FEW_PIECES)) if processes is None else []
    if processes is None:
        is_small = len(first) < _FEW_PIECES
        processes = 1 if is_small else usable_cpus()
    everything = chain(first, left)
    if processes == 1:
        work = make_work()
        for piece in everything:
            yield work(piece)
        return
    # Forking would copy the threads' locks of torch and of the tokenizer.
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), _begin, initargs=(make_work, needs_torch)
    )
    try:
        yield from _through(pool, everything, _AHEAD * processes)
    except BrokenProcessPool:
        raise RankZeroError(
            "a process that tokenises was ended from outside, most likely for want of memory; "
            "give the job more memory or fewer CPUs, and start again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cpus() -> int:
    """CPUs that this process may use: those it is bound to, within the quota of its container."""
    bound = len(os.sched_getaffinity(0))
    root = Path("/sys/fs/cgroup")
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # v2, v1
        try:
            quota, period = " ".join((root / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return max(1, min(bound, -(-int(quota) // int(period))))
    return bound


def _through(pool: ProcessPoolExecutor, pieces: Iterable[Any], num_ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(_do, piece))
        if len(waiting) > num_ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _begin(make_work: Callable[[], Callable[[Any], Any]], needs_torch: bool) -> None:
    """Of a worker: end with the process that started it, and with nothing else."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a launcher ends a rank's children, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the CPUs as it is
    if not needs_torch:
        # transformers imports torch where it is found, for a tokenizer that has no use for it:
        # 290 instead of 90 MB and 3 s instead of 1 for each process (2026-11-25).
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would say that torch is missing
    global _work  # noqa: PLW0603 - one process, one work
    _work = _Later(make_work)


class _Later:
    """The work, made with the first piece: an error of making it is then that piece's."""

    def __init__(self, make_work: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_work = make_work
        self._made: Callable[[Any], Any] | None = None

    def __call__(self, piece: Any) -> Any:
        if self._made is None:
            self._made = self._make_work()
            gc.freeze()  # a tenth of the time went into looking through it for garbage (2026-11-25)
        return self._made(piece)


def _do(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
