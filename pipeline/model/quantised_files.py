"""Checkpoints in mxfp4 or fp8, read as if they were 16-bit checkpoints. No torch.

Such a checkpoint is called quantised here: it stores some weights in 4 or 8 bits, each with a
tensor of scales. In this module a quantised weight is one entry in bf16, under its name in the
model's class. quantised_checkpoint.py computes its values.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.model.tensor_files import Entry, TensorFile, read_header, weight_files
from pipeline.plan.given.shape import DEQUANTISED, quantization_of

# Quantisation method -> class of the config with which plain transformers dequantises a checkpoint.
_CONFIG_CLASSES = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
_BLOCKS, _SCALES = "_blocks", "_scales"  # ends of the names of an mxfp4 weight
_MXFP4_BLOCK = 32  # values that have one scale together
_FP8 = ("F8_E4M3", "F8_E5M2")  # dtypes in safetensors files
# Names of an fp8 weight's scales: the weight's name with the first text at its end replaced by the
# second. For example, `q_proj.weight` may have `q_proj.weight_scale_inv` or `q_proj.scale`.
_FP8_SCALES = (("", "_scale_inv"), ("", "_scale"), ("weight", "scale"), ("weight", "qscale_weight"))
# Scales of activations, which a 16-bit model does not have.
_ACTIVATION_SCALES = ("activation_scale", "input_scale", "qscale_act")
# Ends of the names of tensors that belong to quantised weights.
_QUANTISED_ENDS = (_BLOCKS, _SCALES, "_scale_inv", ".weight_scale", ".qscale_weight")
_FP8_BLOCK = (128, 128)  # rows and columns of a block with one scale, by default


@dataclass(frozen=True)
class Part:
    """A stored tensor: its file, its name and its header entry."""

    path: Path
    name: str
    entry: Entry


@dataclass(frozen=True)
class QuantisedEntry(Entry):
    """A weight in bf16 that is stored as quantised values with scales.

    `start`, `end`: 0 and the size in bytes of the weight in bf16. `block`: rows and
    columns of a block of an fp8 weight, which has one scale; None for mxfp4.
    """

    values: Part
    scales: Part
    block: tuple[int, int] | None = None


def is_dequantised(folder: Path) -> bool:
    """Whether the weights of a model folder are dequantised while they are loaded."""
    return _quantization(folder)[0] in DEQUANTISED


def dequantising_config(folder: Path) -> str:
    """Class of the config with which transformers dequantises a base; empty if it has 16 bits."""
    return _CONFIG_CLASSES.get(_quantization(folder)[0] or "", "")


def _quantization(folder: Path) -> tuple[str | None, Mapping[str, Any]]:
    """Method (None if there is none) and options of the quantisation, from config.json."""
    try:
        return quantization_of(read_json(folder / "config.json"))
    except (OSError, ValueError):
        return None, {}


def checkpoint_files(folder: Path, setting: str = "model") -> tuple[TensorFile, ...]:
    """The weight files of a model folder, with quantised weights as entries in bf16.

    Such an entry belongs to the file that has the weight's quantised values. `setting`: the
    setting that error messages name. Raises UserError if values or scales of a quantised weight
    are missing or do not fit.
    """
    files = tuple(read_header(path) for path in weight_files(folder, setting))
    method, options = _quantization(folder)
    if method not in DEQUANTISED:
        return files
    parts = {
        name: Part(file.path, name, entry) for file in files for name, entry in file.entries.items()
    }
    try:
        quantised = _mxfp4(parts) if method == "mxfp4" else _fp8(parts, options)
    except KeyError as error:
        raise UserError(
            f"{setting}: {folder} is quantised ({method}), and lacks the tensor {error} of a "
            "quantised weight; download the model again"
        ) from None
    hidden = {part.name for entry in quantised.values() for part in (entry.values, entry.scales)}
    hidden |= {name for name in parts if name.endswith(_ACTIVATION_SCALES)}
    if unused := [name for name in parts if name.endswith(_QUANTISED_ENDS) and name not in hidden]:
        raise UserError(
            f"{setting}: {folder} is quantised ({method}), and {unused[0]} belongs to a weight in "
            "a format that is not dequantised here; use the 16-bit model"
        )
    return tuple(_in_16_bits(file, quantised, hidden) for file in files)


def _mxfp4(parts: Mapping[str, Part]) -> dict[str, QuantisedEntry]:
    """The mxfp4 weights by name: fused experts of gpt-oss.

    A weight is (experts, inputs, outputs). Its quantised values are (experts, outputs, blocks,
    bytes).
    """
    quantised = {}
    for name, values in parts.items():
        if not name.endswith(_BLOCKS):
            continue
        weight_name = name.removesuffix(_BLOCKS)
        scales = parts[f"{weight_name}{_SCALES}"]
        stored = values.entry.shape
        if len(stored) != 4 or stored[3] != _MXFP4_BLOCK // 2 or scales.entry.shape != stored[:3]:
            raise _shape_error(
                values, scales, f"experts x outputs x blocks x {_MXFP4_BLOCK // 2} bytes"
            )
        shape = (stored[0], stored[2] * _MXFP4_BLOCK, stored[1])
        quantised[weight_name] = _entry(shape, values, scales)
    return quantised


def _shape_error(values: Part, scales: Part, expected: str) -> UserError:
    """The error for a quantised weight whose values or scales have unexpected shapes."""
    return UserError(
        f"model: {values.path}: {values.name} has shape {values.entry.shape}, and its scales have "
        f"{scales.entry.shape}, which do not fit {expected}"
    )


def _fp8(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> dict[str, QuantisedEntry]:
    """The fp8 weights by name, whose scales belong to blocks, to rows or to the whole weight."""
    quantised = {}
    for name, values in parts.items():
        if values.entry.dtype not in _FP8:
            continue
        names = [f"{name.removesuffix(end)}{scale}" for end, scale in _FP8_SCALES]
        scales = next((parts[each] for each in names if each in parts), None)
        if scales is None:
            raise KeyError(names[0])
        block = _block(values, scales, quantization.get("weight_block_size") or _FP8_BLOCK)
        quantised[name] = _entry(values.entry.shape, values, scales, block)
    return quantised


def _block(values: Part, scales: Part, size: Any) -> tuple[int, int]:
    """Rows and columns of a block with one scale; the last blocks may be smaller.

    `size`: rows and columns of a block according to config.json, or a value of another type.
    """
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    if not is_pair or not all(isinstance(length, int) and length > 0 for length in size):
        raise UserError(
            f"model: {values.path.parent / 'config.json'}: weight_block_size is {size!r}, but must "
            "be two positive integers; download the model again"
        )
    shape, grid = values.entry.shape, scales.entry.shape
    if math.prod(grid) == 1:
        return shape[-2], shape[-1]
    expected = f"blocks of {tuple(size)} (weight_block_size in config.json)"
    if len(grid) != len(shape):
        raise _shape_error(values, scales, expected)
    block = list(size)
    for axis in (0, 1):
        length, num_scales = shape[-2:][axis], grid[-2:][axis]
        if num_scales == 1:
            block[axis] = length
        elif num_scales == length:
            block[axis] = 1
    rows, columns = block
    expected_grid = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    if grid != expected_grid:
        raise _shape_error(values, scales, expected)
    return rows, columns


def _entry(
    shape: tuple[int, ...], values: Part, scales: Part, block: tuple[int, int] | None = None
) -> QuantisedEntry:
    """The entry of a quantised weight; `shape`: of the weight in bf16."""
    return QuantisedEntry("BF16", shape, 0, 2 * math.prod(shape), values, scales, block)


def _in_16_bits(
    file: TensorFile, quantised: Mapping[str, QuantisedEntry], hidden: set[str]
) -> TensorFile:
    """The file as a 16-bit checkpoint would have it, without the tensors `hidden`."""
    weight_names = {entry.values.name: name for name, entry in quantised.items()}
    entries: dict[str, Entry] = {}
    for name, entry in file.entries.items():
        if (weight_name := weight_names.get(name)) is not None:
            entries[weight_name] = quantised[weight_name]
        elif name not in hidden:
            entries[name] = entry
    return TensorFile(file.path, _header(file, entries), entries)


def _header(file: TensorFile, entries: Mapping[str, Entry]) -> bytes:
    """The header of a file with these entries."""
    metadata = json.loads(file.header[8:]).get("__metadata__")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, entry in entries.items():
        offsets = [end, end := end + entry.end - entry.start]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
