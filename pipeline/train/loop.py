"""The training loop: one page. Everything that it uses is built in assemble.py."""

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.verify import verify_tensors
from pipeline.cluster.stop import StopAgreed
from pipeline.config.frequency import Frequency
from pipeline.data.order.batches import Batch, worker_deaths_reported
from pipeline.data.order.steps import SeededBatch, TrainingStep, training_steps
from pipeline.errors import RankZeroError
from pipeline.evaluate.heldout import held_out_loss
from pipeline.model.adapter import expected_shapes
from pipeline.train.engine import StepResult
from pipeline.train.metrics import Stopwatch
from pipeline.train.snapshot import report_saves, save_before_stop, save_best, save_checkpoint
from pipeline.train.state import TrainingState

logger = logging.getLogger(__name__)
# Consecutive steps with a loss or gradient that is not finite, after which a run fails.
_MOST_BAD = 3


def training_loop(run: TrainingState) -> str | None:
    """Step until the end, or until all ranks agree to stop; returns the reason for a stop.

    Collective: every rank. A stop leaves a checkpoint of the last complete step.
    """
    try:
        with worker_deaths_reported():
            if run.progress.is_evaluation_due:
                _evaluate(run)
            run.step_watch.lap()
            for step in run.input_wait.over(_remaining_steps(run)):
                result = run.engine.optimizer_step(
                    _until_stop(run, step.batches),
                    step.size.supervised_tokens,
                    run.plan.learning_rate(step.index),
                )
                _complete(run, step, result)
    except StopAgreed as stop:
        if run.session.is_rank_zero:
            run.stops.remove_stop_file()  # before a save that may fail: the next start would stop
        save_before_stop(run)
        return str(stop)
    finally:
        run.stops.is_in_loop = True  # also where no step was left
    return None


def _remaining_steps(run: TrainingState) -> Iterator[TrainingStep]:
    """The steps that are left, until the last one or early stopping."""
    if _is_patience_over(run):
        return
    rank, first = run.session.placement.rank, run.progress.step
    for step in training_steps(run.plan, run.train_split, rank=rank, first_step=first):
        yield step
        if _is_patience_over(run):
            best = run.progress.best_step
            logger.info("early stop: no lower held-out loss since step %d", best)
            return


def _until_stop(run: TrainingState, batches: Iterable[SeededBatch]) -> Iterator[SeededBatch]:
    """The same batches; before each, the ranks agree whether to stop."""
    iterator = iter(run.input_wait.over(batches))
    while True:
        run.heartbeat.beat("waiting for its batch", run.progress.step)
        if (batch := next(iterator, None)) is None:
            run.heartbeat.beat("the end of its step")
            return
        _agree_on_stop(run)
        yield batch


def _agree_on_stop(run: TrainingState) -> None:
    """Raise StopAgreed on every rank if one of them has a stop request. Collective."""
    run.heartbeat.beat("agreeing on stops", run.progress.step)
    reason = run.stops.reason()
    is_over = run.session.agree_any(reason is not None)
    run.stops.is_in_loop = True
    if is_over:
        raise StopAgreed(reason or "another rank was asked to")


def _complete(run: TrainingState, step: TrainingStep, result: StepResult) -> None:
    """Count and record a step, check its numbers, then evaluate and save where that is due."""
    progress, settings = run.progress, run.plan.settings
    line, lost_saves = _measure(run, step, result)
    _count(run, line["loss"], result, step.size.documents)
    _record(run, line)
    _require_finite(run, line["loss"])
    if lost_saves and settings.save_must_succeed:
        raise RankZeroError("save_must_succeed: a checkpoint could not be written, see above")
    if progress.optimizer_step == 2 and result.was_applied:
        _require_moved(run)
    is_last = progress.step == run.plan.steps.total_steps
    progress.is_evaluation_due = run.eval_split is not None and _is_due(
        run, settings.evaluations, is_last=is_last
    )
    if progress.is_evaluation_due:
        _evaluate(run)
    if _is_due(run, settings.saves, is_last=is_last) or _is_patience_over(run):
        save_checkpoint(run)
    run.step_watch.lap()


