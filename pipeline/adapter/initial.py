"""Initial adapter: the PEFT folder that a new run starts from, checked and recorded. No torch.

Only headers, adapter_config.json and trained_on.json are read; initial_weights.py loads tensors.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter_file import Adapter, read_adapter
from pipeline.adapter.trained_on import TRAINED_ON, adapter_sha256, require_same_base
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json_or_empty, write_text
from pipeline.plan.given.adapter_counts import AdaptedLayer, adapted_layers
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.plan import Plan

RECORD = "init_adapter.json"  # in a run folder
_RESIZE = "or set init_adapter_resize: true, which keeps the outputs"
_TO_START = (
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
    if "base" in settings.accept_changes:
        return
    try:
        require_same_base(settings.model_folder, folder, _TO_START)
    except UserError as error:
        raise UserError(f"init_adapter: {folder}: {error}") from None


def read_initial_adapter(plan: Plan) -> Adapter:
    """The header of `init_adapter`. Raises UserError unless it has the layers of this run."""
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
    _require_same_values(plan, adapter)
    layers = {f"{layer.name}.weight": layer for layer in adapted_layers(plan.shape, settings)}
    _require_same_layers(folder, adapter, layers)
    for key, layer in layers.items():
        _require_same_sizes(settings, adapter, key, layer)
    return adapter


def _require_same_values(plan: Plan, adapter: Adapter) -> None:
    """Raise UserError unless the adapter has values for exactly the modules of modules_to_save."""
    place = f"init_adapter: {adapter.folder}"
    modules = saved_modules(plan.shape, plan.settings)
    shapes = {f"{m.name}.{name}": shape for m in modules for name, shape in m.shapes.items()}
    tied = {f"{module.tied_name}.weight" for module in modules if module.tied_name}
    names = adapter.values.keys() - tied
    if others := [n for n in names if any(v.rows or v.scaling for v in adapter.values[n])]:
        raise UserError(
            f"{place} has new tokens or a trained bias: {min(others)}; a run cannot start from it"
        )
    if differences := shapes.keys() ^ names:
        values = sorted({name.rpartition(".")[0] for name in names})
        raise UserError(
            f"{place} and this run train other modules in full, such as {min(differences)}; set "
            f"modules_to_save: [{', '.join(values)}]"
        )
    if tied and not adapter.config.get("ensure_weight_tying"):
        raise UserError(
            f"{place} was trained without ensure_weight_tying, so its embeddings and head differ, "
            f"but {plan.settings.model} ties them; merge it, and start from the merged model"
        )
    for name, shape in shapes.items():
        if (present := adapter.values[name][0].part.shape) != shape:
            raise UserError(
                f"{place}: {name} has shape {present} in the adapter and {shape} in "
                f"{plan.settings.model}: it was trained on another model, or with a larger "
                "vocabulary"
            )


def _require_same_layers(
    folder: Path, adapter: Adapter, layers: Mapping[str, AdaptedLayer]
) -> None:
    differences = [
        f"{len(keys)} {where}, such as {min(keys).removesuffix('.weight')}"
        for where, keys in (
            ("only in the adapter", adapter.updates.keys() - layers.keys()),
            ("only in this run", layers.keys() - adapter.updates.keys()),
        )
        if keys
    ]
    if differences:
        ends = sorted({key.split(".")[-2] for key in adapter.updates})
        raise UserError(
            f"init_adapter: {folder} adapts other layers than this run: {'; '.join(differences)}; "
            f"the adapter has {', '.join(ends)}: set lora_target_modules, layers_to_transform and "
            "exclude_modules to select its layers, or set model to its base"
        )


def _require_same_sizes(
    settings: RunSettings, adapter: Adapter, key: str, layer: AdaptedLayer
) -> None:
    update, where = adapter.updates[key], f"init_adapter: {settings.init_adapter}: {layer.name}"
    if update.shape != (layer.linear.d_out, layer.linear.d_in):
        raise UserError(
            f"{where} is {update.shape} in its base and {(layer.linear.d_out, layer.linear.d_in)} "
            f"in {settings.model}: it was trained on another model"
        )
    if "magnitude" in update.parts:
        raise UserError(f"{where}: a DoRA adapter, which a run cannot start from")
    if update.r > layer.r:
        raise UserError(
            f"{where} has r {update.r} in the adapter and r {layer.r} in this run, and r cannot be "
            f"reduced; set lora_r: {update.r} or more"
        )
    if settings.init_adapter_resize:
        return
    if update.r != layer.r:
        raise UserError(
            f"{where} has r {update.r} in the adapter and r {layer.r} in this run; set "
            f"lora_r: {update.r}, {_RESIZE}"
        )
    if update.scaling != layer.scaling:
        raise UserError(
            f"{where} is scaled by {update.scaling:g} in the adapter and by {layer.scaling:g} in "
            f"this run; set lora_alpha: {update.alpha:g} and use_rslora: "
            f"{str(update.use_rslora).lower()}, {_RESIZE}"
        )


def record_initial_adapter(run_folder: Path, settings: RunSettings) -> None:
    """Write RUN/init_adapter.json, the record of the initial adapter, if `init_adapter` is set."""
    record = _initial_record(settings)
    if record is not None:
        write_text(run_folder / RECORD, dump_json(record))


def initial_adapter_of(run_folder: Path, settings: RunSettings) -> dict[str, Any] | None:
    """The record of the run's initial adapter, which contains the records of its predecessors."""
    if settings.init_adapter is None:
        return None
    # The run folder may have been removed during the run.
    return read_json_or_empty(run_folder / RECORD) or _initial_record(settings)


def _initial_record(settings: RunSettings) -> dict[str, Any] | None:
    """Path, SHA-256 and base of the initial adapter, and its own `started_from` if it has one."""
    folder = settings.init_adapter_folder
    if folder is None:
        return None
    record: dict[str, Any] = {"adapter": settings.dump_unexpanded()["init_adapter"]}
    with suppress(OSError):  # its folder may be gone by the end of the run
        record["sha256"] = adapter_sha256(folder)
    trained_on = read_json_or_empty(folder / TRAINED_ON)
    record |= {key: trained_on[key] for key in ("base", "revision") if trained_on.get(key)}
    if isinstance(trained_on.get("started_from"), dict):
        record["started_from"] = trained_on["started_from"]
    return record


def lineage_texts(record: Mapping[str, Any] | None) -> list[str]:
    """A text for the adapter of a record and for each predecessor, the latest first."""
    texts = []
    while record is not None:
        digest = f" (SHA-256 `{record['sha256'][:12]}`)" if record.get("sha256") else ""
        texts.append(f"`{record.get('adapter')}`{digest}")
        record = record.get("started_from")
    return texts
