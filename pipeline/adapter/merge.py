"""Merging of an adapter into its base, with one tensor at a time in memory.

The header of each shard and all tensors without an adapter are copied byte by byte, so that index,
tied embeddings and metadata stay valid. torch is imported only after all inputs have been checked.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.adapter.merge_inputs import (
    CHAT_TEMPLATE,
    Adapter,
    Base,
    LayerUpdate,
    read_adapter,
    read_base,
    require_compatible,
    with_stored_names,
)
from pipeline.adapter.trained_on import adapter_sha256
from pipeline.errors import RankZeroError, UserError
from pipeline.files import atomic_folder, dump_json, read_json
from pipeline.model.tensor_files import INDEX, SINGLE, Entry, TensorFile, read_header

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# File with the record of a merge. A folder with this file may be replaced by another merge.
MARKER = "rankzero_merge.json"
_CHUNK_BYTES = 2**24
_CACHED_PARTS = 4  # A and B of two fused tensors, whose experts are stored one after another
# Suffixes of files with weights. Weights in other formats are not copied, because they are not
# merged.
_NOT_COPIED = {
    ".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".tflite", ".npz",
}  # fmt: skip
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of a merge.

    `largest_change`: largest |W' - W| / |W| in Frobenius norms, of the weight `most_changed`.
    """

    shards: int
    tensors_merged: int
    num_bytes: int
    largest_change: float
    most_changed: str
    seconds: float


def merge_adapter(base: Path, adapter: Path, out: Path) -> MergeReport:
    """Write the sum of base and adapter as a model folder, in the dtype of the base.

    Raises UserError if base and adapter are not compatible, before anything is written. Raises
    RankZeroError if a merged weight is not finite; an earlier folder `out` then stays unchanged.
    """
    start = time.perf_counter()
    model = read_base(base)
    lora = with_stored_names(model, read_adapter(adapter))
    require_compatible(model, lora)
    _require_replaceable(out, base, adapter)
    others = _other_files(base)
    _require_space(out, model.num_bytes + sum(path.stat().st_size for path in others))
    try:
        with atomic_folder(out, lambda fresh: _require_same_layout(model, fresh)) as fresh:
            changes = _merge_shards(model, lora, fresh)
            for path in others:
                target = fresh / path.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            if (adapter / CHAT_TEMPLATE).is_file():  # the template used in training
                shutil.copyfile(adapter / CHAT_TEMPLATE, fresh / CHAT_TEMPLATE)
            most_changed = max(changes, key=changes.__getitem__)
            report = MergeReport(
                shards=len(model.files),
                tensors_merged=len(changes),
                num_bytes=model.num_bytes,
                largest_change=changes[most_changed],
                most_changed=most_changed,
                seconds=time.perf_counter() - start,
            )
            _write_marker(fresh, base, adapter, report)
    except OSError as error:
        raise RankZeroError(f"{out}: the merged model cannot be written: {error}") from error
    return report


def _merge_shards(base: Base, adapter: Adapter, folder: Path) -> dict[str, float]:
    changes: dict[str, float] = {}
    for number, shard in enumerate(base.files, 1):
        logger.info("shard %d of %d: %s", number, len(base.files), shard.path.name)
        changes |= _merge_shard(shard, adapter, folder / shard.path.name)
    return changes


def _merge_shard(shard: TensorFile, adapter: Adapter, target: Path) -> dict[str, float]:
    """Write a shard with the adapter added; returns the relative change of each adapted weight."""
    changes: dict[str, float] = {}
    with (
        shard.path.open("rb") as source,
        adapter.file.path.open("rb") as adapter_file,
        target.open("wb") as merged_file,
    ):
        read = lru_cache(_CACHED_PARTS)(lambda part: _read_tensor(adapter_file, part).float())
        merged_file.write(shard.header)
        for key, entry in shard.entries.items():
            if (update := adapter.updates.get(key)) is None:
                _copy_range(source, merged_file, entry)
                continue
            parts = {name: read(part) for name, part in update.parts.items()}
            merged, changes[key] = _merge_tensor(_read_tensor(source, entry), update, parts, key)
            merged_file.write(_bytes_of(merged))
    return changes


