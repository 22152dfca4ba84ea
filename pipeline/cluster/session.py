"""Session: communication between the ranks of a run.

It uses torch's key-value store, which rank 0 serves, and later a process group. torch is imported
only if several ranks communicate: in a single process `rank_zero_first` works without torch.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.cluster.placement import Placement, device_index
from pipeline.cluster.rendezvous import address_by_mpi, interface_between, open_store
from pipeline.errors import RankZeroError, Stopped, UserError
from pipeline.plan.given.hardware import Hardware

if TYPE_CHECKING:
    import torch

    from pipeline.cluster.sequence_group import SequenceGroup

# Time limit of a collective; long, because ranks load the model at different speeds.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Time limit of one wait on the store; after it `_wait_for` waits again. While rank 0 tokenises,
# which may take days, the other ranks wait on the store, because a collective would time out. If
# rank 0 ends, the wait fails at once.
_ONE_WAIT_TIMEOUT = timedelta(hours=24)
# Time limits: for all ranks to read a result of rank 0, and for one call to the store from another
# thread.
_READING_TIMEOUT = timedelta(seconds=15)
_CHANNEL_TIMEOUT = timedelta(seconds=10)
# Time limit of `gather_objects`; long, because the watchdog ends a run if a rank does not arrive.
_GATHER_TIMEOUT = timedelta(hours=24)


class Session:
    """Communication between the ranks of one run.

    Methods are collective unless their docstring says otherwise: all ranks must call them, in the
    same order.
    """

    def __init__(self, placement: Placement, hardware: Hardware) -> None:
        self.placement = placement
        self._is_cuda = hardware.kind == "cuda"
        self._store: Any = None
        self._host_group: Any = None  # process group for host tensors; None: the default group
        # Number of calls that used the store. It is equal on all ranks and makes keys unique.
        self._num_store_calls = 0
        self._current_gather: str | None = None  # key of the gather in progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error, other ranks may be in another collective, so a barrier would hang.
        if kind is None and self._store is not None:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which writes the files of the run. Not a collective."""
        return self.placement.rank == 0

    @property
    def device(self) -> "torch.device":
        """The device of this rank. Not a collective."""
        import torch

        if not self._is_cuda:
            return torch.device("cpu")
        return torch.device("cuda", device_index(self.placement, torch.cuda.device_count()))

    def rank_zero_first(
        self, work: Callable[[], Any], meanwhile: Callable[[], None] | None = None
    ) -> Any:
        """Call `work` on rank 0 while the others wait, and return its result on all ranks.

        The result must be JSON values. The ranks wait on the store, without a time-out. A
        RankZeroError of rank 0 is raised on all ranks. `meanwhile`: work that the other ranks do in
        a thread while they wait. They complete it before they return, unless rank 0 has an error.
        """
        if self.placement.world_size == 1:
            return work()
        key = f"rank-zero-first/{self._num_store_calls}"
        self._num_store_calls += 1
        store = self._open_store()
        if self.is_rank_zero:
            try:
                result = work()
            except RankZeroError as error:
                store.set(key, json.dumps({"error": str(error), "code": error.exit_code}))
                self._await_readers(store, key)
                raise
            store.set(key, json.dumps({"result": result}))
            self._await_readers(store, key)
            return result
        thread = None
        if meanwhile is not None:
            # A daemon, because after an error the process ends without waiting for it.
            thread = threading.Thread(target=meanwhile, name="meanwhile", daemon=True)
            thread.start()
        _wait_for(store, key)
        answer = json.loads(store.get(key))
        store.set(f"{key}/read-by-{self.placement.rank}", "")
        if "error" in answer:
            kinds = {kind.exit_code: kind for kind in (RankZeroError, UserError, Stopped)}
            raise kinds[answer["code"]](answer["error"])
        if thread is not None:
            thread.join()
        return answer["result"]

    def import_deepspeed(self) -> None:
        """Import DeepSpeed and bitsandbytes. Not a collective; may run in any thread."""
        if self._is_cuda:
            import torch

            # Set before the imports, because bitsandbytes uses the current CUDA device. Each thread
            # has a current device of its own.
            torch.cuda.set_device(self.device)
        _import_without_compiler()
        import deepspeed

        # DeepSpeed 0.19.8 fills this dict at its first use, and calls the compiler to check each
        # operator. On a CPU, comm/torch.py:49 compiles an operator for inference with g++ if the
        # dict has that operator. Nothing else reads the dict. An empty dict prevents the checks and
        # the compilation.
        deepspeed.ops.__compatible_ops__ = {}

    def start(self) -> None:
        """Initialise the process group and DeepSpeed's communication."""
        import torch.distributed as dist

        store = self._open_store()
        if self.placement.nodes > 1 and (name := interface_between(store, self.placement)):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        self.import_deepspeed()
        dist.init_process_group(
            "nccl" if self._is_cuda else "gloo",
            store=store,
            rank=self.placement.rank,
            world_size=self.placement.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
            device_id=self.device if self._is_cuda else None,
        )
        if self._is_cuda and self.placement.world_size > 1:
            # Numbers in host memory are summed in each step. gloo sums them without a
            # synchronisation of the device, so that the GPU always has kernels in its queue.
            self._host_group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
        import deepspeed

        if self._is_cuda and self.device.index != self.placement.local_rank:
            use_only_gpu(deepspeed.accelerator.get_accelerator())
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)

    def sequence_group(self, size: int) -> "SequenceGroup | None":
        """The `size` consecutive ranks that share sequences with this one; None if `size` is 1."""
        if size == 1:
            return None
        import torch.distributed as dist

        from pipeline.cluster.sequence_group import SequenceGroup

        # Every rank creates all groups, in the same order.
        firsts = range(0, self.placement.world_size, size)
        groups = [
            dist.new_group(range(first, first + size), timeout=_COLLECTIVE_TIMEOUT)
            for first in firsts
        ]
        group_index, rank_in_group = divmod(self.placement.rank, size)
        return SequenceGroup(size, rank_in_group, groups[group_index])

    def open_channel(self) -> Any:
        """A connection to the key-value store for another thread; None for a single process.

        Not a collective. Its methods raise RuntimeError if rank 0, which serves the store, has
        ended.
        """
        if self.placement.world_size == 1:
            return None
        channel = self._open_store().clone()
        channel.set_timeout(_CHANNEL_TIMEOUT)
        return channel

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks get the same result."""
        return self.sum_over_ranks([float(flag)])[0] > 0

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums of host numbers over all ranks, in fp64; equal on all ranks."""
        if self.placement.world_size == 1:
            return [float(value) for value in values]
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._host_group)
        return [float(value) for value in tensor.tolist()]

    def gather_objects(self, value: Any) -> list[Any] | None:
        """Gather JSON values on rank 0, in the order of ranks, through the store.

        Other ranks get None and do not wait. No process group is needed.
        """
        if self.placement.world_size == 1:
            return [json.loads(json.dumps(value))]
        key = f"gather/{self._num_store_calls}"
        self._num_store_calls += 1
        store = self._open_store()
        store.set(f"{key}/{self.placement.rank}", json.dumps(value))
        if not self.is_rank_zero:
            return None
        keys = [f"{key}/{rank}" for rank in range(self.placement.world_size)]
        self._current_gather = key
        store.wait(keys, _GATHER_TIMEOUT)
        self._current_gather = None
        return [json.loads(store.get(key)) for key in keys]

    def gathered_so_far(self) -> dict[int, Any]:
        """The values of `gather_objects` that have arrived on rank 0 so far, as rank -> value.

        If no gather is in progress on rank 0, these are values of the next one, which other ranks
        may already have sent. Not a collective; for other threads of rank 0.
        """
        if self._store is None or self.placement.world_size == 1:
            return {}
        channel = self.open_channel()
        gather = self._current_gather or f"gather/{self._num_store_calls}"
        keys = {rank: f"{gather}/{rank}" for rank in range(self.placement.world_size)}
        arrived = {rank: key for rank, key in keys.items() if channel.check([key])}
        return {rank: json.loads(channel.get(key)) for rank, key in arrived.items()}

    def all_reduce_sum(self, tensor: "torch.Tensor") -> None:
        """Sum a tensor on this rank's device over all ranks, in place."""
        import torch.distributed as dist

        dist.all_reduce(tensor)

    def swap_with(self, other: int, sent: "torch.Tensor", received: "torch.Tensor") -> None:
        """Exchange tensors with another rank. Not a collective: only the two ranks call it.

        Call it only after an all-reduce, because all ranks must take part in the first
        communication of an NCCL group.
        """
        import torch.distributed as dist

        operations = [dist.P2POp(dist.irecv, received, other), dist.P2POp(dist.isend, sent, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _await_readers(self, store: Any, key: str) -> None:
        """Wait until every rank has read the key, because the store ends when rank 0 ends."""
        import torch.distributed as dist

        readers = [f"{key}/read-by-{rank}" for rank in range(1, self.placement.world_size)]
        try:
            store.wait(readers, _READING_TIMEOUT)
        except (dist.DistError, RuntimeError):
            return  # a rank has ended

    def _open_store(self) -> Any:
        """The key-value store; the first call is the rendezvous of the ranks."""
        if self._store is None:
            import torch.distributed as dist

            if self.placement.world_size == 1:
                self._store = dist.HashStore()  # type: ignore[attr-defined]
                return self._store
            if not self.placement.master_addr or not self.placement.master_port:
                self._set_address(*address_by_mpi(self.placement))
            self._store, port = open_store(self.placement)
            self._set_address(self.placement.master_addr, port)
        return self._store

    def _set_address(self, address: str, port: int) -> None:
        """Set the address of the store in the placement, and in the environment for DeepSpeed."""
        self.placement = replace(self.placement, master_addr=address, master_port=port)
        os.environ.update(self.placement.variables())


def _import_without_compiler() -> None:
    """Import the modules that call torch.compile at import, with torch.compile disabled.

    torch.compile would import inductor, which takes 1.1 of the 4.6 CPU seconds of all imports of a
    rank (bitsandbytes 0.50.2, deepspeed 0.19.8, torch 2.13.0; 2026-11-29). No run needs the
    compiled functions: they are for devices of other vendors and for an optimizer that is not used
    here. They also work uncompiled.
    """
    original_value = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        for module in ("bitsandbytes", "deepspeed.runtime.zero.muon.original_muon"):
            with suppress(ImportError):  # a later import of the same module reports the error
                import_module(module)
    finally:
        if original_value is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = original_value


def use_only_gpu(accelerator: Any) -> None:
    """Let DeepSpeed use the only visible GPU, which has index 0 whatever the local rank is.

    DeepSpeed 0.19.8 takes the local rank as the index (runtime/engine.py:1943).
    """
    import torch

    accelerator.set_device = lambda index: torch.cuda.set_device(0)
    accelerator.device_name = lambda index=None: "cuda" if index is None else "cuda:0"


def _wait_for(store: Any, key: str) -> None:
    """Wait for a key without a time-out. Raises torch's DistNetworkError if the store has ended."""
    import torch.distributed as dist

    while True:
        try:
            store.wait([key], _ONE_WAIT_TIMEOUT)
        except dist.DistStoreError:  # a time-out; if the store has ended, `check` raises
            if not store.check([key]):
                continue
        return
