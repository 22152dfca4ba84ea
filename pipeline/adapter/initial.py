"""Initial adapter: the PEFT folder from which a new run starts (setting `init_adapter`).

This file checks that the adapter fits the run, and records it, without torch. It reads only the
header of the weights, adapter_config.json and trained_on.json; initial_weights.py loads tensors.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter_file import (
    Adapter,
    LayerUpdate,
    layer_update,
    read_adapter,
    require_size_of_base,
)
from pipeline.adapter.trained_on import (
    QUANTISED,
    TRAINED_ON,
    adapter_sha256,
    require_corrected_base,
    require_same_base,
)
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json_or_empty, write_text
from pipeline.plan.given.adapter_counts import AdaptedLayer, adapted_experts, adapted_layers
from pipeline.plan.given.new_tokens import TOKENIZER, token_rows
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.given.shape import EXPERTS
from pipeline.plan.plan import Plan

RECORD = "init_adapter.json"  # file in a run folder
# Ends of messages with a remedy.
_RESIZE = (
    "or set init_adapter_resize: true, which converts the adapter without changing the outputs of "
    "the model"
)
_OTHER_BASE_REMEDY = (
    "set model to the one that the adapter was trained on, or accept this one with "
    "accept_changes: [base]"
)


def require_startable(plan: Plan) -> None:
    """Raise UserError unless the run can start from `init_adapter`, if it is set.

    Reads the whole base if the adapter's folder records its fingerprint.
    """
    settings, folder = plan.settings, plan.settings.init_adapter_folder
    if folder is None:
        return
    read_initial_adapter(plan)
    # An adapter that was initialised with LoftQ fits only a base that is quantised with the same
    # options. The message lists these options before the remedy.
    remedy = "set these options in this run too, or start from another adapter"
    try:
        require_corrected_base(folder, settings, remedy)
    except UserError as error:
        raise UserError(f"init_adapter: {error}") from None
    if "base" in settings.accept_changes:
        return
    try:
        require_same_base(settings.model_folder, folder, _OTHER_BASE_REMEDY)
    except UserError as error:
        raise UserError(f"init_adapter: {folder}: {error}") from None


def read_initial_adapter(plan: Plan) -> Adapter:
    """The header of `init_adapter`. Raises UserError unless it has the layers of this run.

    Layers that are trained in full (`modules_to_save`) must be the same, too.
    """
    settings, folder = plan.settings, plan.settings.init_adapter_folder
    assert folder is not None
    if not folder.is_dir():
        raise UserError(
            f"init_adapter: {settings.init_adapter} is neither a folder nor a hub adapter in the "
            f"local cache; give the adapter folder of a run, or download it with `hf download "
            f"{settings.init_adapter}`"
        )
    try:
        adapter = read_adapter(folder)
    except UserError as error:
        raise UserError(f"init_adapter: {error}") from None
    _require_same_saved_modules(plan, adapter)
    layers = initial_layers(plan)
    _require_same_layers(folder, adapter, layers)
    for key, layer in layers.items():
        _require_same_sizes(settings, adapter, initial_update(adapter, key, layer), layer)
    return adapter


def initial_layers(plan: Plan) -> dict[str, AdaptedLayer]:
    """Name of peft's LoRA layer -> the linear layer or the fused experts of the run."""
    layers = {layer.name: layer for layer in adapted_layers(plan.shape, plan.settings)}
    return layers | adapted_experts(plan.shape, plan.settings)


def initial_update(adapter: Adapter, key: str, layer: AdaptedLayer) -> LayerUpdate:
    """The adapter's LoRA layer with this name. Raises UserError if its A and B do not match r."""
    update = adapter.layer_updates.get(f"{key}.weight")
    if update is not None and layer.num_experts == 1:
        return update
    tensors = adapter.fused_experts[key] if update is None else update.tensors
    try:
        return layer_update(
            adapter.file.path, layer.name, tensors, adapter.config, layer.num_experts
        )
    except UserError as error:
        raise UserError(f"init_adapter: {error}") from None


