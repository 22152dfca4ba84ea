"""What is to be merged, read from headers alone: base shards, adapter pairs, and whether they fit.

No torch: a wrong folder or a foreign adapter is refused before it loads. The safetensors format (8
bytes of header length, a JSON header, the tensors back to back) is that of
https://github.com/huggingface/safetensors#format.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.fingerprint import base_fingerprint

TRAINED_ON = "trained_on.json"  # beside the adapter: which base, by content
CHAT_TEMPLATE = "chat_template.jinja"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MERGEABLE = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of one value
_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
_TIED_ENDS = ("lm_head", "embed_tokens")
_MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation
# Keys of adapter_config.json that do not change what the adapter adds to a weight; every other one
# must be empty, except those that `read_adapter` reads.
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file without its tensors; entries in the order in which they lie."""

    path: Path
    header: bytes  # with the eight bytes before it
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Base:
    """A model folder; `files` are the shards that transformers would load."""

    folder: Path
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors of all shards."""
        return {key: entry for file in self.files for key, entry in file.entries.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(file.path.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Adapter:
    """What the adapter adds: scaling x B A, to each weight of `pairs`."""

    file: TensorFile
    scaling: float
    pairs: Mapping[str, tuple[Entry, Entry]]  # key of the base tensor -> A, B


def read_base(folder: Path) -> Base:
    """Raises UserError unless the folder holds an unquantised safetensors model, whole."""
    config = _read_json(folder / "config.json", "base")
    if method := config.get("quantization_config") or config.get("compression_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"base: {folder} is already quantised ({name}), so nothing can be added to it "
            "exactly; give the 16-bit model with --base"
        )
    if (folder / SINGLE).is_file():  # transformers prefers it to an index, too
        return Base(folder, config, (read_header(folder / SINGLE),))
    if not (folder / INDEX).is_file():
        raise UserError(f"base: {folder} holds neither {SINGLE} nor {INDEX}")
    weight_map = _read_json(folder / INDEX, "base").get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"base: {folder / INDEX} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"base: {folder / INDEX}: {outside[0]!r} is not the name of a file in it")
    files = tuple(read_header(folder / name) for name in names)
    places = {key: file.path.name for file in files for key in file.entries}
    if wrong := [key for key, name in weight_map.items() if places.get(key) != name]:
        raise UserError(
            f"base: {folder / INDEX}: {len(wrong)} tensors are not in their files, the first is "
            f"{wrong[0]} in {weight_map[wrong[0]]}; download the model again"
        )
    return Base(folder, config, files)


def read_adapter(folder: Path) -> Adapter:
    """Raises UserError unless the folder holds plain LoRA pairs of one r."""
    config = _read_json(folder / "adapter_config.json", "adapter")
    _require_plain_lora(folder, config)
    r, alpha = config["r"], config["lora_alpha"]
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"adapter: {folder} holds no {path.name}; other formats are not read")
    file = read_header(path)
    pairs: dict[str, tuple[Entry, Entry]] = {}
    for key in file.entries:
        name = key.removesuffix(_SIDES[0]).removesuffix(_SIDES[1])
        a, b = (file.entries.get(name + side) for side in _SIDES)
        if not key.startswith(_PREFIX) or a is None or b is None:
            raise UserError(f"adapter: {path}: {key} is not one of a lora_A, lora_B pair")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != r or b.shape[1] != r:
            raise UserError(
                f"adapter: {path}: {name} has A {a.shape} and B {b.shape}, which is not r {r} as "
                "adapter_config.json says"
            )
        if a.dtype not in MERGEABLE or b.dtype not in MERGEABLE:
            raise UserError(f"adapter: {path}: {name} is of type {a.dtype}, {b.dtype}")
        pairs[name.removeprefix(_PREFIX) + ".weight"] = a, b
    if not pairs:
        raise UserError(f"adapter: {path} is empty")
    return Adapter(file, scaling, pairs)


def require_same_base(base: Path, adapter: Path) -> None:
    """Raise UserError where the base is not, by content, the one that the adapter was trained on.

    Another fine-tune of the same model has the same names and shapes, and merges into nonsense.
    """
    path = adapter / TRAINED_ON
    if not path.is_file():
        return
    trained_on = _read_json(path, "adapter")
    if trained_on.get("fingerprint") != base_fingerprint(base):
        raise UserError(
            f"base: {base} is not what the adapter was trained on ({trained_on.get('base')} as it "
            "was then); bring that model back, or give this one with --base if it is meant"
        )


def require_fit(base: Base, adapter: Adapter) -> None:
    """Raise UserError unless every pair has its weight, of its shape, that may be changed."""
    entries = base.entries
    whose = f"adapter {adapter.file.path.parent} does not belong to base {base.folder}"
    # Where the class's default is to tie, config.json leaves the key out.
    is_tied = base.config.get("tie_word_embeddings", "lm_head.weight" not in entries)
    for key in adapter.pairs:
        if is_tied and key.removesuffix(".weight").rsplit(".", 1)[-1] in _TIED_ENDS:
            raise UserError(
                f"adapter: {adapter.file.path.parent} changes {key}, which the base ties to "
                "another; one side of a pair would be lost when the merged model is loaded"
            )
    if missing := [key for key in adapter.pairs if key not in entries]:
        near = difflib.get_close_matches(missing[0], entries, n=3) or list(entries)[:3]
        raise UserError(
            f"{whose}: {len(missing)} of {len(adapter.pairs)} weights do not exist there, the "
            f"first is {missing[0]}; what exists: {', '.join(near)}"
        )
    for key, (a, b) in adapter.pairs.items():
        entry, shape = entries[key], (b.shape[0], a.shape[1])
        if entry.shape != shape:
            raise UserError(f"{whose}: {key} is {entry.shape} there and {shape} in the adapter")
        if entry.dtype not in MERGEABLE:
            raise UserError(
                f"base: {base.folder}: {key} is of type {entry.dtype}, which nothing can be added "
                f"to exactly; expected {', '.join(MERGEABLE)}"
            )


def read_header(path: Path) -> TensorFile:
    """Raises UserError for a file that is not whole."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
        found = json.loads(text)
        found.pop("__metadata__", None)
        first = 8 + length
        entries = {
            key: Entry(said["dtype"], tuple(said["shape"]), *(first + at for at in offsets))
            for key, said in found.items()
            for offsets in [said["data_offsets"]]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error!r}") from None
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = first
    for key, entry in entries.items():
        if entry.start != end:
            raise UserError(f"{path}: tensors do not lie back to back")
        end = entry.end
        size = MERGEABLE.get(entry.dtype)
        if size and size * math.prod(entry.shape) != end - entry.start:
            raise UserError(f"{path}: {key} is not as long as its type and shape say")
    if end != path.stat().st_size:
        raise UserError(f"{path}: {path.stat().st_size} bytes long, its header says {end}")
    return TensorFile(path, prefix + text, entries)


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    where = f"adapter: {folder}"
    r, alpha = config.get("r"), config.get("lora_alpha")
    is_lora = config.get("peft_type") == "LORA" and isinstance(r, int) and r > 0
    if not is_lora or not isinstance(alpha, int | float):
        raise UserError(f"{where}: adapter_config.json does not describe a LoRA adapter")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {config['bias']!r}; only weights can be merged")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changed the "
            "base before the training; merge it with peft"
        )
    for key in sorted(config.keys() - _WITHOUT_EFFECT - _READ):
        if config[key]:
            raise UserError(
                f"{where}: {key} is {config[key]!r}, which is not merged here; merge it with peft"
            )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{what}: {path}: expected a JSON object")
    return data
