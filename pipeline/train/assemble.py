"""Make everything that the loop uses: model, engine, checkpoints, resume."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.adapter.gather import OptimizerState, restore
from pipeline.cluster.heartbeat import LOADING, Pulse
from pipeline.cluster.session import Session
from pipeline.cluster.stop import StopRequests
from pipeline.data.dataset.reader import Split
from pipeline.errors import UserError
from pipeline.model.adapter import attach_adapter, expected_shapes, frozen_checksum
from pipeline.model.base import load_base
from pipeline.model.fingerprint import record_base_of_run
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import Checkpoints, Identity, Progress
from pipeline.train.engine import Engine
from pipeline.train.metrics import InputWait, MetricsFile, PeakBytes
from pipeline.train.progress import ProgressDisplay
from pipeline.train.saving import Saver
from pipeline.train.start import settings_hash, write_run
from pipeline.train.status import RunStatus
from pipeline.train.training import Training

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "safetensors")


def assemble(
    plan: Plan,
    session: Session,
    status: RunStatus | None,
    stops: StopRequests,
    pulse: Pulse,
    *,
    train_split: Split,
    eval_split: Split | None,
    data_key: str,
    base_fingerprint: str,
    is_debug: bool,
) -> Training:
    """A run that is ready to step, gone on from its newest checkpoint if there is one.

    Collective: every rank.
    """
    settings, folder = plan.settings, Path(plan.settings.output_dir)
    is_named = settings.resume not in ("auto", "must", "never")
    checkpoints = Checkpoints(
        folder / "checkpoints",
        _identity(plan, data_key, base_fingerprint),
        settings.save_total_limit,
        accepted=settings.accept_changes,
        origin=str(Path(settings.resume).resolve()) if is_named else None,
        about=_about(plan),
    )
    found, notes = _checkpoint_to_resume(
        checkpoints, session, settings.resume, settings.model_folder
    )
    if session.is_rank_zero:
        record_base_of_run(folder, settings.model_folder)
    peak = PeakBytes(session.device, is_watched=session.is_rank_zero)
    loading, making, restoring = LOADING
    pulse.beat(loading)
    model = attach_adapter(load_base(plan, session.device), plan)
    pulse.beat(making)
    engine = Engine(model, plan, pulse.beat)
    progress = Progress()
    if found is not None:
        pulse.beat(restoring)
        weights, moments = checkpoints.read_tensors(found)
        progress = checkpoints.read_progress(found, settings.model_folder)
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
        notes = [*notes, f"going on from step {progress.step} ({found})"]
        if settings.keep_best and progress.best_step and not checkpoints.has_best(progress):
            progress.best_loss, progress.best_step = None, 0
            notes = [*notes, "the best adapter so far is not there any more; the best from here on"]
    if status is not None:
        status.update(step=progress.step)
    is_shown = session.is_rank_zero
    is_own = found is not None and found.parent == folder / "checkpoints"
    display = ProgressDisplay(
        plan.steps.total_steps, progress.step, settings.logging_steps, is_shown=is_shown
    )
    for note in notes:
        display.say(note)
    return Training(
        plan=plan,
        session=session,
        engine=engine,
        train_split=train_split,
        eval_split=eval_split,
        folder=folder,
        checkpoints=checkpoints,
        progress=progress,
        saved=replace(progress) if is_own else None,
        display=display,
        stops=stops,
        pulse=pulse,
        peak=peak,
        input_wait=InputWait(),
        saver=Saver(checkpoints, lambda: _put_back(folder, plan)) if is_shown else None,
        metrics=MetricsFile(folder / "metrics.jsonl", progress.step) if is_shown else None,
        status=status,
        frozen_checksum=frozen_checksum(engine.deepspeed.module) if is_debug else None,
    )


def _identity(plan: Plan, data_key: str, base_fingerprint: str) -> Identity:
    settings, shapes = plan.settings, expected_shapes(plan)
    return Identity(
        data=data_key,
        base=base_fingerprint,
        total_steps=plan.steps.total_steps,
        adapter=f"lora_r {settings.lora_r}, lora_alpha {settings.alpha:g}, {len(shapes)} tensors "
        f"of {plan.trainable} parameters",
    )


def _about(plan: Plan) -> dict[str, Any]:
    """What else state.json says."""
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


def _put_back(folder: Path, plan: Plan) -> None:
    """A run folder that was deleted while the run goes on becomes one again."""
    if not (folder / "run.yaml").is_file():
        write_run(folder, plan)


def _checkpoint_to_resume(
    checkpoints: Checkpoints, session: Session, resume: str, model_folder: Path | None = None
) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, which belongs to this run, and what to say of damaged ones.

    Before the model is loaded. Rank 0 chooses, so that all ranks go on from the same one.
    """

    def look() -> tuple[str | None, list[str]]:
        path, notes = checkpoints.newest()
        if path is not None:
            checkpoints.read_progress(path, model_folder)
        elif resume == "must" and not notes:
            raise UserError("resume: must, but there is no checkpoint; set resume: auto to start")
        elif notes:
            raise UserError(
                f"resume: {resume}, but no checkpoint is intact: {'; '.join(notes)}; put one back, "
                "or set resume: never to start anew"
            )
        return (None if path is None else str(path)), notes

    if resume == "never":
        return None, []
    found, notes = session.rank_zero_first(look)
    return (None if found is None else Path(found)), notes