def _require_same_saved_modules(plan: Plan, adapter: Adapter) -> None:
    """Raise UserError unless the adapter has values for exactly the modules of modules_to_save."""
    location = f"init_adapter: {adapter.folder}"
    modules = saved_modules(plan.shape, plan.settings)
    shapes: dict[str, tuple[int, ...]] = {}  # parameter of a trained module -> its shape
    for module in modules:
        shapes |= {f"{module.name}.{name}": shape for name, shape in module.shapes.items()}
    tied = {f"{module.tied_name}.weight" for module in modules if module.tied_name}
    token_weights = _require_same_token_rows(plan, adapter)
    names = adapter.value_updates.keys() - tied - token_weights
    for name in sorted(names):
        # `scaling` is set for the bias of a B matrix (see ValueUpdate).
        if any(update.scaling is not None for update in adapter.value_updates[name]):
            raise UserError(
                f"{location} has a bias of lora_B: {name}; a run cannot start from it; merge it, "
                "and start from the merged model"
            )
    module_names = sorted({name.rpartition(".")[0] for name in names})
    if others := {*module_names} - {plan.shape.embeddings_name, plan.shape.head_name}:
        name = min(name for name in names if name.rpartition(".")[0] in others)
        raise UserError(
            f"{location} has values for {name}, and a run can train only embeddings and head in "
            "full; merge it, and start from the merged model"
        )
    if differences := shapes.keys() ^ names:
        raise UserError(
            f"{location} and this run train other modules in full, such as {min(differences)}; set "
            f"modules_to_save: [{', '.join(module_names)}]"
        )
    if tied and not adapter.config.get("ensure_weight_tying"):
        raise UserError(
            f"{location} was trained without ensure_weight_tying, so its embeddings and head "
            f"differ, but {plan.settings.model} ties them; merge it, and start from the merged "
            "model"
        )
    for name, shape in shapes.items():
        if (adapter_shape := adapter.value_updates[name][0].values.shape) != shape:
            raise UserError(
                f"{location}: {name} has shape {adapter_shape} in the adapter and {shape} in "
                f"{plan.settings.model}: it was trained on another model, or with a larger "
                "vocabulary"
            )


def _require_same_token_rows(plan: Plan, adapter: Adapter) -> set[str]:
    """Raise UserError unless the adapter has rows for exactly the run's new tokens, in its order.

    Returns the names of the weights with these rows.
    """
    location, settings = f"init_adapter: {adapter.folder}", plan.settings
    trained = {
        name: update
        for name, updates in adapter.value_updates.items()
        for update in updates
        if update.rows is not None
    }
    rows = token_rows(plan.shape, settings)
    ids = {} if rows is None else rows.ids
    expected = set() if rows is None else {f"{name}.weight" for name in rows.modules}
    stored = read_json_or_empty(adapter.folder / TOKENIZER).get("added_tokens") or []
    texts = {token["id"]: token["content"] for token in stored}
    indices = next((update.rows or () for update in trained.values()), ())
    tokens = [texts.get(index) for index in indices]
    is_same = all(update.rows == tuple(ids.values()) for update in trained.values())
    if trained.keys() != expected or not is_same or (texts and tokens != list(ids)):
        remedy = "set new_tokens to those of the run that trained it, in its order"
        if None not in tokens:
            remedy = f"set new_tokens: {json.dumps(tokens)}"
        raise UserError(
            f"{location} has trained rows for the token ids {list(indices)}, and this run for "
            f"{ids}; {remedy}, or merge it and start from the merged model"
        )
    size = (len(ids), plan.shape.hidden_size)
    for name, update in trained.items():
        if update.values.shape != size:
            raise UserError(
                f"{location}: {name} has rows of shape {update.values.shape} in the adapter and "
                f"{size} in {settings.model}: it was trained on another model"
            )
    return expected


def _require_same_layers(
    folder: Path, adapter: Adapter, layers: Mapping[str, AdaptedLayer]
) -> None:
    """Raise UserError unless the adapter has a LoRA layer for exactly the layers of the run."""
    # A fused tensor with a single expert is stored like the weight of a linear layer.
    linears = {name.removesuffix(".weight") for name in adapter.layer_updates}
    names, differences = linears | adapter.fused_experts.keys(), []
    for where, keys in (
        ("only in the adapter", names - layers.keys()),
        ("only in this run", layers.keys() - names),
    ):
        if keys:
            differences.append(f"{len(keys)} {where}, such as {min(keys)}")
    if differences:
        # From "model.layers.0.self_attn.q_proj" the name q_proj.
        layer_names = sorted({name.rpartition(".")[2] for name in linears})
        if adapter.fused_experts:
            layer_names.append(EXPERTS)
        raise UserError(
            f"init_adapter: {folder} adapts other layers than this run: {'; '.join(differences)}; "
            f"the adapter has {', '.join(layer_names)}: set lora_target_modules, "
            "layers_to_transform and exclude_modules to select its layers, or set model to its "
            "base; if a run cannot adapt one of them, merge it, and start from the merged model"
        )


