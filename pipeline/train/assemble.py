"""Assembly of a run: model, engine, checkpoints and the training state to resume from."""

import logging
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.adapter.gather import OptimizerState, restore
from pipeline.cluster.heartbeat import LOADING
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.errors import UserError
from pipeline.model.adapter import attach_adapter, expected_shapes, frozen_checksum
from pipeline.model.base import load_base
from pipeline.model.fingerprint import (
    base_fingerprint,
    record_base_of_run,
    require_base_of_run,
)
from pipeline.model.proof import require_proof
from pipeline.plan.given.class_proof import Proof
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import Checkpoints, Identity, Progress
from pipeline.train.context import RunContext
from pipeline.train.display import ProgressDisplay
from pipeline.train.engine import Engine
from pipeline.train.folder import RunFolder, write_plan, write_run
from pipeline.train.metrics import MetricsFile, PeakBytes
from pipeline.train.start import Start, is_checkpoint_path, settings_hash
from pipeline.train.state import TrainingState
from pipeline.train.writer import CheckpointWriter

logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "safetensors")


def assemble(context: RunContext, folder: RunFolder, index: DataIndex) -> TrainingState:
    """Build the training state and restore the newest checkpoint if there is one. Collective."""
    plan, session, heartbeat = context.plan, context.session, context.heartbeat
    checkpoints = _checkpoints(context, index)
    resumed, notes = session.rank_zero_first(
        lambda: _checkpoint_to_resume(checkpoints, context.settings.resume, folder.start)
    )
    checkpoint = None if resumed is None else Path(resumed)
    if session.is_rank_zero:
        record_base_of_run(folder.path, context.settings.model_folder)
    proof = Proof(**session.rank_zero_first(lambda: asdict(require_proof(plan))))
    plan = context.plan = plan.with_proof(proof)
    if session.is_rank_zero:
        write_plan(folder.path, plan, is_debug=context.is_debug)
    peak = PeakBytes(session.device, is_watched=session.is_rank_zero)
    loading, creating, restoring = LOADING
    heartbeat.beat(loading)
    model = attach_adapter(load_base(plan, session.device), plan)
    heartbeat.beat(creating)
    engine = Engine(model, plan, heartbeat.beat)
    progress = Progress()
    if checkpoint is not None:
        heartbeat.beat(restoring)
        progress = checkpoints.read_progress(checkpoint)
        weights, moments = checkpoints.read_tensors(checkpoint)
        restore(
            engine.deepspeed,
            engine.parameters,
            weights,
            OptimizerState(
                moments=moments,
                step=progress.optimizer_step,
                loss_scaler=progress.loss_scaler,
            ),
        )
        notes = [*notes, f"resuming from step {progress.step} ({checkpoint})"]
        notes += _reset_unusable_best(context, checkpoints, progress, index)
    progress.eval_key = _eval_key(index)
    for note in notes:
        logger.info(note)
    if folder.status is not None:
        folder.status.update(step=progress.step)
    is_own = checkpoint is not None and checkpoint.parent == folder.path / "checkpoints"
    writer, metrics = None, None
    if session.is_rank_zero:
        writer = CheckpointWriter(checkpoints, lambda: _restore_folder(folder, context))
        metrics = MetricsFile(folder.path / "metrics.jsonl", progress.step)
        folder.wait_for_writes = writer.wait_at_most
    return TrainingState(
        context=context,
        folder=folder,
        engine=engine,
        train_split=open_split(index.train),
        eval_split=None if index.eval is None else open_split(index.eval),
        checkpoints=checkpoints,
        progress=progress,
        saved=replace(progress) if is_own else None,
        display=_display(context, progress.step),
        peak=peak,
        writer=writer,
        metrics=metrics,
        frozen_checksum=frozen_checksum(engine.deepspeed.module) if context.is_debug else None,
    )


def _checkpoints(context: RunContext, index: DataIndex) -> Checkpoints:
    plan, settings = context.plan, context.settings
    shapes = expected_shapes(plan)

    def fingerprint() -> str:
        with context.stops.interrupting():  # it reads the whole base
            if "base" in settings.accept_changes:
                return base_fingerprint(settings.model_folder).digest
            return require_base_of_run(context.folder, settings.model_folder)

    identity = Identity(
        data=index.train.key,
        base=context.session.rank_zero_first(fingerprint),
        total_steps=plan.steps.total_steps,
        adapter=f"lora_r {settings.lora_r}, lora_alpha {settings.alpha:g}, {len(shapes)} tensors "
        f"of {plan.trainable} parameters",
    )
    is_named = is_checkpoint_path(settings.resume)
    return Checkpoints(
        context.folder / "checkpoints",
        identity,
        settings.save_total_limit,
        accepted=settings.accept_changes,
        origin=str(Path(settings.resume).resolve()) if is_named else None,
        shapes=shapes,
        model_folder=settings.model_folder,
        about=_about(plan),
    )


def _about(plan: Plan) -> dict[str, Any]:
    """Information for users in state.json; a resume does not read it."""
    settings = plan.settings
    return {
        "schedule": {
            **vars(plan.steps),
            "lr": settings.lr,
            "min_lr_ratio": settings.min_lr_ratio,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "global_batch_size": plan.layout.global_batch_size,
        },
        "settings_sha256": settings_hash(plan),
        "versions": {"rankzero": __version__} | {name: version(name) for name in _PACKAGES},
    }


def _checkpoint_to_resume(
    checkpoints: Checkpoints, resume: str, start: Start
) -> tuple[str | None, list[str]]:
    """The newest intact checkpoint or None, and a log line for each damaged one.

    Called on rank 0 before the model is loaded. A new run starts from a checkpoint only with
    `resume: PATH`.
    """
    if resume == "never" or (start == "new" and not is_checkpoint_path(resume)):
        return None, []
    path, notes = checkpoints.newest()
    if path is not None:
        checkpoints.read_progress(path)
    elif resume == "must" and not notes:
        raise UserError("resume: must, but there is no checkpoint; set resume: auto to start")
    elif notes:
        raise UserError(
            f"resume: {resume}, but no checkpoint is intact: {'; '.join(notes)}; put one back, "
            "or set resume: never to start from step 0"
        )
    return (None if path is None else str(path)), notes


def _reset_unusable_best(
    context: RunContext, checkpoints: Checkpoints, progress: Progress, index: DataIndex
) -> list[str]:
    """Reset the lowest held-out loss if its adapter is missing or the held-out rows changed."""
    reason = None
    if progress.best_step and progress.eval_key not in (None, _eval_key(index)):
        reason = "eval_data changed, so its losses cannot be compared with the earlier ones"
    elif context.settings.keep_best and progress.best_step and not checkpoints.has_best(progress):
        reason = "the best adapter so far is missing"
    if reason is None:
        return []
    progress.best_loss, progress.best_step, progress.evaluations_since_best = None, 0, 0
    return [f"{reason}; earlier steps no longer count for the best adapter"]


def _eval_key(index: DataIndex) -> str | None:
    return None if index.eval is None else index.eval.key


def _display(context: RunContext, step: int) -> ProgressDisplay:
    return ProgressDisplay(
        context.plan.steps.total_steps,
        step,
        context.settings.logging_steps,
        is_shown=context.session.is_rank_zero,
    )


def _restore_folder(folder: RunFolder, context: RunContext) -> None:
    """Write run.yaml and the plans again if the run folder was deleted during the run."""
    if not (folder.path / "run.yaml").is_file():
        write_run(folder.path, context.plan, is_debug=context.is_debug)
