"""Run one function on N gloo ranks with a deadline.

The ranks are forked from a forkserver that has already imported torch and DeepSpeed, so that a
2-rank ZeRO test takes about a second. The function is defined at module level, because it is
pickled by name. The rendezvous is a file (FileStore) and needs no port.
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

    `session`: the process group of the rank. Raises AssertionError with the traceback of the first
    rank that failed, or with the ranks that were still running at the deadline. No process
    survives the call.
    """
    store = tmp_path / f"rendezvous-{time.monotonic_ns()}"
    arguments = [(rank, world_size, store, body, args) for rank in range(world_size)]
    return run_processes(_in_session, arguments, deadline_s)


def run_processes(
    body: Callable[..., Any], arguments: list[tuple[Any, ...]], deadline_s: float = 90.0
) -> list[Any]:
    """Call ``body(*args)`` concurrently, in a process for each tuple; errors as in `run_ranks`."""
    pipes = [CONTEXT.Pipe(duplex=False) for _ in arguments]  # (receiving end, sending end)
    # pickle copies tensors. multiprocessing would share each tensor through a file descriptor.
    workers = [
        CONTEXT.Process(target=_send_result, args=(sender, pickle.dumps((body, args))))
        for args, (_, sender) in zip(arguments, pipes, strict=True)
    ]
    for worker, (_, sender) in zip(workers, pipes, strict=True):
        worker.start()
        sender.close()
    try:
        rank_of = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        return _collect_results(rank_of, deadline_s)
    finally:
        for worker in workers:
            worker.join(0.2)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _collect_results(waiting: dict[Connection, int], deadline_s: float) -> list[Any]:
    """The results by rank; `waiting`: each pipe that a result comes from, and its rank."""
    results: list[Any] = [None] * len(waiting)
    # A rank often dies because another rank failed. Wait 10 s more for the other's traceback.
    dead_ranks: list[int] = []
    end = time.monotonic() + deadline_s
    while waiting:
        if dead_ranks:
            end = min(end, time.monotonic() + 10.0)
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready and not dead_ranks:
            late_ranks = sorted(waiting.values())
            raise AssertionError(f"ranks {late_ranks} still running after {deadline_s:g} s")
        if not ready:
            break
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                has_succeeded, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                dead_ranks.append(rank)
                continue
            if not has_succeeded:
                raise AssertionError(f"rank {rank}:\n{value}")
            results[rank] = value
    if dead_ranks:
        raise AssertionError(f"rank {dead_ranks[0]}:\nthe process died without a result")
    return results


def _send_result(sender: Connection, pickled_call: bytes) -> None:
    """Send (True, result of the call) or (False, its traceback), which the test process raises."""
    import torch

    torch.set_num_threads(1)
    try:
        body, args = pickle.loads(pickled_call)
        sender.send_bytes(pickle.dumps((True, body(*args))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))


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
    """Return a function from the name of a group of runs to the results of its runs.

    `groups`: name -> (number of ranks, settings of each run). The first request for a group starts
    its ranks, which call `function(session, model, runs)`. The results are those of rank 0; later
    requests for the group return them again.
    """

    @cache
    def results_of(name):
        world_size, runs = groups[name]
        folder = tmp_path_factory.mktemp("group")
        return run_ranks(function, model, runs, tmp_path=folder, world_size=world_size)[0]

    return results_of