def _require_same_sizes(
    settings: RunSettings, adapter: Adapter, update: LayerUpdate, layer: AdaptedLayer
) -> None:
    """Raise UserError unless a layer has the shape, the r and the scaling of the run's layer.

    With `init_adapter_resize` a smaller r and another scaling are allowed.
    """
    location = f"init_adapter: {settings.init_adapter}: {layer.name}"
    linear = layer.linear
    require_size_of_base(location, update, linear.d_out, linear.d_in, settings.model)
    if (is_dora := "magnitude" in update.tensors) != layer.has_magnitude:
        raise UserError(
            f"{location} {'has' if is_dora else 'lacks'} the magnitude of DoRA; set use_dora: "
            f"{str(is_dora).lower()}, or merge it and start from the merged model"
        )
    if update.r > layer.r:
        raise UserError(
            f"{location} has r {update.r} in the adapter and r {layer.r} in this run, and r cannot "
            f"be reduced; set {_r_settings(settings, adapter)}, or larger values"
        )
    if settings.init_adapter_resize:
        return
    if update.r != layer.r:
        raise UserError(
            f"{location} has r {update.r} in the adapter and r {layer.r} in this run; set "
            f"{_r_settings(settings, adapter)}, {_RESIZE}"
        )
    if update.scaling != layer.scaling:
        pattern = adapter.config.get("alpha_pattern") or {}
        pattern_text = ""
        if pattern != settings.alpha_pattern:
            pattern_text = f", alpha_pattern: {json.dumps(pattern)}"
        raise UserError(
            f"{location} is scaled by {update.scaling:g} in the adapter and by {layer.scaling:g} "
            f"in this run; set lora_alpha: {adapter.config['lora_alpha']:g}{pattern_text} and "
            f"use_rslora: {str(update.use_rslora).lower()}, {_RESIZE}"
        )


def _r_settings(settings: RunSettings, adapter: Adapter) -> str:
    """The settings with which each layer of the run has the r of the adapter."""
    text, pattern = f"lora_r: {adapter.config['r']}", adapter.config.get("rank_pattern") or {}
    if pattern != settings.rank_pattern:
        text += f" and rank_pattern: {json.dumps(pattern)}"
    return text


def record_initial_adapter(run_folder: Path, settings: RunSettings) -> None:
    """Write init_adapter.json, the record of the initial adapter, if `init_adapter` is set."""
    record = _initial_record(settings)
    if record is not None:
        write_text(run_folder / RECORD, dump_json(record))


def initial_adapter_of(run_folder: Path, settings: RunSettings) -> dict[str, Any] | None:
    """The record of the run's initial adapter; None without one.

    If that adapter was itself trained from an adapter, its record is under "started_from".
    """
    if settings.init_adapter is None:
        return None
    # The run folder may have been removed during the run.
    return read_json_or_empty(run_folder / RECORD) or _initial_record(settings)


def _initial_record(settings: RunSettings) -> dict[str, Any] | None:
    """Path, SHA-256 and base of the initial adapter; None if the run has none.

    If that adapter was itself trained from an adapter, also the record of the latter.
    """
    folder = settings.init_adapter_folder
    if folder is None:
        return None
    record: dict[str, Any] = {"adapter": settings.dump_unexpanded()["init_adapter"]}
    with suppress(OSError):  # the adapter's folder may have been removed during the run
        record["sha256"] = adapter_sha256(folder)
    trained_on = read_json_or_empty(folder / TRAINED_ON)
    kept = ("base", "revision", QUANTISED)
    record |= {key: trained_on[key] for key in kept if trained_on.get(key)}
    if isinstance(trained_on.get("started_from"), dict):
        record["started_from"] = trained_on["started_from"]
    return record


def lineage_texts(record: Mapping[str, Any] | None) -> list[str]:
    """Path and hash of the adapter of a record, and of each adapter before it, the latest first."""
    texts = []
    while record is not None:
        digest = f" (SHA-256 `{record['sha256'][:12]}`)" if record.get("sha256") else ""
        texts.append(f"`{record.get('adapter')}`{digest}")
        record = record.get("started_from")
    return texts
