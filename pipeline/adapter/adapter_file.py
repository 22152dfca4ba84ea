"""PEFT folders of LoRA adapters: configuration, and how each tensor changes the base. No torch.

Only the header of adapter_model.safetensors is read, so that a wrong folder is refused quickly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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

WITH_PEFT = (
    "merge it with peft: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
    "ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
)
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Suffixes of peft's keys -> the part of a LoRA layer that has this key.
_LORA_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}
_LORA_BIAS = ".lora_B.bias"
# Values of init_lora_weights that do not change the base before training.
_PLAIN_INITIAL_VALUES = (True, False, "gaussian", "orthogonal", "eva")
# Keys of adapter_config.json without influence on the merged weights. All other keys must be empty,
# except those that `read_adapter` reads.
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "modules_to_save",
    "runtime_config",
}  # fmt: skip
_READ = {  # keys that influence the merged weights
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "bias", "lora_bias", "init_lora_weights", "target_parameters", "fan_in_fan_out",
    "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """The LoRA layer that changes one tensor of the base.

    `parts`: header entries of A, B and, for DoRA, the magnitude, by these names. `is_transposed`:
    the weight is stored as (d_in, d_out), as in GPT-2 (peft's `fan_in_fan_out`).
    """

    parts: Mapping[str, Entry]
    r: int
    alpha: float
    use_rslora: bool
    is_embedding: bool = False
    is_transposed: bool = False
    experts: "ExpertSlice | None" = None  # slice of a fused tensor that the base's tensor stores

    @property
    def scaling(self) -> float:
        """The factor of the product of B and A."""
        return lora_scaling(self.r, self.alpha, use_rslora=self.use_rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of the base."""
        whole = self.parts["B"].shape[0], self.parts["A"].shape[1]
        if self.experts is not None:
            return self.experts.stored_shape(whole)
        return whole[::-1] if self.is_embedding or self.is_transposed else whole


@dataclass(frozen=True, kw_only=True)
class ValueUpdate:
    """Values of the adapter for one tensor of the base, without a product of matrices.

    They replace the tensor (`modules_to_save`, trained biases), or the rows with these indices (new
    tokens), or are added with the factor `scaling` (the bias of a B matrix).
    """

    part: Entry
    rows: tuple[int, ...] | None = None
    scaling: float | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    `updates`: name of an adapted tensor of the base -> its LoRA layer. `values`: name of another
    tensor that the adapter changes -> its values. `fused`: name of peft's LoRA layer of fused
    experts -> its tensors; `with_stored_names` replaces it by updates of the stored tensors.
    """

    file: TensorFile
    config: Mapping[str, Any]
    updates: Mapping[str, LayerUpdate]
    fused: Mapping[str, Mapping[str, Entry]]
    values: Mapping[str, tuple[ValueUpdate, ...]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Names of all tensors of the base that it changes, without those of fused experts."""
        return {*self.updates, *self.values}

    @property
    def has_token_rows(self) -> bool:
        """Whether it has trained rows of tokens."""
        return any(each.rows for values in self.values.values() for each in values)

    @property
    def folder(self) -> Path:
        """The PEFT folder."""
        return self.file.path.parent


def read_adapter(folder: Path) -> Adapter:
    """Read the headers of an adapter.

    Raises UserError unless the folder has a LoRA adapter that can be merged tensor by tensor.
    """
    if not folder.is_dir():
        raise UserError(
            f"adapter: {folder} is not a folder; give a PEFT folder, with {CONFIG} in it"
        )
    config = read_config(folder / CONFIG, "adapter")
    _require_mergeable(folder, config)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"adapter: {folder} has no {path.name}, the only format that is supported")
    file = read_header(path)
    layers: dict[str, dict[str, Entry]] = {}
    values: dict[str, tuple[ValueUpdate, ...]] = {}
    for key, entry in file.entries.items():
        if not key.startswith(_PREFIX):
            raise UserError(f"adapter: {path}: {key} does not begin with {_PREFIX}")
        if entry.dtype not in VALUE_BYTES:
            raise UserError(
                f"adapter: {path}: {key} has dtype {entry.dtype}; expected {', '.join(VALUE_BYTES)}"
            )
        name = key.removeprefix(_PREFIX)
        if suffix := next((suffix for suffix in _LORA_PARTS if name.endswith(suffix)), ""):
            part = _LORA_PARTS[suffix]
            layers.setdefault(name.removesuffix(suffix), {})[part] = entry
        else:
            tensor, update = _value_update(path, name, entry, config)
            values[tensor] = (*values.get(tensor, ()), update)
    if not layers and not values:
        raise UserError(f"adapter: {path} is empty")
    fused = {}
    if config.get("target_parameters"):  # the A of n fused experts has n x r rows
        fused = {n: parts for n, parts in layers.items() if _rows_of_a(parts) != _r_of(n, config)}
        layers = {name: parts for name, parts in layers.items() if name not in fused}
    updates = {
        f"{name}.weight": layer_update(path, name, parts, config) for name, parts in layers.items()
    }
    return Adapter(file, config, updates, fused, values)


