"""Inputs of a merge: the shards of the base, its model without weights, and fitting adapters.

Names and shapes are compared without torch first, so that an adapter of another model is refused
quickly.
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
from pipeline.model.packed_files import checkpoint_files, is_packed
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


@dataclass(frozen=True)
class MetaModel:
    """The transformers model of a base, on the meta device, so without weights.

    `stored`: name of a parameter -> its tensors in the files. `shapes`: of all tensors in the
    files. `error`: why the class cannot be built; `model` is then None.
    """

    model: Any = None
    stored: Mapping[str, "StoredAs"] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    error: str = ""

    def stored_name(self, name: str) -> str:
        """Name of a parameter in the files; the same name if it is not a single tensor there."""
        stored = self.stored.get(name)
        return name if stored is None or stored.converter is not None else stored.keys[0]


@dataclass(frozen=True)
class Change:
    """The change of one tensor of the base by one adapter. `weight`: factor of its scaling.

    `update`: a product of matrices that is added (LayerUpdate), or values that replace those of the
    base or are added to them (ValueUpdate).
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
    if not is_packed(folder) and (
        method := config.get("quantization_config") or config.get("compression_config")
    ):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"base: {folder} is already quantised ({name}), so an adapter cannot be added to it "
            "exactly; name the 16-bit model with --base"
        )
    stored = [read_header(path) for path in weight_files(folder, "base")]
    files = checkpoint_files(folder, "base")
    if files[0].path.name == SINGLE:
        return Base(folder, config, files)
    weight_map = read_weight_map(folder, "base")
    file_of = {key: file.path.name for file in stored for key in file.entries}
    if wrong := [key for key, name in weight_map.items() if file_of.get(key) != name]:
        raise UserError(
            f"base: {folder / INDEX}: {len(wrong)} tensors are not in their files, the first is "
            f"{wrong[0]} in {weight_map[wrong[0]]}; download the model again"
        )
    return Base(folder, config, files)


def meta_model(base: Base, *, trust_remote_code: bool = False) -> MetaModel:
    """Build the model of a base on the meta device. Imports torch and transformers."""
    from pipeline.model.checkpoint_names import model_on_meta, stored_names

    try:
        model = model_on_meta(base.folder, trust_remote_code=trust_remote_code)
        shapes = {key: entry.shape for key, entry in base.entries.items()}
        return MetaModel(model, stored_names(model, shapes), shapes)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        return MetaModel(error=f"the class of {base.folder} cannot be built ({error})")


def with_stored_names(adapter: Adapter, meta: MetaModel) -> Adapter:
    """The adapter with the names and the orientation that its weights have in the base's files.

    transformers renames the tensors of some models when it loads them. If the class of the base
    cannot be built, each layer is assumed to be linear and to have the adapter's name in the files.
    """
    if meta.model is None:
        kind = "fused experts" if adapter.fused else ""
        if adapter.config.get("fan_in_fan_out"):
            kind = "transposed layers (fan_in_fan_out)"
        if kind:
            raise UserError(f"base: {meta.error}, so its {kind} cannot be merged here; {WITH_PEFT}")
        return adapter
    _require_untied(adapter, meta.model.all_tied_weights_keys)
    updates = {}
    for name, update in adapter.updates.items():
        is_transposed = _is_transposed(name.removesuffix(".weight"), adapter, meta)
        updates[meta.stored_name(name)] = replace(update, is_transposed=is_transposed)
    for name in adapter.fused:
        updates |= _expert_updates(name, adapter, meta)
    values = {meta.stored_name(name): each for name, each in adapter.values.items()}
    values = {name: each for name, each in values.items() if not _is_tied_copy(name, adapter, meta)}
    values |= _rows_of_stored_copies(adapter, meta)
    return replace(adapter, updates=updates, fused={}, values=values)


