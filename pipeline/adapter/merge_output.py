"""Folder of a merged model: the files beside its weights, the record of the merge, and checks."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapter.merge_plan import MergePlan
from pipeline.errors import RankZeroError, UserError
from pipeline.files import closest_existing, dump_json, read_json
from pipeline.model.packed_files import is_packed
from pipeline.model.tensor_files import INDEX, SINGLE, read_header

if TYPE_CHECKING:
    from pipeline.adapter.merge import MergeReport

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    CHAT_TEMPLATE,
    "chat_template.json",
    "additional_chat_templates",
)
# File with the record of a merge. A folder with this file may be replaced by another merge.
MARKER = "rankzero_merge.json"
# Suffixes of files with weights. Weights in other formats are not copied, because they are not
# merged.
_NOT_COPIED = {
    ".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".tflite", ".npz",
}  # fmt: skip
_FOLDERS = ("additional_chat_templates",)
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def other_files(base: Path) -> list[Path]:
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


def copy_other_files(plan: MergePlan, folder: Path) -> None:
    """Copy the files beside the weights; dtype and vocabulary size are changed if they differ.

    The quantisation of a packed base is removed from its config.json.
    The chat template is that of the last adapter that has one: the one used in training.
    """
    for path in other_files(plan.base.folder):
        target = folder / path.relative_to(plan.base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    for adapter in plan.adapters:
        # An adapter with new tokens has its own tokenizer.
        names = TOKENIZER_FILES if adapter.has_token_rows else (CHAT_TEMPLATE,)
        copy_files(adapter.folder, folder, names)
    tasks = [task for shard in plan.shards for task in shard.tensors.values()]
    is_unpacked = is_packed(plan.base.folder)
    is_converted = plan.options.dtype is not None or is_unpacked
    if not is_converted and not any(task.added_rows for task in tasks):
        return
    config = read_json(folder / "config.json")
    if is_converted:
        _set_dtype(config, _DTYPE_NAMES[plan.options.dtype or "BF16"])
    if is_unpacked:
        for each in (config, config.get("text_config") or {}):
            each.pop("quantization_config", None)
    for task in tasks:
        if task.added_rows:
            _set_vocab_size(config, task.entry.shape[0], task.shape[0])
    (folder / "config.json").write_text(dump_json(config), encoding="utf-8")
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        index.setdefault("metadata", {})["total_size"] = sum(task.num_bytes for task in tasks)
        index["weight_map"] = {
            name: shard.source.path.name for shard in plan.shards for name in shard.tensors
        }
        (folder / INDEX).write_text(dump_json(index), encoding="utf-8")


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy the files and folders with these names that exist; they replace earlier ones."""
    for path in (source / name for name in names):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)


def _set_vocab_size(config: dict[str, Any], old: int, new: int) -> None:
    """Set the size of the vocabulary in a configuration and in those inside it."""
    if config.get("vocab_size") == old:
        config["vocab_size"] = new
    for value in config.values():
        if isinstance(value, dict):
            _set_vocab_size(value, old, new)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Set the dtype in a configuration and in those inside it (text and vision)."""
    is_old = "torch_dtype" in config and "dtype" not in config
    if config.get("model_type") is not None or "dtype" in config or is_old:
        config["torch_dtype" if is_old else "dtype"] = name
    for value in config.values():
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys():
            _set_dtype(value, name)


def write_marker(plan: MergePlan, folder: Path, report: "MergeReport") -> None:
    """Write the record of the merge.

    `adapter_sha256` in it: hash of the adapter, if the merge added one adapter without a weight.
    """
    adapters = plan.identity["adapters"]
    is_plain = len(adapters) == 1 and adapters[0]["weight"] == 1 and not plan.options.is_undone
    marker: dict[str, Any] = {
        **plan.identity,
        "adapter_sha256": adapters[0]["sha256"] if is_plain else "several, weighted or undone",
        **vars(report),
        "files": [*_files(folder), MARKER],
    }
    (folder / MARKER).write_text(dump_json(marker), encoding="utf-8")


def check_output(plan: MergePlan, folder: Path) -> None:
    """Raise RankZeroError unless each written shard has the planned header and tensors."""
    from safetensors import SafetensorError, safe_open

    for shard in plan.shards:
        path = folder / shard.source.path.name
        try:
            if read_header(path).header != shard.header:
                raise RankZeroError(f"{path}: the header differs from that of {shard.source.path}")
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                kinds = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        except (OSError, SafetensorError, UserError) as error:
            raise RankZeroError(f"{path}: cannot be read back: {error}") from error
        if kinds != {name: (task.dtype, task.shape) for name, task in shard.tensors.items()}:
            raise RankZeroError(f"{path}: names, dtypes or shapes differ from the planned ones")


def _files(folder: Path) -> list[str]:
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]


def require_replaceable(out: Path, inputs: Sequence[Path]) -> None:
    """Raise UserError if `out` has files that were not written by a merge; they are never replaced.

    `out` may also not contain the base or an adapter.
    """
    for folder in inputs:
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
    if others := [name for name in _files(out) if name not in written]:
        raise UserError(
            f"{out} has a file that no merge wrote, {others[0]}; move it or set another --out"
        )


def require_space(out: Path, need: int) -> None:
    """Raise UserError unless the disk of `out` has room for `need` bytes."""
    parent = closest_existing(out.resolve().parent)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"{parent}: the merged model needs {need / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free; free some space or set another --out"
        )
