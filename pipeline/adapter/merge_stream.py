"""Stream of a merge: read, merge and write the tensors of a shard at the same time.

Tensors are held in two buffers, each as large as the largest tensor. While one is merged, the other
is written and then filled with the next tensor. Apart from the buffers, only the adapter's tensors
of one layer and blocks of a few MiB are in memory.
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
from pipeline.model.packed import read_tensor
from pipeline.model.packed_files import PackedEntry
from pipeline.model.tensor_files import VALUE_BYTES, Entry, TensorFile

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK_BYTES = 2**24
# A and B of two fused tensors. A base may store the tensors of an expert together, one expert after
# another, so that the parts of both are needed for each expert.
_CACHED_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class TensorTask:
    """One tensor of a merged model.

    `dtype`: its dtype in the merged model. `added_rows`: rows of new tokens, which follow those of
    the base. `quantised`: the orientation in which training quantised the tensor: "stored" or
    "transposed"; None if it was not quantised.
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
        """Whether its size differs from that in the base."""
        return self.dtype != self.entry.dtype or self.added_rows > 0


@dataclass(frozen=True)
class ShardTask:
    """One shard of a merged model; `tensors` in the order of the source."""

    source: TensorFile
    tensors: Mapping[str, TensorTask]

    @property
    def num_bytes(self) -> int:
        """Size of the merged file."""
        return len(self.header) + sum(task.num_bytes for task in self.tensors.values())

    @cached_property
    def header(self) -> bytes:
        """The header of the merged shard: that of the source with other dtypes, shapes, offsets."""
        if not any(task.is_resized for task in self.tensors.values()):
            return self.source.header
        header, end = json.loads(self.source.header[8:]), 0
        for name, task in self.tensors.items():
            offsets = [end, end := end + task.num_bytes]
            header[name] |= {"dtype": task.dtype, "shape": task.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class MergeStream:
    """The buffers of a merge and its arithmetic; `largest`: bytes of the largest tensor."""

    def __init__(
        self,
        arithmetic: Arithmetic,
        largest: int,
        work: Work,
        quantisation: Quantisation | None = None,
    ) -> None:
        self._arithmetic, self._work = arithmetic, work
        self._quantisation = quantisation
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
        self._read_part = lru_cache(_CACHED_PARTS)(_read_part)

    def merge_shard(self, shard: ShardTask, target: Path) -> dict[str, float]:
        """Write a merged shard; returns the relative change of each adapted tensor.

        The file appears when it is complete and on the disk.
        """
        changes: dict[str, float] = {}
        tasks = list(shard.tensors.items())
        with (
            atomic_file(target, durable=True) as temporary,
            shard.source.path.open("rb") as source,
            temporary.open("wb") as merged,
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as writer,
        ):
            merged.write(shard.header)
            written: list[Future[None] | None] = [None, None]

            def load(index: int) -> torch.Tensor:
                if (earlier := written[index % 2]) is not None:
                    earlier.result()  # the buffer is free when its last tensor is written
                return _read(source, tasks[index][1], self._buffers[index % 2])

            loaded = reader.submit(load, 0) if tasks else None
            for index, (name, task) in enumerate(tasks):
                assert loaded is not None
                tensor = loaded.result()
                loaded = reader.submit(load, index + 1) if index + 1 < len(tasks) else None
                changes |= self._merge(name, task, tensor)
                written[index % 2] = writer.submit(self._write, merged, tensor)
            for last in written:
                if last is not None:
                    last.result()
        return changes

    def _merge(self, name: str, task: TensorTask, tensor: torch.Tensor) -> dict[str, float]:
        """Merge a tensor in place; returns its name and relative change, if adapters change it."""
        if task.quantised is not None:
            assert self._quantisation is not None
            weight = tensor.T.contiguous() if task.quantised == "transposed" else tensor
            self._quantisation.round_trip(weight, self._arithmetic.pool.map)
            if weight is not tensor:
                tensor.copy_(weight.T)
        if task.changes:
            loaded = [
                LoadedChange(change=change, parts=self._parts(change)) for change in task.changes
            ]
            return {name: self._arithmetic.merge(name, tensor, loaded)}
        if task.dtype == "F16" and task.entry.dtype != "F16":  # fp16 has a smaller range
            require_finite(name, tensor)
        return {}

    def _parts(self, change: Change) -> dict[str, torch.Tensor]:
        update = change.update
        parts = update.parts if isinstance(update, LayerUpdate) else {"values": update.part}
        return {part: self._read_part(change.file, entry) for part, entry in parts.items()}

    def _write(self, file: BinaryIO, tensor: torch.Tensor) -> None:
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self._work.advance(tensor.nbytes)


def _read_part(path: Path, entry: Entry) -> torch.Tensor:
    """A tensor of an adapter in fp32, the dtype in which peft loads it."""
    with path.open("rb") as file:
        return _read(file, TensorTask(entry=entry, dtype="F32"))


def _read(file: BinaryIO, task: TensorTask, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor in its new dtype; added rows are zero until they are merged.

    It is read in chunks, so that it is not held in two dtypes.
    """
    entry, size = task.entry, task.num_bytes
    if buffer is None:
        buffer = torch.empty(size, dtype=torch.uint8)
    data = buffer[:size]
    if isinstance(entry, PackedEntry):
        tensor = data.view(TORCH_DTYPES[task.dtype]).view(entry.shape)
        return tensor.copy_(read_tensor(entry.values.path, entry.values.name, entry))
    file.seek(entry.start)
    if task.dtype == entry.dtype:
        in_base = entry.end - entry.start
        _fill(file, data[:in_base])
        data[in_base:] = 0
        dtype = TORCH_DTYPES.get(entry.dtype)
        return data if dtype is None else data.view(dtype).view(task.shape)
    tensor = data.view(TORCH_DTYPES[task.dtype])
    in_base = math.prod(entry.shape)
    tensor[in_base:] = 0
    for part in tensor[:in_base].split(_CHUNK_BYTES // VALUE_BYTES[entry.dtype]):  # type: ignore[no-untyped-call]
        chunk = torch.empty(len(part), dtype=TORCH_DTYPES[entry.dtype])
        _fill(file, chunk.view(torch.uint8))
        part.copy_(chunk)
    return tensor.view(task.shape)


def _fill(file: BinaryIO, data: torch.Tensor) -> None:
    view = data.numpy().data
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise RankZeroError(f"{file.name}: the file was truncated while it was read")
        view = view[count:]
