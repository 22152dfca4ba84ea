"""Inputs of a merge: the shards of the base, its model class on the meta device, and the adapters.

Names and shapes are first compared without torch, so that an adapter of another model is refused
quickly. A shard is one of the safetensors files of a model.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapter.adapter_file import (
    WITH_PEFT,
    Adapter,
    LayerUpdate,
    ValueUpdate,
    layer_update,
    read_config,
)
from pipeline.errors import UserError
from pipeline.model.quantised_files import checkpoint_files, is_dequantised
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

if TYPE_CHECKING:
    from pipeline.model.checkpoint_names import StoredAs

_TIED_NAMES = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Base:
    """A base to merge into. `files`: the headers of the shards that transformers loads."""

    folder: Path
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]

    @property
    def entries(self) -> dict[str, Entry]:
        """Name of each tensor in all shards -> its entry in the header."""
        return {key: entry for file in self.files for key, entry in file.entries.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(file.path.stat().st_size for file in self.files)


@dataclass(frozen=True)
class MetaModel:
    """The transformers model of a base on the meta device, so without weights.

    `stored`: name of a parameter of the model -> the tensors in the files from which transformers
    loads it. `shapes`: name of a tensor in the files -> its shape. `error`: why the model cannot be
    built; `model` is then None.
    """

    model: Any = None
    stored: Mapping[str, "StoredAs"] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    error: str = ""

    def stored_name(self, name: str) -> str:
        """Name of a parameter in the files; unchanged if it is not a single tensor there."""
        stored = self.stored.get(name)
        is_single_tensor = stored is not None and stored.converter is None
        return stored.keys[0] if stored is not None and is_single_tensor else name


@dataclass(frozen=True)
class Change:
    """The change of one tensor of the base by one adapter.

    `file`: the adapter file. `weight`: the user's factor for this adapter. `update`: a product of
    matrices that is added (LayerUpdate), or values that replace those of the base or are added to
    them (ValueUpdate).
    """

    file: Path
    weight: float
    update: LayerUpdate | ValueUpdate


def read_base(folder: Path) -> Base:
    """Read the headers of a base.

    Weights that are stored in 4 or 8 bits (mxfp4, fp8) are listed as bf16, to which they are
    converted when they are read. Raises UserError unless the folder has a complete
    safetensors model with weights to which an adapter can be added.
    """
    config = read_config(folder / "config.json", "base")
    method = config.get("quantization_config") or config.get("compression_config")
    if method and not is_dequantised(folder):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"base: {folder} is already quantised ({name}), so an adapter cannot be added to it "
            "exactly; name the 16-bit model with --base"
        )
    headers = [read_header(path) for path in weight_files(folder, "base")]
    files = checkpoint_files(folder, "base")
    if files[0].path.name == SINGLE:
        return Base(folder, config, files)
    weight_map = read_weight_map(folder, "base")
    actual_map = {key: header.path.name for header in headers for key in header.entries}
    if wrong := [key for key, name in weight_map.items() if actual_map.get(key) != name]:
        raise UserError(
            f"base: {folder / INDEX}: {len(wrong)} tensors are not in their files, the first is "
            f"{wrong[0]} in {weight_map[wrong[0]]}; download the model again"
        )
    return Base(folder, config, files)


def meta_model(base: Base, *, trust_remote_code: bool = False) -> MetaModel:
    """Build the model of a base on the meta device. Imports torch and transformers.

    If that fails, the result has the error.
    """
    from pipeline.model.checkpoint_names import model_on_meta, stored_names

    try:
        model = model_on_meta(base.folder, trust_remote_code=trust_remote_code)
        shapes = {key: entry.shape for key, entry in base.entries.items()}
        return MetaModel(model, stored_names(model, shapes), shapes)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        return MetaModel(error=f"the class of {base.folder} cannot be built ({error})")


def with_stored_names(adapter: Adapter, meta: MetaModel) -> Adapter:
    """The adapter with the names and the orientation that the weights have in the base's files.

    transformers renames the tensors of some models when it loads them. If the model of the base
    cannot be built, each layer is assumed to be linear and to have the adapter's name in the files.
    """
    if meta.model is None:
        unsupported = "fused experts" if adapter.fused_experts else ""
        if adapter.config.get("fan_in_fan_out"):
            unsupported = "transposed layers (fan_in_fan_out)"
        if unsupported:
            raise UserError(
                f"base: {meta.error}, so its {unsupported} cannot be merged here; {WITH_PEFT}"
            )
        return adapter
    _require_untied(adapter, meta.model.all_tied_weights_keys)
    layer_updates = {}
    for name, update in adapter.layer_updates.items():
        is_transposed = _is_transposed(name.removesuffix(".weight"), adapter, meta)
        layer_updates[meta.stored_name(name)] = replace(update, is_transposed=is_transposed)
    for name in adapter.fused_experts:
        layer_updates |= _expert_updates(name, adapter, meta)
    value_updates = {}
    for name, updates in adapter.value_updates.items():
        stored_name = meta.stored_name(name)
        if not _is_tied_copy(stored_name, adapter, meta):
            value_updates[stored_name] = updates
    value_updates |= _rows_of_stored_copies(adapter, meta)
    return replace(
        adapter, layer_updates=layer_updates, fused_experts={}, value_updates=value_updates
    )


def _is_transposed(name: str, adapter: Adapter, meta: MetaModel) -> bool:
    """Whether a layer stores its weight as (d_in, d_out), as transformers' Conv1D does.

    Raises UserError for a layer of a class that cannot be merged tensor by tensor.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    try:
        module = meta.model.get_submodule(name)
    except AttributeError:
        return False  # no such layer, which `require_compatible` reports
    update = adapter.layer_updates[f"{name}.weight"]
    if update.is_parameter:
        return False
    is_unsupported = isinstance(module, (nn.MultiheadAttention, nn.modules.conv._ConvNd))
    if is_unsupported or isinstance(module, nn.Embedding) != update.is_embedding:
        raise UserError(
            f"adapter: {adapter.folder}: {name} is a {type(module).__name__}, whose LoRA layer "
            f"cannot be merged tensor by tensor; {WITH_PEFT}"
        )
    return isinstance(module, Conv1D)


