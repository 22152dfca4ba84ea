"""Saving of checkpoints and best adapters: gathered from all ranks, written by rank 0.

All functions except `report_saves` are collective.
"""

import logging
from dataclasses import replace

from pipeline.adapter.gather import gather_moments, gather_weights, loss_scaler_state
from pipeline.plan.cost.stopping import slow_stop_warning
from pipeline.train.state import TrainingState

logger = logging.getLogger(__name__)


def save_checkpoint(run: TrainingState) -> None:
    """Gather a checkpoint of this step and start to write it.

    Nothing is written before the first applied update.
    """
    if run.progress.optimizer_step == 0:
        return
    run.heartbeat.beat("gathering a checkpoint")
    run.progress.loss_scaler = loss_scaler_state(run.engine.deepspeed)
    keep = run.session.is_rank_zero
    weights = gather_weights(run.engine.parameters, keep=keep)
    moments = gather_moments(run.engine.parameters, keep=keep)
    run.saved = replace(run.progress)
    if run.writer is not None:
        run.writer.save(weights, moments, run.progress)
    if run.metrics is not None:
        run.metrics.flush()


def save_before_stop(run: TrainingState) -> None:
    """Make sure that a checkpoint of the last complete step is on the disk.

    Raises RankZeroError on all ranks if it cannot be written.
    """
    run.heartbeat.beat("saving before a stop")
    writer = run.writer
    failure = run.session.rank_zero_first(lambda: writer.wait() if writer is not None else None)
    if failure is not None or run.saved != run.progress:
        save_checkpoint(run)
    run.session.rank_zero_first(lambda: writer.require_written() if writer is not None else None)


def save_best(run: TrainingState) -> None:
    """Gather the weights of this step as the best adapter, and start to write them.

    The best adapter has no optimizer state, so no run can resume from it.
    """
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    if run.writer is not None:
        run.writer.save_best(weights, run.progress)


def report_saves(run: TrainingState) -> bool:
    """Log failed and slow writes since the last step; returns whether a write failed."""
    if run.writer is None:
        return False
    has_failed = False
    for failure, seconds in run.writer.finished_writes():
        if failure is not None:
            has_failed = True
            logger.warning("%s; training continues, and the next save tries again", failure)
        if seconds is not None and (warning := slow_stop_warning(seconds, run.micro_batch_s)):
            logger.warning(warning)
    return has_failed
