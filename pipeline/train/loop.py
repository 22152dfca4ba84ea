"""The loop: one page. Everything that it uses is made in assemble.py."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.verify import verify_tensors
from pipeline.cluster.stop import StopAgreed
from pipeline.config.frequency import Frequency
from pipeline.data.order.batches import Batch, worker_deaths_reported
from pipeline.data.order.steps import SeededBatch, training_steps
from pipeline.errors import RankZeroError
from pipeline.evaluate.heldout import held_out_loss
from pipeline.model.adapter import expected_shapes
from pipeline.train.engine import StepResult
from pipeline.train.keeping import keep_best, save, save_before_stop, tell_of_saves
from pipeline.train.metrics import Stopwatch
from pipeline.train.training import Training

# Steps in a row with a loss or gradient that is not finite, after which a run is given up.
_MOST_BAD = 3


def train(run: Training) -> str | None:
    """Step until the end, or until all ranks agree to stop; returns the reason for a stop.

    Collective: every rank. A stop leaves a checkpoint of the last complete step.
    """
    try:
        with worker_deaths_reported():
            _train(run)
    except StopAgreed as stop:
        if run.session.is_rank_zero:
            run.stops.clear()  # before a save that may fail, or the next start would stop at once
        save_before_stop(run)
        return str(stop)
    finally:
        run.stops.is_agreed = True  # also where no step was left to do
    return None


def _train(run: Training) -> None:
    plan, progress = run.plan, run.progress
    total_steps, watch, micro_batch_s = plan.steps.total_steps, Stopwatch(), 0.0
    if progress.is_evaluation_due:
        _evaluate(run)
    if _is_patience_over(run):
        return
    watch.lap()
    steps = training_steps(
        plan, run.train_split, rank=run.session.placement.rank, first_step=progress.step
    )
    for step in run.input_wait.over(steps):
        supervised = step.size.supervised_tokens
        result = run.engine.optimizer_step(
            _asking(run, step.batches), supervised, plan.learning_rate(step.index)
        )
        is_lost = float(tell_of_saves(run, micro_batch_s))
        loss_sum, tokens, lost_saves, *waits = run.session.sum_over_ranks(
            [result.loss_sum, result.tokens, is_lost, *_wait_of_each_rank(run)]
        )
        loss = loss_sum / supervised
        _advance(run, loss, result, step.size.documents)
        line = _line(run, step.index, loss, int(tokens), supervised, result, watch.lap())
        line["waiting_share"] = max(waits) / line["step_seconds"]
        micro_batch_s = line["step_seconds"] / plan.layout.accumulation_steps
        _record(run, line)
        _require_healthy(run, loss)
        if lost_saves and plan.settings.save_must_succeed:
            raise RankZeroError("save_must_succeed: a checkpoint could not be written, see above")
        if progress.optimizer_step == 2 and result.was_applied:
            _require_moved(run)
        is_last = progress.step == total_steps
        progress.is_evaluation_due = run.eval_split is not None and _is_due(
            run, plan.settings.evaluations, is_last=is_last
        )
        if progress.is_evaluation_due:
            _evaluate(run)
        if _is_due(run, plan.settings.saves, is_last=is_last) or _is_patience_over(run):
            save(run)
        if _is_patience_over(run):
            run.display.say(f"early stop: no lower held-out loss since step {progress.best_step}")
            return
        watch.lap()


def _ask_all(run: Training) -> None:
    """Raise StopAgreed on every rank if one has been asked to stop. Collective."""
    run.pulse.beat("asking all ranks", run.progress.step)
    reason = run.stops.reason()
    is_over = run.session.agree_any(reason is not None)
    run.stops.is_agreed = True
    if is_over:
        raise StopAgreed(reason or "another rank was asked to")


def _asking(run: Training, batches: Iterable[SeededBatch]) -> Iterator[SeededBatch]:
    """The same batches; before each, the ranks agree whether to go on."""
    iterator = iter(run.input_wait.over(batches))
    while True:
        run.pulse.beat("waiting for its batch", run.progress.step)
        if (batch := next(iterator, None)) is None:
            run.pulse.beat("the end of its step")
            return
        _ask_all(run)
        yield batch


def _wait_of_each_rank(run: Training) -> list[float]:
    """Seconds that this rank has waited for its input, in its place; a sum fills the others'."""
    placement = run.session.placement
    waits = [0.0] * placement.world_size
    waits[placement.rank] = run.input_wait.lap()
    return waits


