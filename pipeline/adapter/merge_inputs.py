"""Inputs of a merge: shards of the base, layer updates of the adapter, and their compatibility.

Only headers of files are read, without torch, so that a wrong folder or an adapter of another model
is refused quickly.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.model.tensor_files import (
    INDEX,
    SINGLE,
    VALUE_BYTES,
    Entry,
    TensorFile,
    read_header,
    read_weight_map,
    weight_files,
)
from pipeline.plan.given.adapter_counts import lora_scaling, pattern_value

if TYPE_CHECKING:
    from pipeline.model.expert_slices import ExpertSlice

CHAT_TEMPLATE = "chat_template.jinja"
_PREFIX = "base_model.model."
# Suffixes of peft's keys -> the tensor of a LoRA layer that has this key.
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "magnitude"}
_TIED_NAMES = ("lm_head", "embed_tokens")
# Keys of adapter_config.json without effect on the merged weights. All other keys must be empty,
# except _READ_KEYS, which this file reads.
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_READ_KEYS = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "bias", "init_lora_weights", "target_parameters",
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base to merge into. `files`: the shards that transformers loads."""

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


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """The LoRA layer that changes one tensor of the base.

    `parts`: header entries of A, B and, for DoRA, the magnitude, by these names.
    """

    parts: Mapping[str, Entry]
    r: int
    alpha: float
    use_rslora: bool
    experts: "ExpertSlice | None" = None  # if the base tensor holds a part of fused experts

    @property
    def scaling(self) -> float:
        """The factor of the product of B and A."""
        return lora_scaling(self.r, self.alpha, use_rslora=self.use_rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of the base."""
        whole = self.parts["B"].shape[0], self.parts["A"].shape[1]
        return whole if self.experts is None else self.experts.stored_shape(whole)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. `updates`: name of an adapted tensor of the base -> its LoRA layer.

    `fused`: name of peft's LoRA layer of fused experts -> its tensors. `with_stored_names` replaces
    them by an update for each tensor of the base that holds a part of the experts.
    """

    file: TensorFile
    config: Mapping[str, Any]
    updates: Mapping[str, LayerUpdate]
    fused: Mapping[str, Mapping[str, Entry]]


def read_base(folder: Path) -> Base:
    """Read the headers of a base.

    Raises UserError unless the folder has a complete, unquantised safetensors model.
    """
    config = _read_object(folder / "config.json", "base")
    if method := config.get("quantization_config") or config.get("compression_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"base: {folder} is already quantised ({name}), so an adapter cannot be added to it "
            "exactly; name the 16-bit model with --base"
        )
    files = tuple(read_header(path) for path in weight_files(folder, "base"))
    if files[0].path.name == SINGLE:
        return Base(folder, config, files)
    weight_map = read_weight_map(folder, "base")
    file_of = {key: file.path.name for file in files for key in file.entries}
    if wrong := [key for key, name in weight_map.items() if file_of.get(key) != name]:
        raise UserError(
            f"base: {folder / INDEX}: {len(wrong)} tensors are not in their files, the first is "
            f"{wrong[0]} in {weight_map[wrong[0]]}; download the model again"
        )
    return Base(folder, config, files)


def read_adapter(folder: Path) -> Adapter:
    """Read the headers of an adapter.

    Raises UserError unless the folder has LoRA layers that `merge_layer` can merge.
    """
    config = _read_object(folder / "adapter_config.json", "adapter")
    _require_mergeable(folder, config)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"adapter: {folder} has no {path.name}, the only format that is supported")
    file = read_header(path)
    layers: dict[str, dict[str, Entry]] = {}
    for key, entry in file.entries.items():
        suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), "")
        if not suffix or not key.startswith(_PREFIX):
            raise UserError(
                f"adapter: {path}: {key} is not a part of a LoRA layer ({', '.join(_PARTS)})"
            )
        if entry.dtype not in VALUE_BYTES:
            raise UserError(
                f"adapter: {path}: {key} has dtype {entry.dtype}; expected {', '.join(VALUE_BYTES)}"
            )
        name = key.removeprefix(_PREFIX).removesuffix(suffix)
        layers.setdefault(name, {})[_PARTS[suffix]] = entry
    if not layers:
        raise UserError(f"adapter: {path} is empty")
    fused = {}
    if config.get("target_parameters"):  # A of n fused experts has n * r rows
        fused = {n: parts for n, parts in layers.items() if _num_rows(parts) != _r_of(n, config)}
        layers = {name: parts for name, parts in layers.items() if name not in fused}
    updates = {
        f"{name}.weight": _layer_update(path, name, parts, config) for name, parts in layers.items()
    }
    return Adapter(file, config, updates, fused)


def _num_rows(parts: Mapping[str, Entry]) -> int:
    return parts["A"].shape[0] if "A" in parts else 0


def _r_of(name: str, config: Mapping[str, Any]) -> int:
    return int(pattern_value(config.get("rank_pattern"), name, config["r"]))


