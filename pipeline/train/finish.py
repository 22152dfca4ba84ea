"""After the last step: the adapter out, checked and published, or the word that a run stopped."""

import torch

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.products import mark_outdated
from pipeline.adapter.publish import publish_adapter
from pipeline.errors import RankZeroError, Stopped
from pipeline.model.adapter import frozen_checksum
from pipeline.model.fingerprint import base_of_run
from pipeline.train.training import Training


def finish(run: Training, stop_reason: str | None) -> None:
    """Publish `adapter/`. Collective: every rank. Raises Stopped where the run was stopped."""
    progress, folder = run.progress, run.folder
    if run.metrics is not None:
        run.metrics.flush()
    if stop_reason is not None:
        written = "a checkpoint is written" if progress.optimizer_step else "nothing learnt yet"
        how = " with resume=auto" if run.plan.settings.resume == "never" else ""
        raise Stopped(
            f"stopped at step {progress.step} of {run.plan.steps.total_steps} ({stop_reason}); "
            f"{written}: start again{how} to go on"
        )
    run.pulse.beat("gathering the adapter")
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    run.pulse.beat("publishing")
    step = run.session.rank_zero_first(lambda: _publish(run, weights))
    run.display.say(f"adapter of step {step}: {folder / 'adapter'}")
    run.pulse.beat("waiting for the last save")
    run.session.rank_zero_first(lambda: _require_saved(run))
    if run.frozen_checksum is not None:
        _require_unmoved_base(run)
        run.display.say("debug: losses finite, every lora_B moved, no frozen weight moved")


def _require_saved(run: Training) -> None:
    """The last checkpoint is on the disk too, or that is said; called on rank 0."""
    assert run.saver is not None
    if run.plan.settings.save_must_succeed:
        run.saver.require_written()
    elif failure := run.saver.wait():
        run.display.say(failure)


def _require_unmoved_base(run: Training) -> None:
    moved = frozen_checksum(run.engine.deepspeed.module) != run.frozen_checksum
    if run.session.agree_any(moved):
        raise RankZeroError("debug: a frozen weight of the base moved; this must not be")


def _publish(run: Training, weights: dict[str, torch.Tensor]) -> int:
    """Called on rank 0; returns the step whose adapter it is."""
    settings, progress, step = run.plan.settings, run.progress, run.progress.step
    assert run.saver is not None
    if settings.keep_best and progress.best_step not in (0, step):
        weights, step = dict(run.saver.best(progress)), progress.best_step
    try:
        publish_adapter(
            run.plan,
            weights,
            run.folder / "adapter",
            step=step,
            base=base_of_run(run.folder, settings.model_folder),
        )
        mark_outdated(run.folder)
    except RankZeroError as error:
        if error.__cause__ is None:
            raise  # the adapter itself is wrong, and would be again
        raise RankZeroError(f"{error}; {_what_is_kept(run)}") from error
    return step


def _what_is_kept(run: Training) -> str:
    """What a new start would find, once no checkpoint is being written; called on rank 0."""
    assert run.saver is not None
    if failure := run.saver.wait():
        return f"{failure}; what was written before is untouched: start again to go on"
    step = run.saver.last_step or (run.saved.step if run.saved is not None else None)
    if step is None:
        return "there is no checkpoint: a new start begins anew"
    return f"the checkpoint of step {step} is there: start again to go on"