def _require_untied(adapter: Adapter, tied: Mapping[str, str]) -> None:
    """Raise UserError if the adapter changes only one of two tensors that the base ties.

    `tied`: name of a tensor -> name of the tensor with which it shares its values. Two tensors stay
    tied if the adapter replaces both by equal values.
    """
    for key, source in tied.items():
        for name in (key, source):
            updates = adapter.value_updates.get(name, ())
            is_replaced = any(update.rows is None for update in updates)
            stays_tied = adapter.config.get("ensure_weight_tying") or _are_equal(
                adapter, key, source
            )
            if name in adapter.layer_updates or (is_replaced and not stays_tied):
                raise UserError(
                    f"adapter: {adapter.folder} changes {name}, but the base ties {key} to "
                    f"{source}; one of the two would be lost when the merged model is loaded: "
                    f"{WITH_PEFT}, with config.tie_word_embeddings = False before it is saved"
                )


def _is_tied_copy(name: str, adapter: Adapter, meta: MetaModel) -> bool:
    """Whether the files lack this tensor because it is tied to another one.

    Only if the adapter changes the other tensor, too. A merge then writes only the other tensor.
    """
    tied: Mapping[str, str] = meta.model.all_tied_weights_keys
    return name in tied and name not in meta.stored and tied[name] in adapter.value_updates


