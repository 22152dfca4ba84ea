"""Adapter: the content of a PEFT folder, and how each of its tensors changes the base.

Only adapter_config.json and the header of adapter_model.safetensors are read, without torch, so
that a wrong folder is refused quickly.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapter.trained_on import WEIGHTS
from pipeline.errors import UserError
from pipeline.files import require_json
from pipeline.model.tensor_files import VALUE_BYTES, Entry, TensorFile, read_header
from pipeline.plan.given.adapter_counts import TOKEN_ROWS, lora_scaling, pattern_value
from pipeline.plan.given.shape import is_or_ends_with

if TYPE_CHECKING:
    from pipeline.model.expert_slices import ExpertSlice

# End of a message about an adapter that this project cannot merge.
WITH_PEFT = (
    "merge it with peft: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
    "ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
)
# End of a message about a key.
_RENAME = "rename it, or save the adapter with save_pretrained of the PeftModel"
CONFIG = "adapter_config.json"
_PICKLE = "adapter_model.bin"
_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}  # if the config lacks the key (LoraConfig, peft 0.21.2)
_PREFIX = "base_model.model."  # of all keys in a PEFT file, before the name in the base
# Suffix of a key in a PEFT file -> name of the LoRA tensor.
_LORA_TENSORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}
_LORA_BIAS = ".lora_B.bias"
_COMPILED = "_orig_mod."  # part of a key that was saved from a model in torch.compile
# Values of init_lora_weights that do not change the base before training; null is false in peft.
_PLAIN_INITIAL_VALUES = (True, False, None, "gaussian", "orthogonal", "eva")
# Keys of adapter_config.json without influence on the merged weights. Options of initial values are
# among them, because `init_lora_weights` alone tells whether the base was changed.
_KEYS_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "loftq_config",
    "corda_config", "lora_ga_config", "modules_to_save", "runtime_config",
}  # fmt: skip
# Keys that influence the merged weights and that `read_adapter` takes into account. An adapter with
# a value for any further key is refused.
_KEYS_WITH_EFFECT = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "bias", "lora_bias", "init_lora_weights", "target_parameters", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """The LoRA layer that changes one tensor of the base: W + scaling * B A.

    `tensors`: "A", "B" and, for DoRA, "magnitude" -> its entry in the header of the adapter file.
    `is_transposed`: whether the base stores the weight as (d_in, d_out), as in GPT-2 (peft's
    `fan_in_fan_out`). `is_parameter`: whether peft adapts the parameter itself, not its layer
    (`target_parameters`); peft then rounds the product to the dtype of the base. `experts`: for a
    LoRA layer of fused experts (one 3-D parameter with the weights of all experts), the part of
    that parameter that is stored in this tensor of the base; else None.
    """

    tensors: Mapping[str, Entry]
    r: int
    alpha: float
    use_rslora: bool
    is_embedding: bool = False
    is_transposed: bool = False
    is_parameter: bool = False
    experts: "ExpertSlice | None" = None

    @property
    def scaling(self) -> float:
        """The factor of the product B A."""
        return lora_scaling(self.r, self.alpha, use_rslora=self.use_rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of the base."""
        product_shape = self.tensors["B"].shape[0], self.tensors["A"].shape[1]
        if self.experts is not None:
            return self.experts.stored_shape(product_shape)
        return product_shape[::-1] if self.is_embedding or self.is_transposed else product_shape


