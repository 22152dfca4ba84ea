"""MergePlan: the checked inputs of a merge, and the tensors of each shard that it will write."""

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

_QUANTISATION_SETTINGS = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
)  # fmt: skip


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter folder, and the factor by which its changes are multiplied."""

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

    `dtype`: dtype of the merged model, as safetensors names it; None for that of the base. `onto`:
    the run whose quantised base the adapters are added to; None for the base as it is stored.
    `is_undone`: whether the base is a merged model, from which the adapters are to be subtracted.
    """

    dtype: Literal["BF16", "F16", "F32"] | None = None
    device: str = "cpu"
    onto: TrainedBase | None = None
    is_undone: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything that a merge reads and writes.

    `shards`: the files to write. `quantisation`: if `options.onto` is set, how training quantised
    its base. `identity`: record of the inputs and options; merges with equal records write equal
    models.
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

    Raises UserError unless every tensor can be merged. torch is imported only if names and shapes
    of base and adapters match.
    """
    base_files = read_base(base)
    loaded = [read_adapter(adapter.folder) for adapter in adapters]
    for adapter in loaded:
        has_names = adapter.changed_names <= base_files.entries.keys()
        if has_names and not adapter.fused_experts:
            require_compatible(base_files, adapter, any_orientation=True)
    meta = meta_model(base_files, trust_remote_code=options.trust_remote_code)
    loaded = [with_stored_names(adapter, meta) for adapter in loaded]
    for adapter in loaded:
        require_compatible(base_files, adapter)
    changes = changes_by_tensor(loaded, [adapter.weight for adapter in adapters])
    if options.is_undone:
        _require_undoable(changes)
    quantisation = _quantisation(options)
    quantised = _quantised_tensors(base_files, meta, quantisation)
    dtypes = _merged_dtypes(base_files, meta, options)
    shards = _shard_tasks(base_files, changes, dtypes, quantised)
    _require_same_added_rows(shards)
    return MergePlan(
        base=base_files,
        adapters=tuple(loaded),
        options=options,
        shards=shards,
        quantisation=quantisation,
        identity=_identity(base_files, adapters, options),
    )


def _require_same_added_rows(shards: Sequence["ShardTask"]) -> None:
    """Raise UserError unless all tensors with a row for each token get the rows of new tokens.

    Embeddings and head both have a row for each token, so both must be resized.
    """
    tasks = {name: task for shard in shards for name, task in shard.tensors.items()}
    resized_tasks = {name: task for name, task in tasks.items() if task.added_rows}
    for resized_name, resized in resized_tasks.items():
        for name, task in tasks.items():
            had_same_rows = task.entry.shape[:1] == resized.entry.shape[:1]
            if had_same_rows and task.shape[:1] != resized.shape[:1]:
                raise UserError(
                    f"adapter: it has rows of new tokens for {resized_name}, but not for {name}, "
                    f"which also has a row for each token; {WITH_PEFT}"
                )


def _require_undoable(changes: Mapping[str, list[Change]]) -> None:
    """Raise UserError for a change that cannot be subtracted from a merged model."""
    for name, changes_of_tensor in changes.items():
        for change in changes_of_tensor:
            update, reason = change.update, ""
            if isinstance(update, LayerUpdate) and "magnitude" in update.tensors:
                reason = "DoRA divided it by the norms of the base's weight"
            elif not isinstance(update, LayerUpdate) and update.scaling is None:
                reason = "the adapter replaced it"
            if reason:
                raise UserError(
                    f"--undo: {name} of the base cannot be computed from the merged model: "
                    f"{reason}; use the base itself"
                )


def _quantisation(options: MergeOptions) -> "Quantisation | None":
    """How the training of `options.onto` quantised its base; None without it."""
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


def _merged_dtypes(base: Base, meta: MetaModel, options: MergeOptions) -> dict[str, str]:
    """Name of a tensor -> its dtype in the merged model.

    The requested dtype replaces the dtype with the most bytes in the base; tensors in other dtypes
    are not converted. As in `from_pretrained`, modules that the model's class keeps in fp32 are not
    converted to a smaller dtype.
    """
    dtypes = {name: entry.dtype for name, entry in base.entries.items()}
    if options.dtype is None:
        return dtypes
    num_bytes = dict.fromkeys(VALUE_BYTES, 0)
    for entry in base.entries.values():
        if entry.dtype in num_bytes:
            num_bytes[entry.dtype] += entry.end - entry.start
    main_dtype = max(num_bytes, key=num_bytes.__getitem__)
    fp32_modules = set(getattr(meta.model, "_keep_in_fp32_modules_strict", None) or ())
    if options.dtype == "F16":
        fp32_modules |= set(getattr(meta.model, "_keep_in_fp32_modules", None) or ())
    fp32_pattern = re.compile("|".join(fp32_modules) or "(?!)")  # (?!) matches nothing
    for name, dtype in dtypes.items():
        is_kept_in_fp32 = options.dtype != "F32" and fp32_pattern.search(name)
        if dtype == main_dtype and not is_kept_in_fp32:
            dtypes[name] = options.dtype
    return dtypes


def _shard_tasks(
    base: Base,
    changes: Mapping[str, list[Change]],
    dtypes: Mapping[str, str],
    quantised: Mapping[str, str],
) -> tuple["ShardTask", ...]:
    """A task for each shard of the base. The mappings have the names of tensors as keys."""
    from pipeline.adapter.merge_stream import ShardTask, TensorTask

    shards = []
    for file in base.files:
        tensors = {
            name: TensorTask(
                entry=entry,
                dtype=dtypes[name],
                changes=tuple(changes.get(name, ())),
                added_rows=added_rows(entry, changes.get(name, ())),
                quantised=quantised.get(name),
            )
            for name, entry in file.entries.items()
        }
        shards.append(ShardTask(file, tensors))
    return tuple(shards)


def _identity(
    base: Base, adapters: Sequence[WeightedAdapter], options: MergeOptions
) -> dict[str, Any]:
    """Record of the inputs and options; the base's files have their size and modification time."""
    onto: dict[str, Any] | str = "original"
    if options.onto is not None:
        settings = options.onto.settings
        onto = {key: getattr(settings, key) for key in _QUANTISATION_SETTINGS}
        onto["dtype"] = options.onto.dtype
    stats = {file.path.name: file.path.stat() for file in base.files}
    return {
        "base": str(base.folder),
        "base_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "adapters": [
            {
                "folder": str(adapter.folder),
                "weight": adapter.weight,
                "sha256": adapter_sha256(adapter.folder),
                "config_sha256": sha256((adapter.folder / CONFIG).read_bytes()).hexdigest(),
            }
            for adapter in adapters
        ],
        "onto": onto,
        "dtype": options.dtype or "keep",
        "device": options.device,
        "is_undone": options.is_undone,
        "versions": {name: version(name) for name in ("rankzero", "torch", "peft")},
    }