def _rows_of_stored_copies(adapter: Adapter, meta: MetaModel) -> dict[str, tuple[ValueUpdate, ...]]:
    """The trained rows for each tensor that is tied to another one, but also in the base's files.

    peft saves the rows only for one of the two tensors. They must be merged into both, because
    transformers does not tie two tensors that differ in the files.
    """
    tied: Mapping[str, str] = meta.model.all_tied_weights_keys
    copies = {}
    for name, source in tied.items():
        rows = tuple(update for update in adapter.value_updates.get(source, ()) if update.rows)
        if rows and name in meta.stored and name not in adapter.value_updates:
            copies[meta.stored_name(name)] = rows
    return copies


def _are_equal(adapter: Adapter, first: str, second: str) -> bool:
    """Whether the adapter has the same bytes for two tensors of the base."""
    contents = []
    with adapter.file.path.open("rb") as file:
        for name in (first, second):
            for update in adapter.value_updates.get(name, ()):
                entry = update.values
                file.seek(entry.start)
                contents.append(file.read(entry.end - entry.start))
    return len(contents) == 2 and contents[0] == contents[1]


def _expert_updates(name: str, adapter: Adapter, meta: MetaModel) -> dict[str, LayerUpdate]:
    """The LayerUpdate of each tensor in the files that has a part of one fused parameter.

    `name`: name of peft's LoRA layer for the fused parameter.
    """
    from pipeline.model.expert_slices import adapted_tensor, expert_slices

    mismatch = f"adapter {adapter.folder} does not belong to the base"
    try:
        parameter = adapted_tensor(meta.model, name, adapter.config["target_parameters"])
        tensor = meta.model.get_parameter(parameter)
        slices = expert_slices(meta.model, parameter, meta.stored[parameter], meta.shapes)
    except (AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{mismatch}: it has no fused experts {name} ({error})") from error
    num_experts = tensor.shape[0]
    update = layer_update(
        adapter.file.path, parameter, adapter.fused_experts[name], adapter.config, num_experts
    )
    return {key: replace(update, experts=expert_slice) for key, expert_slice in slices.items()}


def require_compatible(base: Base, adapter: Adapter, *, any_orientation: bool = False) -> None:
    """Raise UserError unless the base has a mergeable tensor of the same shape for every update.

    `any_orientation`: a matrix may also be the transpose, because the class is not known yet.
    """
    entries = base.entries
    mismatch = f"adapter {adapter.folder} does not belong to base {base.folder}"
    # config.json omits this key if tying is the default of the model's class.
    if base.config.get("tie_word_embeddings", "lm_head.weight" not in entries):
        tied = [name for name in adapter.layer_updates if name.split(".")[-2] in _TIED_NAMES]
        _require_untied(adapter, dict.fromkeys(tied, "another tensor"))
    names = [*adapter.layer_updates, *adapter.value_updates]
    if missing := [name for name in names if name not in entries]:
        if f"{missing[0].removesuffix('.bias')}.weight" in entries:
            raise UserError(
                f"adapter: {adapter.folder} has a bias for {missing[0]} (lora_bias), and the base "
                "has none to which it could be added; peft cannot merge it either, so use the "
                "adapter without a merge"
            )
        similar = difflib.get_close_matches(missing[0], entries, n=3) or list(entries)[:3]
        raise UserError(
            f"{mismatch}: {len(missing)} of {len(names)} tensors are not in the base, "
            f"the first is {missing[0]}; names of the base: {', '.join(similar)}"
        )
    for name, layer in adapter.layer_updates.items():
        shape = layer.shape
        if any_orientation and entries[name].shape == shape[::-1]:
            shape = shape[::-1]
        _require_shape(mismatch, name, entries[name], shape)
        _require_mergeable_dtype(base, name, entries[name])
    for name, updates in adapter.value_updates.items():
        for update in updates:
            shape = update.values.shape
            if update.rows is not None:
                _require_consecutive_rows(mismatch, name, entries[name], update.rows)
                shape = (entries[name].shape[0], *shape[1:])
            _require_shape(mismatch, name, entries[name], shape)
        _require_mergeable_dtype(base, name, entries[name])


def _require_consecutive_rows(mismatch: str, name: str, entry: Entry, rows: Sequence[int]) -> None:
    """Raise UserError if neither the base nor the adapter has values for a row.

    `mismatch`: start of the message. `entry`: the tensor of the base. `rows`: the adapter's rows.
    """
    if missing := {*range(entry.shape[0], max(rows) + 1)} - {*rows}:
        raise UserError(
            f"{mismatch}: it has values for row {max(rows)} of {name}, but none for row "
            f"{min(missing)}, which the base does not have either; if the vocabulary was extended "
            f"for it, call base.resize_token_embeddings({max(rows) + 1}), and {WITH_PEFT}"
        )


def added_rows(entry: Entry, changes: Sequence[Change]) -> int:
    """Number of rows of new tokens that the merged tensor has after the rows of the base."""
    rows = [
        row
        for change in changes
        if isinstance(change.update, ValueUpdate)
        for row in change.update.rows or ()
    ]
    # A tensor without axes has no number of rows, and no adapter changes it.
    return max(0, max(rows) + 1 - entry.shape[0]) if rows else 0


def _require_shape(mismatch: str, name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    """Raise UserError, beginning with `mismatch`, unless a tensor of the base has this shape."""
    if entry.shape != shape:
        remedy = ""
        if entry.shape[1:] == shape[1:] and entry.shape[0] < shape[0]:
            remedy = (
                "; if the vocabulary was extended for it, call base.resize_token_embeddings"
                f"({shape[0]}), and {WITH_PEFT}"
            )
        raise UserError(
            f"{mismatch}: {name} has shape {entry.shape} in the base and {shape} in the adapter"
            f"{remedy}"
        )


def _require_mergeable_dtype(base: Base, name: str, entry: Entry) -> None:
    if entry.dtype not in VALUE_BYTES:
        raise UserError(
            f"base: {base.folder}: {name} has dtype {entry.dtype}, to which an adapter cannot "
            f"be added exactly; expected {', '.join(VALUE_BYTES)}"
        )


def changes_by_tensor(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, list[Change]]:
    """Name of a tensor of the base -> its changes, in the order of the adapters.

    Changes that are added to the base can be multiplied by a weight and summed up. Values that
    replace those of the base cannot: UserError is raised if their adapter has a weight, or if two
    adapters replace the same tensor.
    """
    changes: dict[str, list[Change]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, layer in adapter.layer_updates.items():
            if weight != 1 and "magnitude" in layer.tensors:
                raise UserError(
                    f"adapter: {adapter.folder} is a DoRA adapter, whose magnitudes replace those "
                    f"of the base, so it cannot have a weight; remove :{weight:g}"
                )
            changes.setdefault(name, []).append(Change(adapter.file.path, weight, layer))
        for name, updates in adapter.value_updates.items():
            for update in updates:
                change = Change(adapter.file.path, weight, update)
                is_replacement = update.scaling is None
                if is_replacement:
                    _require_only_replacement(name, change, changes.get(name, []))
                changes.setdefault(name, []).append(change)
    return changes


def _require_only_replacement(name: str, change: Change, earlier: Sequence[Change]) -> None:
    """Raise UserError if values that replace a tensor have a weight, or replace it a second time.

    `earlier`: the changes of the same tensor by this adapter and the adapters before it.
    """
    other_adapters = [
        other.file.parent
        for other in earlier
        if other.file != change.file and isinstance(other.update, ValueUpdate)
    ]
    if change.weight != 1 or other_adapters:
        reason = "it replaces"
        if other_adapters:
            reason = f"both {other_adapters[0]} and this adapter replace"
        raise UserError(
            f"adapter: {change.file.parent}: {name} cannot be weighted or added, because {reason} "
            "the values of the base; merge one adapter only, without a weight"
        )
