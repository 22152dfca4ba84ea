"""Merge an adapter into its base, one tensor in memory at a time.

Header, tensor order, dtypes and all unadapted bytes of a shard are copied, so that index, tied
embeddings and metadata stay valid. torch is imported only after all inputs have been checked.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
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

MARKER = "rankzero_merge.json"  # what was merged; also marks the folder as replaceable
_CHUNK_BYTES = 2**24
# Weights in other formats, which would still be those of the base.
_NOT_COPIED = {
    ".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".tflite", ".npz",
}  # fmt: skip
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of a merge. The change of a weight is |W' - W| / |W|, in Frobenius norms."""

    shards: int
    tensors_merged: int
    num_bytes: int
    largest_change: float
    most_changed: str
    seconds: float


def merge_adapter(base: Path, adapter: Path, out: Path) -> MergeReport:
    """Write base + adapter as an ordinary model folder in the dtype of the base.

    Raises UserError, before anything is written, where base and adapter are not compatible, and
    RankZeroError where a merged weight is not finite; an earlier `out` is then unchanged.
    """
    start = time.perf_counter()
    model = read_base(base)
    lora = with_stored_names(model, read_adapter(adapter))
    require_compatible(model, lora)
    _require_replaceable(out, base, adapter)
    others = _other_files(base)
    _require_space(out, model.num_bytes + sum(path.stat().st_size for path in others))
    try:
        with atomic_folder(out, lambda fresh: _check(model, fresh)) as fresh:
            changes = _merge_shards(model, lora, fresh)
            for path in others:
                target = fresh / path.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            if (adapter / CHAT_TEMPLATE).is_file():  # the one used in training
                shutil.copyfile(adapter / CHAT_TEMPLATE, fresh / CHAT_TEMPLATE)
            most = max(changes, key=changes.__getitem__)
            report = MergeReport(
                shards=len(model.files),
                tensors_merged=len(changes),
                num_bytes=model.num_bytes,
                largest_change=changes[most],
                most_changed=most,
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
    """Copy a shard and add the adapter to its targets; returns the change of each."""
    changes: dict[str, float] = {}
    with (
        shard.path.open("rb") as source,
        adapter.file.path.open("rb") as lora,
        target.open("wb") as sink,
    ):
        sink.write(shard.header)
        for key, entry in shard.entries.items():
            if (update := adapter.updates.get(key)) is None:
                _copy_range(source, sink, entry)
                continue
            parts = {name: _read(lora, part).float() for name, part in update.parts.items()}
            merged, changes[key] = _merge_tensor(_read(source, entry), update, parts, key)
            sink.write(_bytes(merged))
    return changes


def _merge_tensor(
    weight: "torch.Tensor", update: LayerUpdate, parts: Mapping[str, "torch.Tensor"], key: str
) -> tuple["torch.Tensor", float]:
    """Merge in fp32 and round once to the dtype of the weight; returns the relative change too."""
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


def _read(file: BinaryIO, entry: Entry) -> "torch.Tensor":
    import torch

    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry.dtype]
    file.seek(entry.start)
    data = bytearray(entry.end - entry.start)
    file.readinto(data)  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def _bytes(tensor: "torch.Tensor") -> memoryview:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data


def _copy_range(source: BinaryIO, sink: BinaryIO, entry: Entry) -> None:
    source.seek(entry.start)
    remaining = entry.end - entry.start
    while remaining:
        chunk = source.read(min(remaining, _CHUNK_BYTES))
        if not chunk:
            raise RankZeroError(f"{source.name}: truncated while it was read")
        sink.write(chunk)
        remaining -= len(chunk)


def _check(base: Base, fresh: Path) -> None:
    """Read every shard back: header, keys, dtypes and shapes must be those of the base."""
    from safetensors import SafetensorError, safe_open

    for shard in base.files:
        path = fresh / shard.path.name
        try:
            if read_header(path).header != shard.header:
                raise RankZeroError(f"{path}: the header is not that of {shard.path}")
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                kinds = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        except (OSError, SafetensorError, UserError) as error:
            raise RankZeroError(f"{path}: cannot be read back: {error}") from error
        if kinds != {key: (entry.dtype, entry.shape) for key, entry in shard.entries.items()}:
            raise RankZeroError(f"{path}: keys, dtypes or shapes are not those of {shard.path}")


def _other_files(base: Path) -> list[Path]:
    """Files of the base to copy: everything but weights and README."""
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
        "files": [*_files(fresh), MARKER],
    }
    (fresh / MARKER).write_text(dump_json(marker), encoding="utf-8")


def _files(folder: Path) -> list[str]:
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]


def _require_replaceable(out: Path, base: Path, adapter: Path) -> None:
    """Raise UserError for a folder that was not written by a merge: it is never replaced."""
    for folder in (base, adapter):
        if folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: writing there would replace {folder}; give another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = set(read_json(out / MARKER)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} exists and was not written by a merge; remove it or give another --out"
        ) from None
    if foreign := [name for name in _files(out) if name not in ours]:
        raise UserError(
            f"{out} holds {foreign[0]}, which no merge wrote; move it or give another --out"
        )


def _require_space(out: Path, need: int) -> None:
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"{parent}: the merged model needs {need / 2**30:.1f} GiB and {free / 2**30:.1f} "
            "are free; free some space or give another --out"
        )