def _layer_update(
    path: Path, name: str, parts: Mapping[str, Entry], config: Mapping[str, Any], experts: int = 1
) -> LayerUpdate:
    """The LoRA layer of this name. Raises UserError if a tensor is missing or does not match r.

    `experts`: number of experts in a fused tensor; each has r rows of A and r columns of B.
    """
    expected = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    if parts.keys() != expected:
        raise UserError(
            f"adapter: {path}: {name} has {', '.join(sorted(parts))} instead of "
            f"{', '.join(sorted(expected))}"
        )
    r = _r_of(name, config)
    a, b = parts["A"], parts["B"]
    width = r * experts
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != width or b.shape[1] != width:
        raise UserError(
            f"adapter: {path}: {name} has A {a.shape} and B {b.shape}, but r is {r} in "
            f"adapter_config.json{f', for each of {experts} experts' if experts > 1 else ''}"
        )
    return LayerUpdate(
        parts=parts,
        r=r,
        alpha=pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
    )


def with_stored_names(base: Base, adapter: Adapter) -> Adapter:
    """The adapter with the names that its weights have in the files of the base.

    transformers renames the tensors of some models when it loads them. torch is imported only if a
    name is not in the base. If the class of the base cannot be built, the names are not changed,
    and `require_compatible` reports them.
    """
    if adapter.updates.keys() <= base.entries.keys() and not adapter.fused:
        return adapter
    from pipeline.model.checkpoint_names import model_on_meta, stored_names

    try:
        model = model_on_meta(base.folder)
        stored = stored_names(model, base.entries)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if adapter.fused:
            raise UserError(
                f"base: the class of {base.folder} cannot be built ({error}), so its fused experts "
                "cannot be merged here; merge the adapter with peft"
            ) from error
        return adapter
    names = {name: each.keys[0] for name, each in stored.items() if each.converter is None}
    updates = {names.get(name, name): update for name, update in adapter.updates.items()}
    for name in adapter.fused:
        updates |= _expert_updates(name, adapter, model, stored)
    return replace(adapter, updates=updates, fused={})


def _expert_updates(
    name: str, adapter: Adapter, model: Any, stored: Mapping[str, Any]
) -> dict[str, LayerUpdate]:
    """A layer update for each tensor of the base that holds a part of one fused tensor."""
    from pipeline.model.expert_slices import adapted_tensor, expert_slices

    mismatch = f"adapter {adapter.file.path.parent} does not belong to the base"
    try:
        parameter = adapted_tensor(model, name, adapter.config["target_parameters"])
        tensor = model.get_parameter(parameter)
        slices = expert_slices(model, parameter, stored[parameter])
    except (AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{mismatch}: it has no fused experts {name} ({error})") from error
    whole = _layer_update(
        adapter.file.path, parameter, adapter.fused[name], adapter.config, tensor.shape[0]
    )
    return {key: replace(whole, experts=each) for key, each in slices.items()}


def require_compatible(base: Base, adapter: Adapter) -> None:
    """Raise UserError unless the base has a mergeable weight of the same shape for every update."""
    entries = base.entries
    mismatch = f"adapter {adapter.file.path.parent} does not belong to base {base.folder}"
    # config.json omits this key if tying is the default of the model's class.
    is_tied = base.config.get("tie_word_embeddings", "lm_head.weight" not in entries)
    for key in adapter.updates:
        if is_tied and key.removesuffix(".weight").rsplit(".", 1)[-1] in _TIED_NAMES:
            raise UserError(
                f"adapter: {adapter.file.path.parent} changes {key}, which the base ties to "
                "another tensor; one of the two would be lost when the merged model is loaded"
            )
    if missing := [key for key in adapter.updates if key not in entries]:
        near = difflib.get_close_matches(missing[0], entries, n=3) or list(entries)[:3]
        raise UserError(
            f"{mismatch}: {len(missing)} of {len(adapter.updates)} weights are not in the base, "
            f"the first is {missing[0]}; names of the base: {', '.join(near)}"
        )
    for key, update in adapter.updates.items():
        entry, shape = entries[key], update.shape
        if entry.shape != shape:
            raise UserError(
                f"{mismatch}: {key} has shape {entry.shape} in the base and {shape} in the adapter"
            )
        if entry.dtype not in VALUE_BYTES:
            raise UserError(
                f"base: {base.folder}: {key} has dtype {entry.dtype}, to which an adapter cannot "
                f"be added exactly; expected {', '.join(VALUE_BYTES)}"
            )


def _require_mergeable(folder: Path, config: Mapping[str, Any]) -> None:
    place = f"adapter: {folder}"
    r, alpha = config.get("r"), config.get("lora_alpha")
    is_lora = config.get("peft_type") == "LORA" and isinstance(r, int) and r > 0
    if not is_lora or not isinstance(alpha, int | float):
        raise UserError(f"{place}: adapter_config.json does not describe a LoRA adapter")
    if config.get("bias", "none") != "none":
        raise UserError(f"{place}: bias is {config['bias']!r}, but only weights can be merged")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(
            f"{place}: init_lora_weights is {config['init_lora_weights']!r}, which changed the "
            "base before training; merge the adapter with peft"
        )
    for key in sorted(config.keys() - _WITHOUT_EFFECT - _READ_KEYS):
        if config[key]:
            raise UserError(
                f"{place}: merging does not support {key}: {config[key]!r}; merge the adapter with "
                "peft"
            )


def _read_object(path: Path, setting: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(f"{setting}: {path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path}: not readable as a JSON object: {error}") from None