def _measure(
    run: TrainingState, step: TrainingStep, result: StepResult
) -> tuple[dict[str, Any], float]:
    """The step's line of metrics.jsonl, and the number of ranks with a failed save. Collective."""
    placement, supervised = run.session.placement, step.size.supervised_tokens
    waits = [0.0] * placement.world_size  # each rank's own seconds of waiting in its place
    waits[placement.rank] = run.input_wait.lap()
    lost_save = float(report_saves(run))
    loss_sum, tokens, lost_saves, *waits = run.session.sum_over_ranks(
        [result.loss_sum, result.tokens, lost_save, *waits]
    )
    seconds, peak = run.step_watch.lap(), run.peak.after_step()
    run.micro_batch_s = seconds / run.plan.layout.accumulation_steps
    line = {
        "step": step.index + 1,
        "epoch": round((step.index + 1) / run.plan.steps.steps_per_epoch, 4),
        "loss": loss_sum / supervised,
        "lr": run.plan.learning_rate(step.index),
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
        "tokens": int(tokens),
        "supervised_tokens": supervised,
        "tokens_per_second": int(tokens) / seconds,
        "step_seconds": seconds,
        "peak_bytes": peak,
        "predicted_bytes": None
        if peak is None
        else run.plan.tensor_bytes(run.engine.largest_batch),
        "was_applied": result.was_applied,
        "waiting_share": max(waits) / seconds,
    }
    return line, lost_saves


def _record(run: TrainingState, line: dict[str, Any]) -> None:
    left = run.plan.steps.total_steps - line["step"]
    run.display.show_step(line, left * line["step_seconds"])
    if run.metrics is not None:
        run.metrics.write(line)
    if run.folder.status is not None:
        saved = None if run.writer is None else run.writer.last_step
        run.folder.status.update(step=line["step"], saved_step=saved)


def _count(run: TrainingState, loss: float, result: StepResult, documents: int) -> None:
    """Count a step; one without an update consumes its data and its learning rate all the same."""
    progress = run.progress
    is_first = progress.step % run.plan.steps.steps_per_epoch == 0
    progress.documents = documents + (0 if is_first else progress.documents)
    progress.step += 1
    progress.optimizer_step += int(result.was_applied)
    progress.skipped_steps += int(not result.was_applied)
    # fp16 answers an overflow with a smaller loss scale: no sign of a bad run.
    is_bad = not math.isfinite(loss) or not (result.was_applied or result.is_scale_searched)
    progress.bad_steps = progress.bad_steps + 1 if is_bad else 0


def _require_finite(run: TrainingState, loss: float) -> None:
    """The numbers are the same on all ranks, so every rank raises or none does."""
    progress, most = run.progress, 1 if run.context.is_debug else _MOST_BAD
    if progress.bad_steps >= most:
        raise RankZeroError(
            f"step {progress.step}: loss or gradient were not finite in {most} steps in a row "
            f"(the loss is {loss}); a lower lr or bf16 may help; the last checkpoint is untouched"
        )


def _require_moved(run: TrainingState) -> None:
    """Fail after two steps rather than after a day where no gradient reaches the adapter.

    A loss of exactly 0 alone is none: in fp32 a learnt short answer has it.
    """
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    run.session.rank_zero_first(
        lambda: verify_tensors(weights, expected_shapes(run.plan), trained=True)
    )


def _is_due(run: TrainingState, frequency: Frequency | None, *, is_last: bool) -> bool:
    if frequency is None:
        return False
    return is_last or frequency.is_due(run.progress.step, run.plan.steps.steps_per_epoch)


def _evaluate(run: TrainingState) -> None:
    """Measure the held-out loss, and keep the weights with the lowest."""
    assert run.eval_split is not None
    progress = run.progress

    def summed_loss(batch: Batch) -> float:
        _agree_on_stop(run)
        return run.engine.evaluate(batch)

    watch, micro_batch_size = Stopwatch(), run.plan.layout.micro_batch_size
    loss = held_out_loss(summed_loss, run.eval_split, run.session, micro_batch_size)
    progress.is_evaluation_due = False
    logger.info("step %d  held-out loss %.4f  (%.1f s)", progress.step, loss, watch.lap())
    if run.metrics is not None:
        tokens = run.eval_split.sequences.supervised_tokens
        run.metrics.write({"step": progress.step, "eval_loss": loss, "eval_tokens": tokens})
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_since_best = 0
        if run.plan.settings.keep_best:
            save_best(run)
    else:
        progress.evaluations_since_best += 1


def _is_patience_over(run: TrainingState) -> bool:
    patience = run.plan.settings.early_stopping_patience
    return patience is not None and run.progress.evaluations_since_best >= patience
