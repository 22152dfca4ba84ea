"""Checkpoints with random weights in mxfp4 or fp8, as some models are published."""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.model.kinds import QUANTISED_CHECKPOINTS
from tests.model.models import build

# Rows and columns of a block, which has one scale. The shapes of some weights are not multiples of
# it, so their last blocks are smaller.
FP8_BLOCK = (48, 32)


def make_quantised_checkpoint(name, folder, *, block=FP8_BLOCK, scale_dtype=torch.float32):
    """Save the model `name` of QUANTISED_CHECKPOINTS as a quantised checkpoint with two files."""
    build(QUANTISED_CHECKPOINTS[name], torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    if name.endswith("mxfp4"):
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        quantised = _mxfp4(tensors, generator)
    else:
        quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
        quantised = _fp8(tensors, block, scale_dtype)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    _save(quantised, folder)
    return folder


def _mxfp4(tensors, generator):
    quantised = {}
    for key, tensor in tensors.items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            quantised[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        integers = {"generator": generator, "dtype": torch.uint8}
        quantised[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), **integers)
        quantised[f"{key}_scales"] = torch.randint(121, 126, shape, **integers)
    return quantised


def _fp8(tensors, block, scale_dtype):
    quantised = {}
    for key, tensor in tensors.items():
        if tensor.dim() != 2 or not key.endswith("_proj.weight"):
            quantised[key] = tensor
            continue
        block_rows, block_columns = (
            -(-size // block_size) for size, block_size in zip(tensor.shape, block, strict=True)
        )
        exponents = torch.arange(-3, block_rows * block_columns - 3).remainder(4)
        scales = 2.0 ** exponents.view(block_rows, block_columns)
        quantised[key] = (tensor * 8).to(torch.float8_e4m3fn)
        quantised[f"{key}_scale_inv"] = (scales / 16).to(scale_dtype)
    return quantised


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
