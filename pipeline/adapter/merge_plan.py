"""Plan of a merge: its inputs, checked, and the tensors of each shard that it will write."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.adapter.adapter_file import CONFIG, WITH_PEFT, Adapter, LayerUpdate, read_adapter
from pipeline.adapter.merge_inputs import (
    Base,
    Change,
    MetaModel,
    added_rows,
    changes_by_tensor,
    meta_model,
    read_base,
    require_compatible,
    with_stored_names,
)
from pipeline.adapter.trained_on import adapter_sha256
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.model.tensor_files import VALUE_BYTES

if TYPE_CHECKING:
    from pipeline.adapter.merge_stream import ShardTask
    from pipeline.model.base import Quantisation

_OPTIONS_OF_QUANTISATION = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
)  # fmt: skip


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter folder, and the factor of its changes."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class TrainedBase:
    """The settings of a run that quantised its base, and its training dtype."""

    settings: RunSettings
    dtype: str


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of a merge.

    `dtype`: of the merged model, as safetensors names it; None for that of the base. `onto`: the
    run whose quantised base the adapters are added to; None for the base as it is stored.
    `is_undone`: the base is a merged model, from which the adapters are subtracted.
    """

    dtype: Literal["BF16", "F16", "F32"] | None = None
    device: str = "cpu"
    onto: TrainedBase | None = None
    is_undone: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything that a merge reads and writes.

    `identity`: record of the inputs and options; merges with equal records write equal models.
    """

    base: Base
    adapters: tuple[Adapter, ...]
    options: MergeOptions
    shards: tuple["ShardTask", ...]
    quantisation: "Quantisation | None"
    identity: Mapping[str, Any]

    @property
    def folders(self) -> list[Path]:
        """Folders that the merge reads."""
        return [self.base.folder, *(adapter.folder for adapter in self.adapters)]


def plan_merge(base: Path, adapters: Sequence[WeightedAdapter], options: MergeOptions) -> MergePlan:
    """Read and check the inputs of a merge.

    Raises UserError unless every tensor can be merged; torch is imported only if names and shapes
    fit.
    """
    model = read_base(base)
    loras = [read_adapter(each.folder) for each in adapters]
    for lora in loras:
        if lora.names <= model.entries.keys() and not lora.fused:
            require_compatible(model, lora, any_orientation=True)
    meta = meta_model(model, trust_remote_code=options.trust_remote_code)
    loras = [with_stored_names(lora, meta) for lora in loras]
    for lora in loras:
        require_compatible(model, lora)
    changes = changes_by_tensor(loras, [each.weight for each in adapters])
    if options.is_undone:
        _require_undoable(changes)
    quantisation = _quantisation(options)
    quantised = _quantised_tensors(model, meta, quantisation)
    shards = _shard_tasks(model, changes, _dtypes(model, meta, options), quantised)
    _require_same_rows(shards)
    return MergePlan(
        base=model,
        adapters=tuple(loras),
        options=options,
        shards=shards,
        quantisation=quantisation,
        identity=_identity(model, adapters, options),
    )


def _require_same_rows(shards: Sequence["ShardTask"]) -> None:
    """Raise UserError unless all tensors with a row for each token get the rows of new tokens."""
    tasks = {name: task for shard in shards for name, task in shard.tensors.items()}
    for resized, task in tasks.items():
        for name, other in tasks.items() if task.added_rows else ():
            is_same = other.shape[:1] == task.shape[:1]
            if other.entry.shape[:1] == task.entry.shape[:1] and not is_same:
                raise UserError(
                    f"adapter: it has rows of new tokens for {resized}, but not for {name}, which "
                    f"also has a row for each token; {WITH_PEFT}"
                )


def _require_undoable(changes: Mapping[str, list[Change]]) -> None:
    for name, of_tensor in changes.items():
        for change in of_tensor:
            update, reason = change.update, ""
            if isinstance(update, LayerUpdate) and "magnitude" in update.parts:
                reason = "DoRA divided it by the norms of the base's weight"
            elif not isinstance(update, LayerUpdate) and update.scaling is None:
                reason = "the adapter replaced it"
            if reason:
                raise UserError(
                    f"--undo: {name} of the base cannot be computed from the merged model: "
                    f"{reason}; use the base itself"
                )


def _quantisation(options: MergeOptions) -> "Quantisation | None":
    if options.onto is None:
        return None
    from pipeline.model.base import DTYPES, Quantisation
    from pipeline.plan.given.shape import read_shape

    settings = options.onto.settings
    shape = read_shape(str(settings.model_folder), trust_remote_code=options.trust_remote_code)
    return Quantisation(settings=settings, shape=shape, dtype=DTYPES[options.onto.dtype])


def _quantised_tensors(
    base: Base, meta: MetaModel, quantisation: "Quantisation | None"
) -> dict[str, str]:
    """Name of a tensor that was quantised in training -> its value of `TensorTask.quantised`."""
    if quantisation is None:
        return {}
    from transformers.pytorch_utils import Conv1D

    if meta.model is None:
        raise UserError(f"base: {meta.error}; without it only --onto original is possible")
    tensors = {}
    for layer in quantisation.layers(meta.model):
        name = meta.stored_name(f"{layer}.weight")
        if name not in base.entries:
            raise UserError(
                f"base: {base.folder} stores {name} in several tensors, so its quantised form "
                "cannot be computed tensor by tensor; use --onto original"
            )
        is_transposed = isinstance(meta.model.get_submodule(layer), Conv1D)
        tensors[name] = "transposed" if is_transposed else "stored"
    return tensors


def _dtypes(base: Base, meta: MetaModel, options: MergeOptions) -> dict[str, str]:
    """Name of a tensor -> its dtype in the merged model.

    Only tensors in the most frequent dtype are converted, without those that the model's class
    keeps in fp32, as `from_pretrained` does.
    """
    entries = base.entries
    if options.dtype is None:
        return {name: entry.dtype for name, entry in entries.items()}
    sizes = dict.fromkeys((*VALUE_BYTES, ""), 0)
    for entry in entries.values():
        sizes[entry.dtype if entry.dtype in VALUE_BYTES else ""] += entry.end - entry.start
    main = max(VALUE_BYTES, key=sizes.__getitem__)
    kept_in_fp32 = set(getattr(meta.model, "_keep_in_fp32_modules_strict", None) or ())
    if options.dtype == "F16":
        kept_in_fp32 |= set(getattr(meta.model, "_keep_in_fp32_modules", None) or ())
    pattern = re.compile("|".join(kept_in_fp32) or "(?!)")
    return {
        name: options.dtype
        if entry.dtype == main and (options.dtype == "F32" or not pattern.search(name))
        else entry.dtype
        for name, entry in entries.items()
    }


def _shard_tasks(
    base: Base,
    changes: Mapping[str, list[Change]],
    dtypes: Mapping[str, str],
    quantised: Mapping[str, str],
) -> tuple["ShardTask", ...]:
    from pipeline.adapter.merge_stream import ShardTask, TensorTask

    return tuple(
        ShardTask(
            file,
            {
                name: TensorTask(
                    entry=entry,
                    dtype=dtypes[name],
                    changes=tuple(changes.get(name, ())),
                    added_rows=added_rows(entry, changes.get(name, ())),
                    quantised=quantised.get(name),
                )
                for name, entry in file.entries.items()
            },
        )
        for file in base.files
    )


def _identity(
    base: Base, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> dict[str, Any]:
    """Record of the inputs and options; the base's files are recorded by size and time."""
    onto: dict[str, Any] | str = "original"
    if options.onto is not None:
        settings = options.onto.settings
        onto = {key: getattr(settings, key) for key in _OPTIONS_OF_QUANTISATION}
        onto["dtype"] = options.onto.dtype
    return {
        "base": str(base.folder),
        "base_files": {
            file.path.name: [(stat := file.path.stat()).st_size, stat.st_mtime_ns]
            for file in base.files
        },
        "adapters": [
            {
                "folder": str(each.folder),
                "weight": each.weight,
                "sha256": adapter_sha256(each.folder),
                "config_sha256": sha256((each.folder / CONFIG).read_bytes()).hexdigest(),
            }
            for each in adapters
        ],
        "onto": onto,
        "dtype": options.dtype or "keep",
        "device": options.device,
        "is_undone": options.is_undone,
        "versions": {name: version(name) for name in ("rankzero", "torch", "peft")},
    }