@dataclass(frozen=True, kw_only=True)
class ValueUpdate:
    """Values of the adapter for one tensor of the base, without a product of matrices.

    `values`: their entry in the header of the adapter file. There are three kinds. If `rows` is
    set, the values replace the rows of the tensor with these indices (new tokens). If `scaling` is
    set, they are added to the tensor with this factor (the bias of a B matrix). Otherwise they
    replace the whole tensor (`modules_to_save`, trained biases).
    """

    values: Entry
    rows: tuple[int, ...] | None = None
    scaling: float | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    `config`: adapter_config.json. `layer_updates`: name of a tensor of the base -> its LoRA layer.
    `value_updates`: name of a tensor of the base -> other changes of it. `fused_experts`: name of
    peft's LoRA layer for fused experts -> its tensors, as in LayerUpdate. Such a layer may change
    several tensors of the base; merge_inputs.py replaces it by one LayerUpdate for each of them.
    """

    file: TensorFile
    config: Mapping[str, Any]
    layer_updates: Mapping[str, LayerUpdate]
    fused_experts: Mapping[str, Mapping[str, Entry]]
    value_updates: Mapping[str, tuple[ValueUpdate, ...]] = field(default_factory=dict)

    @property
    def changed_names(self) -> set[str]:
        """Names of all tensors of the base that it changes, without those of fused experts."""
        return {*self.layer_updates, *self.value_updates}

    @property
    def folder(self) -> Path:
        """The PEFT folder."""
        return self.file.path.parent


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and the header of the weights of an adapter.

    Raises UserError unless the folder has a LoRA adapter that can be merged tensor by tensor.
    """
    if not folder.is_dir():
        raise UserError(
            f"adapter: {folder} is not a folder; give a PEFT folder, with {CONFIG} in it"
        )
    if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).is_file():
        raise UserError(
            f"adapter: {folder} has its adapter in a subfolder; give {folder / 'adapter'}"
        )
    config = _PEFT_DEFAULTS | read_config(folder / CONFIG, "adapter")
    path = folder / WEIGHTS
    try:
        _require_mergeable(folder, config)
        if not path.is_file():
            raise UserError(f"adapter: {folder} has no {WEIGHTS}; {_convert_text(folder)}")
        return _adapter_of(read_header(path), config)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{folder / CONFIG}: a value has an unexpected type ({error}); write it as peft does"
        ) from None


def _adapter_of(file: TensorFile, config: Mapping[str, Any]) -> Adapter:
    """The adapter with these tensors and this adapter_config.json."""
    path = file.path
    layers: dict[str, dict[str, Entry]] = {}  # name of a LoRA layer -> its tensors
    value_updates: dict[str, tuple[ValueUpdate, ...]] = {}
    for key, entry in file.entries.items():
        _require_supported(path, key, entry)
        name = key.removeprefix(_PREFIX)
        if suffix := _lora_suffix(name):
            layer = name.removesuffix(suffix)
            layers.setdefault(layer, {})[_LORA_TENSORS[suffix]] = entry
        else:
            base_name, update = _value_update(path, name, entry, config)
            value_updates[base_name] = (*value_updates.get(base_name, ()), update)
    if not layers and not value_updates:
        raise UserError(f"adapter: {path} is empty")
    layer_updates: dict[str, LayerUpdate] = {}
    fused_experts: dict[str, dict[str, Entry]] = {}
    for name, tensors in layers.items():
        weight = f"{name}.weight"
        is_parameter = _is_target_parameter(weight, config)
        name_in_patterns = weight if is_parameter else name
        if config.get("target_parameters") and _is_fused(name_in_patterns, tensors, config):
            fused_experts[name] = tensors
        else:
            lora_layer = layer_update(path, name_in_patterns, tensors, config)
            layer_updates[weight] = replace(lora_layer, is_parameter=is_parameter)
    return Adapter(file, config, layer_updates, fused_experts, value_updates)


def _require_supported(path: Path, key: str, entry: Entry) -> None:
    """Raise UserError unless a tensor of the adapter file has a key of peft and a known dtype.

    peft ignores other keys when it loads the adapter.
    """
    is_lora = ".lora_" in key
    problem = ""
    if not key.startswith(_PREFIX):
        problem = f"does not begin with {_PREFIX}; {_RENAME}"
    elif _COMPILED in key or (is_lora and not key.endswith((*_LORA_TENSORS, _LORA_BIAS))):
        problem = f"is not a key of peft; {_RENAME}"
    elif entry.dtype not in VALUE_BYTES:
        problem = f"has dtype {entry.dtype}; expected {', '.join(VALUE_BYTES)}"
    if problem:
        raise UserError(f"adapter: {path}: {key} {problem}")