def _line(
    run: Training,
    step: int,
    loss: float,
    tokens: int,
    supervised: int,
    result: StepResult,
    seconds: float,
) -> dict[str, Any]:
    peak, largest = run.peak.after_step(), run.engine.largest_batch
    return {
        "step": step + 1,
        "epoch": round((step + 1) / run.plan.steps.steps_per_epoch, 4),
        "loss": loss,
        "lr": run.plan.learning_rate(step),
        "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "peak_bytes": peak,
        "predicted_bytes": None if peak is None else run.plan.tensor_bytes(largest),
        "was_applied": result.was_applied,
    }


def _record(run: Training, line: dict[str, Any]) -> None:
    left = run.plan.steps.total_steps - line["step"]
    run.display.step(line, left * line["step_seconds"])
    if run.metrics is not None:
        run.metrics.write(line)
    if run.status is not None:
        saved = None if run.saver is None else run.saver.last_step
        run.status.update(step=line["step"], saved_step=saved)


def _advance(run: Training, loss: float, result: StepResult, documents: int) -> None:
    """Count the step, which has consumed its data and its place in the schedule either way."""
    progress = run.progress
    is_first = progress.step % run.plan.steps.steps_per_epoch == 0
    progress.documents = documents + (0 if is_first else progress.documents)
    progress.step += 1
    progress.optimizer_step += int(result.was_applied)
    progress.skipped_steps += int(not result.was_applied)
    # An overflow that a smaller loss scale will answer says nothing of the run.
    is_bad = not math.isfinite(loss) or not (result.was_applied or result.is_scale_searched)
    progress.bad_steps = progress.bad_steps + 1 if is_bad else 0


def _require_healthy(run: Training, loss: float) -> None:
    """The numbers are the same on all ranks, so every rank raises or none does."""
    progress, most = run.progress, 1 if run.frozen_checksum is not None else _MOST_BAD
    if progress.bad_steps >= most:
        raise RankZeroError(
            f"step {progress.step}: loss or gradient were not finite in {most} steps in a row "
            f"(the loss is {loss}); a lower lr or bf16 may help; the last checkpoint is untouched"
        )
    if loss == 0.0:
        raise RankZeroError(
            f"step {progress.step}: the loss is exactly 0, so there is nothing to learn from; look "
            "at data/audit.json; the last checkpoint is untouched"
        )


def _require_moved(run: Training) -> None:
    """Stop after two steps rather than after a day if the adapter does not learn."""
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    run.session.rank_zero_first(
        lambda: verify_tensors(weights, expected_shapes(run.plan), trained=True)
    )


def _is_due(run: Training, frequency: Frequency | None, *, is_last: bool) -> bool:
    if frequency is None:
        return False
    return is_last or frequency.is_due(run.progress.step, run.plan.steps.steps_per_epoch)


def _evaluate(run: Training) -> None:
    """Measure the held-out loss and keep the best."""
    assert run.eval_split is not None
    progress = run.progress

    def summed_loss(batch: Batch) -> float:
        _ask_all(run)
        return run.engine.evaluate(batch)

    watch, micro = Stopwatch(), run.plan.layout.micro_batch_size
    loss = held_out_loss(summed_loss, run.eval_split, run.session, micro)
    progress.is_evaluation_due = False
    run.display.say(f"step {progress.step}  held-out loss {loss:.4f}  ({watch.lap():.1f} s)")
    if run.metrics is not None:
        tokens = run.eval_split.sequences.supervised_tokens
        run.metrics.write({"step": progress.step, "eval_loss": loss, "eval_tokens": tokens})
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_since_best = 0
        if run.plan.settings.keep_best:
            keep_best(run)
    else:
        progress.evaluations_since_best += 1


def _is_patience_over(run: Training) -> bool:
    patience = run.plan.settings.early_stopping_patience
    return patience is not None and run.progress.evaluations_since_best >= patience
