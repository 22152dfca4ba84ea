"""Run one function on N gloo ranks with a deadline.

The ranks are forked from a forkserver that has already imported torch and DeepSpeed, so that a
2-rank ZeRO test takes about a second. Bodies are module-level functions (pickled by name). The
rendezvous is a file (FileStore) and needs no port.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def run_ranks(
    body: Callable[..., Any],
    *args: Any,
    tmp_path: Path,
    world_size: int = 2,
    deadline_s: float = 90.0,
) -> list[Any]:
    """Call ``body(session, *args)`` on every rank and return the results by rank.

    Raises AssertionError with the traceback of the first rank that failed, or with the ranks that
    were still running at the deadline. No process survives the call.
    """
    store = tmp_path / f"rendezvous-{time.monotonic_ns()}"
    arguments = [(rank, world_size, store, body, args) for rank in range(world_size)]
    return run_processes(_in_session, arguments, deadline_s)


def run_processes(
    body: Callable[..., Any], arguments: list[tuple[Any, ...]], deadline_s: float = 90.0
) -> list[Any]:
    """Call ``body(*args)`` concurrently, in a process for each tuple; errors as in `run_ranks`."""
    ends = [CONTEXT.Pipe(duplex=False) for _ in arguments]
    # pickle copies tensors. The pickler of processes would share each through a file descriptor.
    workers = [
        CONTEXT.Process(target=_send_result, args=(send, pickle.dumps((body, args))))
        for args, (_, send) in zip(arguments, ends, strict=True)
    ]
    for worker, (_, send) in zip(workers, ends, strict=True):
        worker.start()
        send.close()
    try:
        return _collect({recv: rank for rank, (recv, _) in enumerate(ends)}, deadline_s)
    finally:
        for worker in workers:
            worker.join(0.2)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _collect(waiting: dict[Connection, int], deadline_s: float) -> list[Any]:
    results: list[Any] = [None] * len(waiting)
    died: list[int] = []  # often because another rank failed, whose report is awaited
    end = time.monotonic() + deadline_s
    while waiting:
        if died:
            end = min(end, time.monotonic() + 10.0)
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready and not died:
            late = sorted(waiting.values())
            raise AssertionError(f"ranks {late} still running after {deadline_s:g} s")
        if not ready:
            break
        for recv in ready:
            rank = waiting.pop(recv)
            try:
                ok, value = pickle.loads(recv.recv_bytes())
            except EOFError:
                died.append(rank)
                continue
            if not ok:
                raise AssertionError(f"rank {rank}:\n{value}")
            results[rank] = value
    if died:
        raise AssertionError(f"rank {died[0]}:\nthe process died without a result")
    return results


def _send_result(send: Connection, pickled: bytes) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        body, args = pickle.loads(pickled)
        send.send_bytes(pickle.dumps((True, body(*args))))
    except BaseException:  # the test's process raises it
        send.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _in_session(
    rank: int, world_size: int, store: Path, body: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    import torch.distributed as dist

    from pipeline.cluster.devices import detect_hardware
    from pipeline.cluster.placement import Placement
    from pipeline.cluster.session import Session

    placement = Placement(rank=rank, local_rank=rank, world_size=world_size, local_size=world_size)
    os.environ.update(placement.variables())
    session = Session(placement, detect_hardware())
    session._store = dist.FileStore(str(store), world_size)
    session.start()
    value = body(session, *args)
    dist.barrier()
    dist.destroy_process_group()
    return value


def run_groups_once(groups, function, model, tmp_path_factory):
    """Function: name of a group -> its results on rank 0; the ranks start once for each group.

    `groups`: name -> (number of ranks, runs). The ranks call `function(session, model, runs)`.
    """

    @cache
    def results_of(name):
        world_size, runs = groups[name]
        folder = tmp_path_factory.mktemp("group")
        return run_ranks(function, model, runs, tmp_path=folder, world_size=world_size)[0]

    return results_of
