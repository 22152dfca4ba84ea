"""Folder of a merged model: its files other than weights, the record of the merge, and checks."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapter.adapter_file import CONFIG
from pipeline.adapter.merge_plan import MergePlan
from pipeline.adapter.trained_on import TRAINED_ON
from pipeline.errors import RankZeroError, UserError
from pipeline.files import closest_existing, dump_json, read_json, read_json_or_empty
from pipeline.model.quantised_files import is_dequantised
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
# The files of TOKENIZER_FILES of which a tokenizer needs at least one.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# The files of TOKENIZER_FILES that take precedence over the template in tokenizer_config.json.
_TEMPLATE_FILES = (CHAT_TEMPLATE, "chat_template.json", "additional_chat_templates")
# File with the record of a merge. A folder with this file may be replaced by another merge.
MARKER = "rankzero_merge.json"
# Suffixes of files with weights in any format. The base's weights are not copied, because those in
# safetensors files are merged, and copies in other formats would still be the unmerged weights.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".tflite", ".npz",
}  # fmt: skip
_COPIED_FOLDERS = ("additional_chat_templates",)
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def other_files(base: Path) -> list[Path]:
    """Files of the base that a merge copies: all except weights, hidden files and README.

    Nor are the files of an adapter in the same folder copied: transformers would add the adapter to
    the merged model.
    """
    files = [path for path in sorted(base.iterdir()) if path.is_file() and _is_copied(path)]
    for name in _COPIED_FOLDERS:
        files += [path for path in sorted((base / name).glob("*")) if path.is_file()]
    if (base / SINGLE).is_file():  # transformers then ignores the index
        return [path for path in files if path.name != INDEX]
    return files


def _is_copied(path: Path) -> bool:
    """Whether a merge copies a file of the base, by its name."""
    is_index_of_other_format = path.name.endswith(".index.json") and path.name != INDEX
    if path.name in (MARKER, CONFIG, TRAINED_ON) or is_index_of_other_format:
        return False
    return path.suffix not in _WEIGHT_SUFFIXES and not path.name.startswith((".", "README"))


def copy_other_files(plan: MergePlan, folder: Path) -> None:
    """Copy the files other than weights, and adapt config.json and the index.

    config.json gets the new dtype and vocabulary size. If the base is stored in mxfp4 or fp8, its
    quantisation is removed from config.json, because the merged model is stored in 16 bits.
    Tokenizer and chat template are those of training: of the last adapter that has them.
    """
    for path in other_files(plan.base.folder):
        target = folder / path.relative_to(plan.base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    for adapter in plan.adapters:
        _copy_tokenizer(adapter.folder, folder)
    tasks = [task for shard in plan.shards for task in shard.tensors.values()]
    is_base_dequantised = is_dequantised(plan.base.folder)
    is_converted = plan.options.dtype is not None or is_base_dequantised
    if not is_converted and not any(task.added_rows for task in tasks):
        return
    config = read_json(folder / "config.json")
    if is_converted:
        _set_dtype(config, _DTYPE_NAMES[plan.options.dtype or "BF16"])
    if is_base_dequantised:
        for section in (config, config.get("text_config") or {}):
            section.pop("quantization_config", None)
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


def _copy_tokenizer(adapter: Path, folder: Path) -> None:
    """Copy the tokenizer of an adapter, which may have more tokens and another chat template.

    Files of the base that the adapter lacks stay, except templates that would replace that of the
    adapter. From an adapter without a tokenizer only the chat template is copied.
    """
    if not any((adapter / name).is_file() for name in _VOCABULARY_FILES):
        copy_files(adapter, folder, (CHAT_TEMPLATE,))
        return
    if read_json_or_empty(adapter / "tokenizer_config.json").get("chat_template"):
        for path in (folder / name for name in _TEMPLATE_FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    copy_files(adapter, folder, TOKENIZER_FILES)


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy the files and folders with these names that exist; they replace earlier ones."""
    for path in (source / name for name in names):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)


def _set_vocab_size(config: dict[str, Any], old: int, new: int) -> None:
    """Replace the vocabulary size in a configuration and in its sections, such as text_config."""
    if config.get("vocab_size") == old:
        config["vocab_size"] = new
    for value in config.values():
        if isinstance(value, dict):
            _set_vocab_size(value, old, new)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Set the dtype in a configuration and in its sections, such as text_config.

    Older versions of transformers have the key `torch_dtype` instead of `dtype`.
    """
    has_old_key = "torch_dtype" in config and "dtype" not in config
    if config.get("model_type") is not None or "dtype" in config or has_old_key:
        config["torch_dtype" if has_old_key else "dtype"] = name
    for value in config.values():
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys():
            _set_dtype(value, name)


def write_marker(plan: MergePlan, folder: Path, report: "MergeReport") -> None:
    """Write the record of the merge.

    If the merge added a single adapter with weight 1, `adapter_sha256` in the record is the hash of
    this adapter. products.py compares it with the hash of the run's present adapter. Otherwise
    (several adapters, another weight, or --undo, which subtracts the adapters) it is a text that
    equals no hash.
    """
    adapters = plan.identity["adapters"]
    adapter_hash = "several, weighted or undone"
    if len(adapters) == 1 and adapters[0]["weight"] == 1 and not plan.options.is_undone:
        adapter_hash = adapters[0]["sha256"]
    marker: dict[str, Any] = {
        **plan.identity,
        "adapter_sha256": adapter_hash,
        **vars(report),
        "files": [*_relative_files(folder), MARKER],
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
                written = {}  # name -> dtype and shape
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    written[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
        except (OSError, SafetensorError, UserError) as error:
            raise RankZeroError(f"{path}: cannot be read back: {error}") from error
        if written != {name: (task.dtype, task.shape) for name, task in shard.tensors.items()}:
            raise RankZeroError(f"{path}: names, dtypes or shapes differ from the planned ones")


def _relative_files(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    paths = sorted(folder.rglob("*"))
    return [path.relative_to(folder).as_posix() for path in paths if not path.is_dir()]


def require_replaceable(out: Path, inputs: Sequence[Path]) -> None:
    """Raise UserError if a merge into `out` would remove files that no merge wrote, or an input.

    `inputs`: the folders of the base and the adapters.
    """
    try:
        out.exists()
    except OSError as error:  # for example, a name that is too long
        raise UserError(f"{out}: {error.strerror}; set another --out") from None
    for folder in inputs:
        if folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: writing there would replace {folder}; set another --out")
    if not (parent := closest_existing(out.parent)).is_dir():
        raise UserError(f"{out}: {parent} is not a folder; set another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        written = set(read_json(out / MARKER)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} exists and was not written by a merge; remove it or set another --out"
        ) from None
    if others := [name for name in _relative_files(out) if name not in written]:
        raise UserError(
            f"{out} has a file that no merge wrote, {others[0]}; move it or set another --out"
        )


def require_space(out: Path, needed_bytes: int) -> None:
    """Raise UserError unless the disk of `out` has enough free space."""
    parent = closest_existing(out.resolve().parent)
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{parent}: the merged model needs {needed_bytes / 2**30:.1f} GiB, but only "
            f"{free_bytes / 2**30:.1f} GiB are free; free some space or set another --out"
        )
