"""An ordered parallel map over chunks, in several processes."""

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from math import ceil
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from pipeline.cluster.exits import end_process
from pipeline.cluster.stop import STOP_SIGNALS
from pipeline.errors import RankZeroError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

# For fewer chunks, starting processes (a second each) costs more than it saves.
_FEW_CHUNKS = 32
_CHUNKS_IN_FLIGHT = 3  # chunks per process that are queued, processed, or waiting to be yielded

# In a worker process: the parameter of `parallel_map`, and the function that it has returned.
_make_function: Callable[[], Callable[[Any], Any]] | None = None
_function: Callable[[Any], Any] | None = None


def parallel_map(
    chunks: Iterable[Chunk],
    make_function: Callable[[], Callable[[Chunk], Result]],
    *,
    processes: int | None = None,
    needs_torch: bool = False,
) -> Generator[Result, None, None]:
    """Apply a function to each chunk and yield the results in order.

    `make_function` is pickled and called once in each process; it returns the function. By default
    there is a process for each usable CPU, or only this process for a few chunks. The caller must
    close the generator. Exceptions of the function are raised here.
    """
    remaining = iter(chunks)
    first = list(islice(remaining, _FEW_CHUNKS)) if processes is None else []
    if processes is None:
        processes = 1 if len(first) < _FEW_CHUNKS else usable_cpus()
    all_chunks = chain(first, remaining)
    if processes == 1:
        function = make_function()
        for chunk in all_chunks:
            yield function(chunk)
        return
    # Forking would copy locks that threads of torch and of the tokenizer hold.
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), _init_worker, initargs=(make_function, needs_torch)
    )
    waiting: deque[Future[Any]] = deque()
    try:
        for chunk in all_chunks:
            waiting.append(pool.submit(_process_chunk, chunk))
            if len(waiting) > _CHUNKS_IN_FLIGHT * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RankZeroError(
            "a tokenising process was killed from outside, most likely because memory ran out; "
            "give the job more memory or fewer CPUs, and start again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cpus() -> int:
    """Number of CPUs for this process, limited by its affinity and its container's quota."""
    num_cpus = len(os.sched_getaffinity(0))
    root = Path("/sys/fs/cgroup")
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # v2, v1
        try:
            quota, period = " ".join((root / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return max(1, min(num_cpus, ceil(int(quota) / int(period))))
    return num_cpus


def _init_worker(make_function: Callable[[], Callable[[Any], Any]], needs_torch: bool) -> None:
    """Initialise a worker process, so that it ends with its parent and ignores stop signals."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a launcher signals a rank's children, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all CPUs
    if not needs_torch:
        exclude_torch()
    global _make_function  # noqa: PLW0603 - one function per process
    _make_function = make_function


def exclude_torch() -> None:
    """Keep transformers from importing torch in this process, unless it is imported already.

    transformers imports torch if it is installed, although no tokenizer needs it. Without torch a
    process needs 90 instead of 290 MB and 1 instead of 3 s (2026-11-25). On an overloaded machine
    the import can take minutes.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would warn that torch is missing


def _process_chunk(chunk: Any) -> Any:
    """Apply the function; it is created with the first chunk, so that errors reach the caller."""
    global _function  # noqa: PLW0603 - one function per process
    if _function is None:
        assert _make_function is not None
        _function = _make_function()
        gc.freeze()  # garbage collection of its objects took 10 % of the time (2026-11-25)
    return _function(chunk)


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this process. Runs in a thread."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    end_process(1)
