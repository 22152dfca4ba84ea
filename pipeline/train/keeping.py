"""What the loop keeps on the disk: checkpoints and the best adapter. Collective: every rank."""

from dataclasses import replace

from pipeline.adapter.gather import gather_moments, gather_weights, loss_scaler_state
from pipeline.plan.cost.stopping import slow_stop_warning
from pipeline.train.training import Training


def save(run: Training) -> None:
    """Begin a checkpoint of this step. Collective: every rank; rank 0 writes, beside the training.

    Nothing is written while every step so far was skipped: nothing has been learnt yet.
    """
    if run.progress.optimizer_step == 0:
        return
    run.pulse.beat("gathering a checkpoint")
    run.progress.loss_scaler = loss_scaler_state(run.engine.deepspeed)
    keep = run.session.is_rank_zero
    weights = gather_weights(run.engine.parameters, keep=keep)
    moments = gather_moments(run.engine.parameters, keep=keep)
    run.saved = replace(run.progress)
    if run.saver is not None:
        run.saver.save(weights, moments, run.progress)
    if run.metrics is not None:
        run.metrics.flush()


def save_before_stop(run: Training) -> None:
    """Have a checkpoint of the last complete step on the disk before any rank leaves.

    Raises RankZeroError on all ranks where it cannot be written.
    """
    run.pulse.beat("saving before a stop")
    saver = run.saver
    failed = run.session.rank_zero_first(lambda: saver.wait() if saver is not None else None)
    if failed is not None or run.saved != run.progress:
        save(run)
    run.session.rank_zero_first(lambda: saver.require_written() if saver is not None else None)


def keep_best(run: Training) -> None:
    """Begin to write the weights of this step, whose held-out loss is the lowest so far."""
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    if run.saver is not None:
        run.saver.keep_best(weights, run.progress)


def tell_of_saves(run: Training, micro_batch_s: float) -> bool:
    """Say what is amiss with the writes since the last step; whether one of them failed."""
    if run.saver is None:
        return False
    has_failed = False
    for failure, seconds in run.saver.news():
        if failure is not None:
            has_failed = True
            run.display.say(f"{failure}; training goes on, and the next save tries again")
        if seconds is not None and (warning := slow_stop_warning(seconds, micro_batch_s)):
            run.display.say(warning)
    return has_failed