def _lora_suffix(name: str) -> str:
    """The end of a key that tells which tensor of a LoRA layer it is; empty for other tensors."""
    return next((suffix for suffix in _LORA_TENSORS if name.endswith(suffix)), "")


def current_key(key: str) -> str:
    """The key of peft 0.21.2 for a tensor that an older version stored under another key.

    Older versions stored DoRA's magnitudes as weights of a module. The key of a
    trained bias of an adapted layer may contain `.base_layer.`, because peft wraps the layer.
    """
    key = key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    return key if ".lora_" in key else key.replace(".base_layer.", ".")


def _convert_text(folder: Path) -> str:
    """How to get the weights of an adapter as safetensors."""
    if not (folder / _PICKLE).is_file():
        return "copy it there, or name another folder"
    return (
        f"{_PICKLE} is not read, because a pickle can run any code; if you trust it, convert it: "
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
        ".save_pretrained(FOLDER)"
    )


def _is_target_parameter(name: str, config: Mapping[str, Any]) -> bool:
    """Whether peft adapts the parameter with this name itself, not as the weight of its layer."""
    targets = config.get("target_parameters") or ()
    return any(is_or_ends_with(name, target) for target in targets)


def _is_fused(name: str, tensors: Mapping[str, Entry], config: Mapping[str, Any]) -> bool:
    """Whether a LoRA layer is that of n fused experts, whose A has n times r rows."""
    return "A" in tensors and tensors["A"].shape[0] != _layer_r(name, config)


def _layer_r(name: str, config: Mapping[str, Any]) -> int:
    """LoRA's r of a layer, with peft's `rank_pattern`."""
    return int(pattern_value(config.get("rank_pattern"), name, config["r"]))


def layer_update(
    path: Path,
    name: str,
    tensors: Mapping[str, Entry],
    config: Mapping[str, Any],
    num_experts: int = 1,
) -> LayerUpdate:
    """The LoRA layer of this name. Raises UserError if a tensor is missing or does not match r.

    `path`: the adapter file, for messages. `num_experts`: of a LoRA layer for fused experts, which
    has r rows of A and r columns of B for each expert.
    """
    is_embedding = "embedding_A" in tensors
    tensors = {key.removeprefix("embedding_"): entry for key, entry in tensors.items()}
    expected = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    if tensors.keys() != expected:
        raise UserError(
            f"adapter: {path}: {name} has {', '.join(sorted(tensors))} instead of "
            f"{', '.join(sorted(expected))}"
        )
    r = _layer_r(name, config)
    a, b = tensors["A"], tensors["B"]
    width = r * num_experts
    are_matrices = len(a.shape) == len(b.shape) == 2
    if not are_matrices or a.shape[0] != width or b.shape[1] != width:
        note = f", for each of {num_experts} experts" if num_experts > 1 else ""
        raise UserError(
            f"adapter: {path}: {name} has A {a.shape} and B {b.shape}, but r is {r} in "
            f"adapter_config.json{note}"
        )
    magnitude = tensors.get("magnitude")
    lengths = {b.shape[0], a.shape[1]} if is_embedding else {b.shape[0]}
    if magnitude is not None and magnitude.shape not in {(length,) for length in lengths}:
        raise UserError(
            f"adapter: {path}: {name} has a magnitude of shape {magnitude.shape}, but B {b.shape}"
        )
    return LayerUpdate(
        tensors=tensors,
        r=r,
        alpha=pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        is_embedding=is_embedding,
    )