def _rows_of_a(parts: Mapping[str, Entry]) -> int:
    return parts["A"].shape[0] if "A" in parts else 0


def _r_of(name: str, config: Mapping[str, Any]) -> int:
    return int(pattern_value(config.get("rank_pattern"), name, config["r"]))


def layer_update(
    path: Path, name: str, parts: Mapping[str, Entry], config: Mapping[str, Any], experts: int = 1
) -> LayerUpdate:
    """The LoRA layer of this name. Raises UserError if a tensor is missing or does not match r.

    `experts`: number of experts of a fused tensor, each of which has r columns of its own.
    """
    is_embedding = "embedding_A" in parts
    parts = {part.removeprefix("embedding_"): entry for part, entry in parts.items()}
    wanted = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    if parts.keys() != wanted:
        raise UserError(
            f"adapter: {path}: {name} has {', '.join(sorted(parts))} instead of "
            f"{', '.join(sorted(wanted))}"
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
        is_embedding=is_embedding,
    )


def _value_update(
    path: Path, name: str, entry: Entry, config: Mapping[str, Any]
) -> tuple[str, ValueUpdate]:
    """Name of a tensor of the base, and the values that the adapter has for it."""
    if name.endswith(_LORA_BIAS):
        layer = name.removesuffix(_LORA_BIAS)
        alpha = pattern_value(config.get("alpha_pattern"), layer, config["lora_alpha"])
        use_rslora = bool(config.get("use_rslora"))
        scaling = lora_scaling(_r_of(layer, config), alpha, use_rslora=use_rslora)
        return f"{layer}.bias", ValueUpdate(part=entry, scaling=scaling)
    if name.endswith(TOKEN_ROWS):
        module = name.removesuffix(TOKEN_ROWS)
        rows = _token_rows(module, config.get("trainable_token_indices"))
        if len(rows) != entry.shape[0]:
            raise UserError(
                f"adapter: {path}: {name} has {entry.shape[0]} rows, but trainable_token_indices "
                f"names {len(rows)} tokens"
            )
        return f"{module}.weight", ValueUpdate(part=entry, rows=rows)
    return name.replace(".base_layer.", "."), ValueUpdate(part=entry)


def _token_rows(module: str, indices: Any) -> tuple[int, ...]:
    if isinstance(indices, Mapping):
        names = [name for name in indices if is_or_ends_with(module, name)]
        indices = indices[names[0]] if names else []
    return tuple(int(index) for index in indices or [])


def _require_mergeable(folder: Path, config: Mapping[str, Any]) -> None:
    place = f"adapter: {folder}"
    if (kind := config.get("peft_type")) and kind != "LORA":
        raise UserError(f"{place}: peft_type is {kind!r}, which is not LoRA; {WITH_PEFT}")
    r, alpha = config.get("r"), config.get("lora_alpha")
    is_lora = config.get("peft_type") == "LORA" and isinstance(r, int) and r > 0
    if not is_lora or not isinstance(alpha, int | float):
        raise UserError(f"{place}: adapter_config.json does not describe a LoRA adapter")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIAL_VALUES:
        raise UserError(
            f"{place}: init_lora_weights is {config['init_lora_weights']!r}, which changed the "
            f"base before training; {WITH_PEFT}"
        )
    for key in sorted(config.keys() - _WITHOUT_EFFECT - _READ):
        if config[key]:
            raise UserError(
                f"{place}: merging does not support {key}: {config[key]!r}; {WITH_PEFT}"
            )


def read_config(path: Path, setting: str) -> dict[str, Any]:
    """The content of a config file. Raises UserError, which names `setting`, if there is none."""
    if not path.exists():
        raise UserError(f"{setting}: {path.parent} has no {path.name}")
    return require_json(path, f"{setting}: ")


def require_adapter(run_folder: Path) -> Path:
    """The adapter folder of a run. Raises UserError if there is none."""
    adapter = run_folder / "adapter"
    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise UserError(f"{run_folder} has no adapter; finish the training of this run first")
    return adapter
