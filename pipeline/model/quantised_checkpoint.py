"""Dequantisation of checkpoints in mxfp4 or fp8, tensor by tensor.

Such a checkpoint stores some weights in 4 or 8 bits with scales (quantised_files.py). A
CheckpointTensor is read from its file, and dequantised if it is quantised, whenever an operator
uses it, so that the weights of a model are never all in memory.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_map
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.model.quantised_files import Part, QuantisedEntry, checkpoint_files
from pipeline.model.tensor_files import Entry

_DTYPES = {  # names of dtypes in safetensors files
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensor(path: Path, name: str, entry: Entry) -> torch.Tensor:
    """A tensor of a checkpoint, dequantised to bf16 if it is quantised."""
    if not isinstance(entry, QuantisedEntry):
        return _stored(Part(path, name, entry))
    values, scales = _stored(entry.values), _stored(entry.scales)
    if entry.block is None:
        dequantised: torch.Tensor = convert_moe_packed_tensors(values, scales)
        return dequantised
    return _dequantised_fp8(values, scales, entry.block)


def _stored(part: Part) -> torch.Tensor:
    """A tensor as it is stored in a file."""
    with safe_open(part.path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(part.name)
    return tensor


def _dequantised_fp8(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """The products of fp8 values and the scales of their blocks, in bf16.

    `values`: (..., rows, columns). `block`: rows and columns of a block that has one scale. The
    last dimensions of `scales` are a grid with one scale for each block. The products are computed
    in fp32, a matrix at a time. transformers 5.23 refuses matrices whose last block is smaller,
    which DeepSeek V3 has (integrations/finegrained_fp8.py).
    """
    rows, columns = values.shape[-2:]
    if scales.dtype == torch.uint8:  # exponents of powers of two, with an offset of 127
        scales = (scales.float() - 127).exp2()
    scales = scales.float()
    matrices = values.reshape(-1, rows, columns)
    grid_shape = scales.shape[-2:] if scales.numel() > 1 else (1, 1)
    grids = scales.reshape(-1, *grid_shape).expand(len(matrices), -1, -1)
    result = torch.empty(matrices.shape, dtype=torch.bfloat16)
    for matrix, grid, target in zip(matrices, grids, result, strict=True):
        by_row = grid.repeat_interleave(block[0], 0)[:rows]
        target.copy_(matrix.float() * by_row.repeat_interleave(block[1], 1)[:, :columns])
    return result.view(values.shape)


class CheckpointTensor(torch.Tensor):
    """A tensor of a checkpoint that is read whenever an operator uses it."""

    source: tuple[Path, str, Entry]

    def __new__(cls, path: Path, name: str, entry: Entry) -> "CheckpointTensor":
        """A tensor without storage, with the shape and dtype of its entry."""
        empty: Any = torch.Tensor._make_wrapper_subclass
        tensor: CheckpointTensor = empty(cls, entry.shape, dtype=_DTYPES[entry.dtype])
        tensor.source = (path, name, entry)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on the values of the tensors, which are read now."""
        args, kwargs = tree_map(_values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _values(argument: Any) -> Any:
    """The values, if an argument of an operator is a CheckpointTensor; else the argument."""
    if isinstance(argument, CheckpointTensor):
        return read_tensor(*argument.source)
    return argument


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder by their names, read when they are used."""
    return {
        name: CheckpointTensor(file.path, name, entry)
        for file in checkpoint_files(folder)
        for name, entry in file.entries.items()
    }
