"""Make everything that the loop uses: model, engine, checkpoints, resume."""

from pathlib import Path

from pipeline.adapter.gather import restore
from pipeline.cluster.session import Session
from pipeline.data.prepared import Split
from pipeline.errors import UserError
from pipeline.model.adapter import attach_adapter, frozen_checksum
from pipeline.model.base import load_base
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import Checkpoints, Identity, Progress
from pipeline.train.engine import Engine
from pipeline.train.loop import Training
from pipeline.train.metrics import MetricsFile
from pipeline.train.progress import ProgressDisplay
from pipeline.train.status import RunStatus
from pipeline.train.stop import StopRequests


def assemble(
    plan: Plan,
    session: Session,
    status: RunStatus | None,
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
    stops = StopRequests(folder, settings.time_limit_s)
    stops.listen()
    identity = Identity(data_key, base_fingerprint, plan.steps.total_steps)
    checkpoints = Checkpoints(folder / "checkpoints", identity, settings.save_total_limit)
    found, notes = _checkpoint_to_resume(checkpoints, session, settings.resume)
    engine = Engine(attach_adapter(load_base(plan, session.device), plan), plan)
    progress = Progress()
    if found is not None:
        weights, moments = checkpoints.read_tensors(found)
        progress = checkpoints.read_progress(found)
        restore(
            engine.deepspeed,
            engine.parameters,
            weights,
            moments,
            optimizer_step=progress.optimizer_step,
        )
        notes = [*notes, f"going on from step {progress.step} ({found})"]
    if status is not None:
        status.update(step=progress.step)
    is_shown = session.is_rank_zero
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
        display=display,
        stops=stops,
        metrics=MetricsFile(folder / "metrics.jsonl", progress.step) if is_shown else None,
        status=status,
        frozen_checksum=frozen_checksum(engine.deepspeed.module) if is_debug else None,
    )


def _checkpoint_to_resume(
    checkpoints: Checkpoints, session: Session, resume: str
) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, which belongs to this run, and what to say of damaged ones.

    Before the model is loaded. Rank 0 chooses, so that all ranks go on from the same one.
    """

    def look() -> tuple[str | None, list[str]]:
        path, notes = checkpoints.newest()
        if path is None and resume == "must":
            said = "; ".join(notes) or "there is none"
            raise UserError(f"resume: must, but there is no intact checkpoint: {said}")
        if path is not None:
            checkpoints.read_progress(path)
        return (None if path is None else str(path)), notes

    if resume == "never":
        return None, []
    found, notes = session.rank_zero_first(look)
    return (None if found is None else Path(found)), notes
