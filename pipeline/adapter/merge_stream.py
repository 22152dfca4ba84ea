"""MergeStream: read, merge and write the tensors of a shard (a safetensors file) at the same time.

Tensors are held in two buffers, each as large as the largest tensor. While the tensor in one buffer
is merged, that in the other is written, and then this buffer is filled with the next tensor. Apart
from the buffers, only the adapter's tensors of one layer and blocks of a few MiB are in memory.
"""

import json
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import torch

from pipeline.adapter.adapter_file import LayerUpdate
from pipeline.adapter.merge_inputs import Change
from pipeline.adapter.merge_layer import Arithmetic, LoadedChange, require_finite
from pipeline.cluster.progress import Work
from pipeline.errors import RankZeroError
from pipeline.files import atomic_file
from pipeline.model.base import Quantisation
from pipeline.model.quantised_checkpoint import read_tensor
from pipeline.model.quantised_files import QuantisedEntry
from pipeline.model.tensor_files import VALUE_BYTES, Entry, TensorFile

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK_BYTES = 2**24
# Number of adapter tensors in the cache: A and B of two fused parameters, such as those of the up
# and down projections. A base may store the experts one after another, and for each expert the
# adapter tensors of both parameters are needed.
_NUM_CACHED_TENSORS = 4


@dataclass(frozen=True, kw_only=True)
class TensorTask:
    """One tensor of a merged model.

    `entry`: the tensor of the base. `dtype`: dtype in the merged model. `added_rows`: number of
    rows of new tokens, which follow the rows of the base. `quantised`: None if training did not
    quantise the tensor; "transposed" if training quantised its transpose, else "stored".
    """

    entry: Entry
    dtype: str
    changes: tuple[Change, ...] = ()
    added_rows: int = 0
    quantised: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the merged model."""
        shape = self.entry.shape
        return (shape[0] + self.added_rows, *shape[1:]) if self.added_rows else shape

    @property
    def num_bytes(self) -> int:
        """Size in the merged model."""
        if self.dtype == self.entry.dtype and not self.added_rows:
            return self.entry.end - self.entry.start
        return VALUE_BYTES[self.dtype] * math.prod(self.shape)

    @property
    def is_resized(self) -> bool:
        """Whether its dtype or shape differs from that in the base."""
        return self.dtype != self.entry.dtype or self.added_rows > 0


@dataclass(frozen=True)
class ShardTask:
    """One shard of a merged model.

    `source`: the shard of the base. `tensors`: name -> task, in the order of the source.
    """

    source: TensorFile
    tensors: Mapping[str, TensorTask]

    @property
    def num_bytes(self) -> int:
        """Size of the merged file."""
        return len(self.header) + sum(task.num_bytes for task in self.tensors.values())

    @cached_property
    def header(self) -> bytes:
        """The header of the merged shard: that of the source with new dtypes, shapes and offsets.

        A safetensors header is the length of the JSON text in 8 bytes, and the text, which is
        padded to a multiple of 8 bytes.
        """
        if not any(task.is_resized for task in self.tensors.values()):
            return self.source.header
        header, start = json.loads(self.source.header[8:]), 0
        for name, task in self.tensors.items():
            end = start + task.num_bytes
            header[name] |= {
                "dtype": task.dtype, "shape": task.shape, "data_offsets": [start, end],
            }  # fmt: skip
            start = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class MergeStream:
    """The buffers and the arithmetic of a merge.

    `largest_bytes`: size of the largest tensor. `work`: its progress advances by written bytes.
    `quantisation`: how training quantised the base, if this is to be repeated before the merge.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        largest_bytes: int,
        work: Work,
        quantisation: Quantisation | None = None,
    ) -> None:
        self._arithmetic, self._work = arithmetic, work
        self._quantisation = quantisation
        self._buffers = [torch.empty(largest_bytes, dtype=torch.uint8) for _ in range(2)]
        self._read_adapter_tensor = lru_cache(_NUM_CACHED_TENSORS)(_read_adapter_tensor)

    def merge_shard(self, shard: ShardTask, target: Path) -> dict[str, float]:
        """Write a merged shard; returns name -> relative change of each adapted tensor.

        The file `target` appears when it is complete and synced to the disk.
        """
        changes: dict[str, float] = {}
        tasks = list(shard.tensors.items())
        with (
            atomic_file(target, is_durable=True) as temporary,
            shard.source.path.open("rb") as source,
            temporary.open("wb") as merged,
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as writer,
        ):
            merged.write(shard.header)
            # For each buffer the last write of its tensor. Tensor i uses buffer i % 2.
            writes: list[Future[None] | None] = [None, None]

            def load(index: int) -> torch.Tensor:
                if (earlier_write := writes[index % 2]) is not None:
                    earlier_write.result()  # waits until the buffer is free
                return _read(source, tasks[index][1], self._buffers[index % 2])

            next_tensor = reader.submit(load, 0) if tasks else None
            for index, (name, task) in enumerate(tasks):
                assert next_tensor is not None
                tensor = next_tensor.result()
                next_tensor = reader.submit(load, index + 1) if index + 1 < len(tasks) else None
                changes |= self._merge(name, task, tensor)
                writes[index % 2] = writer.submit(self._write, merged, tensor)
            for write in writes:
                if write is not None:
                    write.result()
        return changes

    def _merge(self, name: str, task: TensorTask, tensor: torch.Tensor) -> dict[str, float]:
        """Merge a tensor in place; returns {name: relative change}, or {} without adapters."""
        if task.quantised is not None:
            assert self._quantisation is not None
            weight = tensor.T.contiguous() if task.quantised == "transposed" else tensor
            self._quantisation.round_trip(weight, self._arithmetic.pool.map)
            if weight is not tensor:
                tensor.copy_(weight.T)
        if task.changes:
            loaded = [self._load_change(change) for change in task.changes]
            return {name: self._arithmetic.merge(name, tensor, loaded)}
        if task.dtype == "F16" and task.entry.dtype != "F16":  # fp16 has a smaller range
            require_finite(name, tensor)
        return {}

    def _load_change(self, change: Change) -> LoadedChange:
        """Read the adapter's tensors of a change."""
        update = change.update
        entries = update.tensors if isinstance(update, LayerUpdate) else {"values": update.values}
        tensors = {
            key: self._read_adapter_tensor(change.file, entry) for key, entry in entries.items()
        }
        return LoadedChange(change=change, tensors=tensors)

    def _write(self, file: BinaryIO, tensor: torch.Tensor) -> None:
        """Write the bytes of a tensor, and advance the progress."""
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self._work.advance(tensor.nbytes)