def _merge_tensor(
    weight: "torch.Tensor", update: LayerUpdate, parts: Mapping[str, "torch.Tensor"], key: str
) -> tuple["torch.Tensor", float]:
    """The merged weight, computed in fp32 and rounded once, and its relative change."""
    from pipeline.adapter.merge_layer import merge_layer

    before = weight.float()
    after = merge_layer(before, update, parts)
    change = (after - before).norm().item() / max(before.norm().item(), 1e-30)
    merged = after.to(weight.dtype)
    if not merged.isfinite().all():
        reason = "the base or the adapter is damaged"
        if after.isfinite().all():
            reason = f"it is too large for {weight.dtype}; merge into a bfloat16 base"
        raise RankZeroError(f"{key}: the merged weight is not finite: {reason}")
    return merged, change


def _read_tensor(file: BinaryIO, entry: Entry) -> "torch.Tensor":
    import torch

    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry.dtype]
    file.seek(entry.start)
    data = bytearray(entry.end - entry.start)
    file.readinto(data)  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data


def _copy_range(source: BinaryIO, target: BinaryIO, entry: Entry) -> None:
    source.seek(entry.start)
    remaining = entry.end - entry.start
    while remaining:
        chunk = source.read(min(remaining, _CHUNK_BYTES))
        if not chunk:
            raise RankZeroError(f"{source.name}: the file was truncated while it was read")
        target.write(chunk)
        remaining -= len(chunk)


def _require_same_layout(base: Base, fresh: Path) -> None:
    """Raise RankZeroError unless each written shard has the header and tensors of its source."""
    from safetensors import SafetensorError, safe_open

    for shard in base.files:
        path = fresh / shard.path.name
        try:
            if read_header(path).header != shard.header:
                raise RankZeroError(f"{path}: the header differs from that of {shard.path}")
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                kinds = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        except (OSError, SafetensorError, UserError) as error:
            raise RankZeroError(f"{path}: cannot be read back: {error}") from error
        if kinds != {key: (entry.dtype, entry.shape) for key, entry in shard.entries.items()}:
            raise RankZeroError(f"{path}: keys, dtypes or shapes differ from {shard.path}")


def _other_files(base: Path) -> list[Path]:
    """Files of the base that a merge copies: all except weights, hidden files and README."""
    files = [path for path in sorted(base.iterdir()) if path.is_file() and _is_copied(path)]
    for name in _FOLDERS:
        files += [path for path in sorted((base / name).glob("*")) if path.is_file()]
    if (base / SINGLE).is_file():
        return [path for path in files if path.name != INDEX]
    return files


def _is_copied(path: Path) -> bool:
    if path.name == MARKER or (path.name.endswith(".index.json") and path.name != INDEX):
        return False
    return path.suffix not in _NOT_COPIED and not path.name.startswith((".", "README"))


def _write_marker(fresh: Path, base: Path, adapter: Path, report: MergeReport) -> None:
    marker: dict[str, Any] = {
        "base": str(base),
        "adapter": str(adapter),
        "adapter_sha256": adapter_sha256(adapter),
        **vars(report),
        "files": [*_files_in(fresh), MARKER],
    }
    (fresh / MARKER).write_text(dump_json(marker), encoding="utf-8")


def _files_in(folder: Path) -> list[str]:
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]


def _require_replaceable(out: Path, base: Path, adapter: Path) -> None:
    """Raise UserError if writing to `out` would replace a file that no merge wrote.

    An `out` that contains the base or the adapter is refused too.
    """
    for folder in (base, adapter):
        if folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: writing there would replace {folder}; set another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        written = set(read_json(out / MARKER)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} exists and was not written by a merge; remove it or set another --out"
        ) from None
    if others := [name for name in _files_in(out) if name not in written]:
        raise UserError(
            f"{out} has a file that no merge wrote, {others[0]}; move it or set another --out"
        )


def _require_space(out: Path, need: int) -> None:
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"{parent}: the merged model needs {need / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free; free some space or set another --out"
        )
