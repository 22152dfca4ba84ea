"""End of a run: gathers, verifies and publishes the adapter, or reports a stop."""

import logging
import shlex

import torch

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.products import mark_outdated
from pipeline.adapter.publish import on_unchanged_base, publish_adapter
from pipeline.cluster.progress import show_progress
from pipeline.commands import command
from pipeline.errors import RankZeroError, Stopped
from pipeline.model.adapter import frozen_checksum
from pipeline.model.fingerprint import base_of_run
from pipeline.train.state import TrainingState

logger = logging.getLogger(__name__)


def finish(run: TrainingState, stop_reason: str | None) -> None:
    """Publish the adapter, that is, write it in peft's format to the folder `adapter`. Collective.

    `stop_reason`: why the training loop was stopped; None if it reached its end. Raises Stopped if
    there is a reason.
    """
    progress, folder = run.progress, run.folder.path
    if run.metrics is not None:
        run.metrics.flush()
    if stop_reason is not None:
        saved = "a checkpoint was written" if progress.optimizer_step else "no update was made yet"
        with_auto = " with resume=auto" if run.plan.settings.resume == "never" else ""
        raise Stopped(
            f"stopped at step {progress.step} of {run.plan.steps.total_steps} ({stop_reason}); "
            f"{saved}: start again{with_auto} to resume"
        )
    run.heartbeat.beat("gathering the adapter")
    with show_progress("gathering and writing the adapter"):
        weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
        run.heartbeat.beat("publishing")
        step = run.session.rank_zero_first(lambda: _publish(run, weights))
    logger.info("adapter of step %d: %s", step, folder / "adapter")
    run.heartbeat.beat("waiting for the last save")
    with show_progress("waiting for the last save"):
        run.session.rank_zero_first(lambda: _require_saved(run))
    if run.frozen_checksum is not None:
        _require_frozen_base(run)
        logger.info("debug: losses finite, every lora_B changed, no frozen weight changed")
    logger.info("%s", _next_commands(run))


def _next_commands(run: TrainingState) -> str:
    """The commands that a user runs next, with what each does."""
    commands = {"merge": "add the adapter to the base"}
    if run.eval_split is not None:
        commands["score"] = "compare it with the base"
    commands["report"] = "write report.html"
    folder = shlex.quote(str(run.folder.path))
    lines = [(f"{command(verb)} {folder}", purpose) for verb, purpose in commands.items()]
    width = max(len(line) for line, _ in lines)
    return "\n".join(
        f"{'next' if i == 0 else '':<11}{line:<{width}}  # {purpose}"
        for i, (line, purpose) in enumerate(lines)
    )


def _require_saved(run: TrainingState) -> None:
    """If the last save failed, log that, or raise with `save_must_succeed`. On rank 0."""
    assert run.writer is not None
    if run.plan.settings.save_must_succeed:
        run.writer.require_written()
    elif failure := run.writer.wait():
        logger.warning(failure)


def _require_frozen_base(run: TrainingState) -> None:
    has_changed = frozen_checksum(run.engine.deepspeed.module) != run.frozen_checksum
    if run.session.any_rank(has_changed):
        raise RankZeroError("debug: a frozen weight of the base changed; this is a bug")


def _publish(run: TrainingState, weights: dict[str, torch.Tensor]) -> int:
    """Publish the last or the best adapter and return its step. On rank 0."""
    settings, progress, step = run.plan.settings, run.progress, run.progress.step
    assert run.writer is not None
    assert run.folder.checkpoints is not None
    if settings.keep_best and progress.best_step not in (0, step):
        weights, step = dict(run.writer.best(progress)), progress.best_step
    weights = on_unchanged_base(weights, run.folder.checkpoints.initial)
    try:
        publish_adapter(
            run.plan,
            weights,
            run.folder.path / "adapter",
            step=step,
            base=base_of_run(run.folder.path, settings.model_folder),
        )
        mark_outdated(run.folder.path)
    except RankZeroError as error:
        if error.__cause__ is None:  # no failed write: the adapter itself is wrong
            raise  # a resumed run would publish the same adapter
        raise RankZeroError(f"{error}; {_checkpoint_message(run)}") from error
    return step


def _checkpoint_message(run: TrainingState) -> str:
    """Which checkpoint a new start resumes from. Waits for a write in flight. On rank 0."""
    assert run.writer is not None
    if failure := run.writer.wait():
        return f"{failure}; earlier checkpoints are unchanged: start again to resume"
    step = run.writer.last_step or (run.saved.step if run.saved is not None else None)
    if step is None:
        return "there is no checkpoint: a new start begins at step 0"
    return f"there is a checkpoint of step {step}: start again to resume"