def _read_adapter_tensor(path: Path, entry: Entry) -> torch.Tensor:
    """A tensor of an adapter in fp32, the dtype in which peft loads it."""
    with path.open("rb") as file:
        return _read(file, TensorTask(entry=entry, dtype="F32"))


def _read(file: BinaryIO, task: TensorTask, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor of the base into a buffer, in its new dtype; added rows are zero.

    A tensor whose dtype changes is read in chunks, so that it is never in memory in both dtypes. If
    the dtype is not one of TORCH_DTYPES, the result has bytes (uint8).
    """
    entry, size = task.entry, task.num_bytes
    if buffer is None:
        buffer = torch.empty(size, dtype=torch.uint8)
    data = buffer[:size]
    if isinstance(entry, QuantisedEntry):
        tensor = data.view(TORCH_DTYPES[task.dtype]).view(entry.shape)
        return tensor.copy_(read_tensor(entry.values.path, entry.values.name, entry))
    file.seek(entry.start)
    if task.dtype == entry.dtype:
        num_bytes = entry.end - entry.start  # of the base
        _read_bytes(file, data[:num_bytes])
        data[num_bytes:] = 0
        dtype = TORCH_DTYPES.get(entry.dtype)
        return data if dtype is None else data.view(dtype).view(task.shape)
    tensor = data.view(TORCH_DTYPES[task.dtype])
    num_values = math.prod(entry.shape)  # of the base
    tensor[num_values:] = 0
    for target in tensor[:num_values].split(_CHUNK_BYTES // VALUE_BYTES[entry.dtype]):  # type: ignore[no-untyped-call]
        chunk = torch.empty(len(target), dtype=TORCH_DTYPES[entry.dtype])
        _read_bytes(file, chunk.view(torch.uint8))
        target.copy_(chunk)
    return tensor.view(task.shape)


def _read_bytes(file: BinaryIO, data: torch.Tensor) -> None:
    """Fill a uint8 tensor with the next bytes of a file. Raises RankZeroError at its end."""
    view = data.numpy().data
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise RankZeroError(f"{file.name}: the file was truncated while it was read")
        view = view[count:]
