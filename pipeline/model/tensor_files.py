"""Headers of safetensors files: names, dtypes, shapes and offsets of tensors. No torch.

A file consists of the header's length (8 bytes), a JSON header and the concatenated tensors:
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import read_json

# A model folder has one weight file, SINGLE, or an INDEX of several.
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
VALUE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_GIT_LFS = b"version "  # the first 8 bytes of the pointer to a file that Git LFS has not fetched
_MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation


@dataclass(frozen=True)
class Entry:
    """Header entry of one tensor. `start`, `end`: byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file; entries are sorted by their offsets."""

    path: Path
    header: bytes  # including the eight bytes that hold its length
    entries: Mapping[str, Entry]


def weight_files(folder: Path, setting: str = "model") -> list[Path]:
    """The safetensors files of a model folder that transformers loads.

    Raises UserError if there are none or some are missing; `setting` is the setting that the
    message names.
    """
    if (folder / SINGLE).is_file():  # takes precedence over the index, as in transformers
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        remedy = (
            f"{pickled[0]} is not read, because it may run code: load the model with "
            "AutoModelForCausalLM.from_pretrained, and write it with save_pretrained"
            if pickled
            else "download the model again"
        )
        raise UserError(
            f"{setting}: {folder} has no weights: neither {SINGLE} nor {INDEX}; {remedy}"
        )
    names = sorted(set(read_weight_map(folder, setting).values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(
            f"{setting}: {folder / INDEX} names {outside[0]!r}, which is outside the model folder; "
            "download the model again"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{setting}: {folder}: {len(missing)} of {len(names)} weight files are missing, the "
            f"first is {missing[0]}; download the model again"
        )
    return [folder / name for name in names]


def read_weight_map(folder: Path, setting: str = "model") -> dict[str, str]:
    """Tensor name -> file name, from the index of a model folder.

    Raises UserError if the index cannot be read.
    """
    path = folder / INDEX
    try:
        weight_map = read_json(path)["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{setting}: {path}: the index cannot be read: {error!r}") from None


def read_header(path: Path) -> TensorFile:
    """Read and check a safetensors header. Raises UserError for a damaged or incomplete file."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == _GIT_LFS:
                raise ValueError("it is a pointer of Git LFS; run `git lfs pull` in its folder")
            length = int.from_bytes(prefix, "little")
            text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
        header = json.loads(text)
        header.pop("__metadata__", None)
        data_start = 8 + length
        entries = {
            key: Entry(value["dtype"], tuple(value["shape"]), data_start + start, data_start + end)
            for key, value in header.items()
            for start, end in [value["data_offsets"]]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error!r}") from None
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = data_start
    for key, entry in entries.items():
        if entry.start != end:
            raise UserError(f"{path}: there are gaps between its tensors; download it again")
        end = entry.end
        size = VALUE_BYTES.get(entry.dtype)
        if size and size * math.prod(entry.shape) != end - entry.start:
            raise UserError(f"{path}: the size of {key} does not match its dtype and shape")
    if (size := path.stat().st_size) != end:
        raise UserError(
            f"{path}: has {size} bytes, but {end} according to its header; download it again"
        )
    return TensorFile(path, prefix + text, entries)
