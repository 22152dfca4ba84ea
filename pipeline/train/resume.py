"""Selection of the checkpoint from which a start resumes, before torch is imported."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.data.dataset.reader import DataIndex
from pipeline.errors import UserError
from pipeline.model.fingerprint import base_fingerprint, require_base_of_run
from pipeline.plan.given.adapter_counts import adapter_shapes
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import DATA_MADE_WITH, DIVISION, Checkpoints, Identity
from pipeline.train.start import Start, is_checkpoint_path, settings_hash

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "safetensors")


def checkpoints_of(
    folder: Path, plan: Plan, start: Start, data: str, index: DataIndex | None = None
) -> Checkpoints:
    """The checkpoints of a run folder, for a run with this plan.

    To resume from one of them, the whole base is read and hashed. For a start from step 0,
    `RunFolder.open` adds the fingerprint of the base, which is computed while the ranks load it.

    `data`: key of the training documents, a hash of the training files and of the settings that
    turn them into documents. `index`: index of the prepared data; None before it is prepared.
    Raises UserError if the run was started with another base.
    """
    settings = plan.settings
    base = None
    is_path = is_checkpoint_path(settings.resume)
    if start == "resume" and "base" not in settings.accept_changes:
        base = require_base_of_run(folder, settings.model_folder)
    elif start == "resume" or is_path:
        base = base_fingerprint(settings.model_folder).digest
    shapes = adapter_shapes(plan.shape, settings)
    identity = Identity(
        data=data,
        tokens=None if index is None else _digests(index),
        base=base,
        total_steps=None if plan.schedule is None else plan.schedule.total_steps,
        adapter=f"lora_r {settings.lora_r}, lora_alpha {settings.alpha:g}, "
        f"{len(shapes)} tensors of {plan.trainable} parameters"
        + "".join(f", {name} {value}" for name, value in settings.adapter_options.items()),
    )
    return Checkpoints(
        folder / "checkpoints",
        identity,
        settings.save_total_limit,
        accepted=settings.accept_changes,
        origin=str(Path(settings.resume).resolve()) if is_path else None,
        shapes=shapes,
        model_folder=settings.model_folder,
        metadata=_entries_for_users(plan)
        | ({} if index is None else {DATA_MADE_WITH: dict(index.train.made_with)}),
    )


def _digests(index: DataIndex) -> dict[str, str]:
    """Key of each split -> digest of its tokens. Splits prepared by old versions have no digest."""
    return {split.key: split.content for split in index.splits.values() if split.content}


def checkpoint_to_resume(
    checkpoints: Checkpoints, resume: str, start: Start
) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, None for step 0; and a log line for each skipped checkpoint.

    A resume starts from the newest intact checkpoint of the folder, or like a new run if the folder
    has no checkpoint. A new run starts from the checkpoint of `resume: PATH`, or from step 0. It
    never starts from the checkpoints in its folder, which belong to the run that it replaces.
    Raises UserError if this run cannot resume from the checkpoint. `resume`: the setting. `start`:
    the result of `decide_start`.
    """
    path, notes = checkpoints.newest() if start == "resume" else (checkpoints.intact_origin(), [])
    if path is not None:
        checkpoints.require_resumable(path)
    elif notes:
        raise UserError(
            f"resume: {resume}, but no checkpoint is intact: {'; '.join(notes)}; restore one from "
            "a backup, or set resume: never to start from step 0"
        )
    elif resume == "must":
        raise UserError(
            "resume: must, but there is no checkpoint; set resume: auto to start from step 0"
        )
    return path, notes


def _entries_for_users(plan: Plan) -> dict[str, Any]:
    """Entries of state.json for users. A resume only logs which of them have changed."""
    settings, layout = plan.settings, plan.layout
    schedule = {} if plan.schedule is None else vars(plan.schedule)
    return {
        "schedule": {
            **schedule,
            "lr": settings.lr,
            "min_lr_ratio": settings.min_lr_ratio,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "global_batch_size": layout.global_batch_size,
        },
        DIVISION: {
            "ranks": layout.world_size,
            "zero_stage": layout.zero_stage,
            "batch_size": layout.micro_batch_size,
            "sequence_parallel_size": layout.sequence_parallel_size,
            "mlp_tiles": layout.mlp_tiles,
        },
        "settings_sha256": settings_hash(plan),
        "versions": {"rankzero": __version__} | {name: version(name) for name in _PACKAGES},
    }