def _value_update(
    path: Path, name: str, entry: Entry, config: Mapping[str, Any]
) -> tuple[str, ValueUpdate]:
    """Name of a tensor of the base, and the values that the adapter has for it.

    `name`: key of the adapter file without the prefix. `entry`: its entry in the header.
    """
    if name.endswith(_LORA_BIAS):
        layer = name.removesuffix(_LORA_BIAS)
        alpha = pattern_value(config.get("alpha_pattern"), layer, config["lora_alpha"])
        use_rslora = bool(config.get("use_rslora"))
        scaling = lora_scaling(_layer_r(layer, config), alpha, use_rslora=use_rslora)
        return f"{layer}.bias", ValueUpdate(values=entry, scaling=scaling)
    if name.endswith(TOKEN_ROWS):
        module = name.removesuffix(TOKEN_ROWS)
        rows = _token_rows(module, config.get("trainable_token_indices"))
        if len(rows) != entry.shape[0]:
            raise UserError(
                f"adapter: {path}: {name} has {entry.shape[0]} rows, but trainable_token_indices "
                f"names {len(rows)} tokens"
            )
        return f"{module}.weight", ValueUpdate(values=entry, rows=rows)
    return current_key(name), ValueUpdate(values=entry)


def _token_rows(module: str, indices: Any) -> tuple[int, ...]:
    """Indices of a module's trained rows, from peft's `trainable_token_indices`.

    Its value is a list of indices, or a mapping from the end of a module's name to such a list.
    """
    if isinstance(indices, Mapping):
        names = [name for name in indices if is_or_ends_with(module, name)]
        indices = indices[names[0]] if names else []
    return tuple(int(index) for index in indices or [])


def _require_mergeable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError unless adapter_config.json describes a LoRA adapter that can be merged."""
    location = f"adapter: {folder}"
    if (peft_type := config.get("peft_type")) and peft_type != "LORA":
        raise UserError(f"{location}: peft_type is {peft_type!r}, which is not LoRA; {WITH_PEFT}")
    problem = _problem_of_sizes(config) if peft_type else "peft_type is missing"
    if problem:
        raise UserError(
            f"{folder / CONFIG}: {problem}; write the value that the adapter was trained with"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITIAL_VALUES:
        raise UserError(
            f"{location}: init_lora_weights is {config['init_lora_weights']!r}, which changed the "
            f"base before training; {WITH_PEFT}"
        )
    for key in sorted(config.keys() - _KEYS_WITHOUT_EFFECT - _KEYS_WITH_EFFECT):
        if config[key]:
            raise UserError(
                f"{location}: merging does not support {key}: {config[key]!r}; {WITH_PEFT}"
            )


def _problem_of_sizes(config: Mapping[str, Any]) -> str:
    """The first r or alpha, for all layers or in a pattern, that peft cannot use; empty if none.

    Raises AttributeError if a pattern is not a mapping.
    """
    for key, pattern, is_valid, expected in (
        ("r", "rank_pattern", _is_positive_integer, "a positive integer"),
        ("lora_alpha", "alpha_pattern", _is_finite_number, "a finite number"),
    ):
        values = {key: config[key]}
        values |= {f"{pattern}: {name}": v for name, v in (config.get(pattern) or {}).items()}
        for name, value in values.items():
            if not is_valid(value):
                return f"{name} is {json.dumps(value)[:40]}, not {expected}"
    return ""


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):  # an integer beyond the range of float overflows
        return False


def require_size_of_base(
    location: str, update: LayerUpdate, d_out: int, d_in: int, model: Path | str
) -> None:
    """Raise UserError unless a LoRA layer belongs to a weight of this size.

    `location`: adapter and layer, for the message. `model`: the base that is used now.
    """
    if update.shape != (d_out, d_in):
        raise UserError(
            f"{location} is {update.shape} in its base and {(d_out, d_in)} in {model}: it was "
            "trained on another model; use that model, or another adapter"
        )


def read_config(path: Path, setting: str) -> dict[str, Any]:
    """The content of a JSON config file. Raises UserError if the file is missing or damaged.

    `setting`: the setting or input that gave the folder, for the message.
    """
    if not path.exists():
        raise UserError(f"{setting}: {path.parent} has no {path.name}")
    return require_json(path, f"{setting}: ")


def require_adapter(run_folder: Path) -> Path:
    """The adapter folder of a run. Raises UserError if there is none."""
    adapter = run_folder / "adapter"
    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise UserError(f"{run_folder} has no adapter; finish the training of this run first")
    return adapter