def _is_transposed(name: str, adapter: Adapter, meta: MetaModel) -> bool:
    """Whether a layer stores its weight as (d_in, d_out).

    Raises UserError for a layer of a kind that cannot be merged tensor by tensor.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    try:
        module = meta.model.get_submodule(name)
    except AttributeError:
        return False  # `require_compatible` reports it
    is_embedding = adapter.updates[f"{name}.weight"].is_embedding
    if isinstance(module, nn.Embedding) != is_embedding or isinstance(
        module, (nn.MultiheadAttention, nn.modules.conv._ConvNd)
    ):
        raise UserError(
            f"adapter: {adapter.folder}: {name} is a {type(module).__name__}, whose LoRA layer "
            f"cannot be merged tensor by tensor; {WITH_PEFT}"
        )
    return isinstance(module, Conv1D)


def _require_untied(adapter: Adapter, tied: Mapping[str, str]) -> None:
    """Raise UserError if the adapter changes one of two tensors that the base ties.

    They stay tied if the adapter replaces both by equal values.
    """
    for key, source in tied.items():
        for name in (key, source):
            is_replaced = any(each.rows is None for each in adapter.values.get(name, ()))
            stays_tied = adapter.config.get("ensure_weight_tying") or _are_equal(
                adapter, key, source
            )
            if name in adapter.updates or (is_replaced and not stays_tied):
                raise UserError(
                    f"adapter: {adapter.folder} changes {name}, but the base ties {key} to "
                    f"{source}; one of the two would be lost when the merged model is loaded: "
                    f"{WITH_PEFT}, with config.tie_word_embeddings = False before it is saved"
                )


def _is_tied_copy(name: str, adapter: Adapter, meta: MetaModel) -> bool:
    """Whether the files lack this tensor because it is tied to one that the adapter replaces too.

    A merge then writes only the other one.
    """
    tied: Mapping[str, str] = meta.model.all_tied_weights_keys
    return name in tied and name not in meta.stored and tied[name] in adapter.values


def _rows_of_stored_copies(adapter: Adapter, meta: MetaModel) -> dict[str, tuple[ValueUpdate, ...]]:
    """The trained rows for each tensor that the base ties to another and stores nevertheless.

    peft saves them once. Two stored tensors that differ are not tied when the model is loaded.
    """
    tied: Mapping[str, str] = meta.model.all_tied_weights_keys
    rows = {
        name: tuple(each for each in adapter.values.get(source, ()) if each.rows)
        for name, source in tied.items()
        if name in meta.stored and name not in adapter.values
    }
    return {meta.stored_name(name): each for name, each in rows.items() if each}


def _are_equal(adapter: Adapter, first: str, second: str) -> bool:
    """Whether the adapter has the same bytes for two tensors of the base."""
    contents = []
    with adapter.file.path.open("rb") as file:
        for name in (first, second):
            for each in adapter.values.get(name, ()):
                file.seek(each.part.start)
                contents.append(file.read(each.part.end - each.part.start))
    return len(contents) == 2 and contents[0] == contents[1]


def _expert_updates(name: str, adapter: Adapter, meta: MetaModel) -> dict[str, LayerUpdate]:
    """A layer update for each tensor of the base that holds a part of one fused tensor."""
    from pipeline.model.expert_slices import adapted_tensor, expert_slices

    mismatch = f"adapter {adapter.folder} does not belong to the base"
    try:
        parameter = adapted_tensor(meta.model, name, adapter.config["target_parameters"])
        tensor = meta.model.get_parameter(parameter)
        slices = expert_slices(meta.model, parameter, meta.stored[parameter], meta.shapes)
    except (AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{mismatch}: it has no fused experts {name} ({error})") from error
    whole = layer_update(
        adapter.file.path, parameter, adapter.fused[name], adapter.config, tensor.shape[0]
    )
    return {key: replace(whole, experts=each) for key, each in slices.items()}


def require_compatible(base: Base, adapter: Adapter, *, any_orientation: bool = False) -> None:
    """Raise UserError unless the base has a mergeable tensor of the same shape for every update.

    `any_orientation`: a matrix may also be the transpose, because the class is not known yet.
    """
    entries = base.entries
    mismatch = f"adapter {adapter.folder} does not belong to base {base.folder}"
    # config.json omits this key if tying is the default of the model's class.
    if base.config.get("tie_word_embeddings", "lm_head.weight" not in entries):
        tied = [n for n in adapter.updates if n.split(".")[-2] in _TIED_NAMES]
        _require_untied(adapter, dict.fromkeys(tied, "another tensor"))
    names = [*adapter.updates, *adapter.values]
    if missing := [name for name in names if name not in entries]:
        near = difflib.get_close_matches(missing[0], entries, n=3) or list(entries)[:3]
        raise UserError(
            f"{mismatch}: {len(missing)} of {len(names)} tensors are not in the base, "
            f"the first is {missing[0]}; names of the base: {', '.join(near)}"
        )
    for name, update in adapter.updates.items():
        shape = update.shape
        if any_orientation and entries[name].shape == shape[::-1]:
            shape = shape[::-1]
        _require_shape(mismatch, name, entries[name], shape)
        _require_mergeable_dtype(base, name, entries[name])
    for name, values in adapter.values.items():
        for value in values:
            shape = value.part.shape
            if value.rows is not None:
                _require_rows(mismatch, name, entries[name], value)
                shape = (entries[name].shape[0], *shape[1:])
            _require_shape(mismatch, name, entries[name], shape)
        _require_mergeable_dtype(base, name, entries[name])


def _require_rows(mismatch: str, name: str, entry: Entry, value: ValueUpdate) -> None:
    """Raise UserError if a row of the merged tensor would have no value."""
    assert value.rows is not None
    if missing := {*range(entry.shape[0], max(value.rows) + 1)} - {*value.rows}:
        raise UserError(
            f"{mismatch}: it has values for row {max(value.rows)} of {name}, but none for row "
            f"{min(missing)}, which the base does not have either; if the vocabulary was extended "
            f"for it, call base.resize_token_embeddings({max(value.rows) + 1}), and {WITH_PEFT}"
        )


def added_rows(entry: Entry, changes: Sequence[Change]) -> int:
    """Number of rows of new tokens that follow the rows of a tensor of the base."""
    rows = [c.update.rows for c in changes if isinstance(c.update, ValueUpdate) and c.update.rows]
    return max(0, *(max(each) + 1 - entry.shape[0] for each in rows)) if rows else 0


def _require_shape(mismatch: str, name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        resized = ""
        if entry.shape[1:] == shape[1:] and entry.shape[0] < shape[0]:
            resized = (
                "; if the vocabulary was extended for it, call base.resize_token_embeddings"
                f"({shape[0]}), and {WITH_PEFT}"
            )
        raise UserError(
            f"{mismatch}: {name} has shape {entry.shape} in the base and {shape} in the adapter"
            f"{resized}"
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

    Only products of matrices can be multiplied by a weight and added up. Raises UserError if an
    adapter with other changes has a weight, or if another adapter changes the same tensor.
    """
    changes: dict[str, list[Change]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, update in adapter.updates.items():
            if weight != 1 and "magnitude" in update.parts:
                raise UserError(
                    f"adapter: {adapter.folder} is a DoRA adapter, whose magnitudes replace those "
                    f"of the base, so it cannot have a weight; remove :{weight:g}"
                )
            changes.setdefault(name, []).append(Change(adapter.file.path, weight, update))
        for name, values in adapter.values.items():
            for value in values:
                change = Change(adapter.file.path, weight, value)
                if value.scaling is None:
                    _require_only_replacement(name, change, changes.get(name, []))
                changes.setdefault(name, []).append(change)
    return changes


def _require_only_replacement(name: str, change: Change, earlier: Sequence[Change]) -> None:
    """Raise UserError if values that replace those of the base have a weight or are not alone.

    `earlier`: the changes of the same tensor so far.
    """
    others = [
        other.file.parent
        for other in earlier
        if other.file != change.file and isinstance(other.update, ValueUpdate)
    ]
    if change.weight != 1 or others:
        reason = f"both {others[0]} and this adapter replace" if others else "it replaces"
        raise UserError(
            f"adapter: {change.file.parent}: {name} cannot be weighted or added, because {reason} "
            "the values of the base; merge one adapter only, without a weight"
        )
