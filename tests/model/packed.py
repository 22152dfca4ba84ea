"""Checkpoints with random weights that are quantised to mxfp4 or fp8, as published models are.

They are called packed: each quantised weight is stored with a tensor of scales.
"""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.model.kinds import PACKED_KINDS
from tests.model.models import build

# Rows and columns with a common scale. Not every weight is a multiple of it, so some blocks at the
# edges are smaller.
FP8_BLOCK = (48, 32)


def make_packed(name, folder, *, block=FP8_BLOCK, scale_dtype=torch.float32):
    """Save the model `name` of PACKED_KINDS as a quantised checkpoint with two files."""
    build(PACKED_KINDS[name], torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    if name.endswith("mxfp4"):
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        packed = _mxfp4(tensors, generator)
    else:
        quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
        packed = _fp8(tensors, block, scale_dtype)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    _save(packed, folder)
    return folder


def _mxfp4(tensors, generator):
    packed = {}
    for key, tensor in tensors.items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            packed[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        integers = {"generator": generator, "dtype": torch.uint8}
        packed[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), **integers)
        packed[f"{key}_scales"] = torch.randint(121, 126, shape, **integers)
    return packed


def _fp8(tensors, block, scale_dtype):
    packed = {}
    for key, tensor in tensors.items():
        if tensor.dim() != 2 or not key.endswith("_proj.weight"):
            packed[key] = tensor
            continue
        rows, columns = (-(-n // part) for n, part in zip(tensor.shape, block, strict=True))
        grid = 2.0 ** torch.arange(-3, rows * columns - 3).remainder(4).view(rows, columns)
        packed[key] = (tensor * 8).to(torch.float8_e4m3fn)
        packed[f"{key}_scale_inv"] = (grid / 16).to(scale_dtype)
    return packed


def _save(tensors, folder):
    """Save two files; the values and the scales of a weight may be in different files."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {key: t for i, (key, t) in enumerate(tensors.items()) if i % 2 == number}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
