"""The loop: one page. Everything that it uses is made in assemble.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pipeline.adapter.gather import gather_moments, gather_weights
from pipeline.adapter.verify import verify_tensors
from pipeline.cluster.session import Session
from pipeline.data.batches import batches_of
from pipeline.data.order import BatchShape, RankWork, forward_seed
from pipeline.data.prepared import Split
from pipeline.errors import RankZeroError
from pipeline.evaluate.heldout import held_out_loss
from pipeline.model.adapter import expected_shapes
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint import Checkpoints, Progress
from pipeline.train.engine import Engine, SeededBatch, StepResult
from pipeline.train.metrics import MetricsFile, Stopwatch, peak_device_bytes
from pipeline.train.progress import ProgressDisplay
from pipeline.train.status import RunStatus
from pipeline.train.stop import StopRequests

# Steps in a row without an update (not finite gradients) after which a run is given up. In fp16
# the loss scale starts at 2^16 and is halved by each: 16 of them are no sign of anything.
_MOST_SKIPPED = {"float32": 3, "bfloat16": 3, "float16": 20}


@dataclass(kw_only=True)
class Training:
    """A run that is ready to step. `metrics` and `status` are rank 0's alone."""

    plan: Plan
    session: Session
    engine: Engine
    train_split: Split
    eval_split: Split | None
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    display: ProgressDisplay
    stops: StopRequests
    metrics: MetricsFile | None
    status: RunStatus | None
    frozen_checksum: int | None  # of --debug, which looks at it again at the end


def train(run: Training) -> str | None:
    """Step until the end, or until all ranks agree to stop; returns the reason for a stop.

    Collective: every rank. A stop leaves a checkpoint of the last complete step.
    """
    plan, progress = run.plan, run.progress
    total_steps, skipped, watch = plan.steps.total_steps, 0, Stopwatch()
    if progress.is_evaluation_due:
        _evaluate(run)
    if _is_patience_over(run):
        return None
    for step, batches, supervised in _work(run):
        result = run.engine.optimizer_step(batches, supervised, plan.learning_rate(step))
        loss_sum, tokens, asked = run.session.sum_over_ranks(
            [result.loss_sum, result.tokens, float(run.stops.reason() is not None)]
        )
        progress.step = step + 1
        progress.optimizer_step += int(result.was_applied)
        skipped = 0 if result.was_applied else skipped + 1
        line = _line(run, step, loss_sum / supervised, int(tokens), supervised, result, watch.lap())
        _record(run, line)
        _require_healthy(line, skipped, _most_skipped(run))
        if progress.optimizer_step == 2:
            _require_moved(run)
        is_last = progress.step == total_steps
        progress.is_evaluation_due = _is_due(run, "evaluation", is_last=is_last)
        if asked and not is_last:  # at once: a launcher may wait no longer than this
            save(run)
            return run.stops.reason() or "another rank was asked to"
        if progress.is_evaluation_due:
            _evaluate(run)
        if _is_due(run, "save", is_last=is_last) or _is_patience_over(run):
            save(run)
        if _is_patience_over(run):
            run.display.say(f"early stop: no lower held-out loss since step {progress.best_step}")
            return None
        watch.lap()
    return None


def save(run: Training) -> None:
    """Write a checkpoint of this step. Collective: every rank; rank 0 writes.

    Nothing is written while every step so far was skipped: nothing has been learnt yet.
    """
    if run.progress.optimizer_step == 0:
        return
    keep = run.session.is_rank_zero
    weights = gather_weights(run.engine.parameters, keep=keep)
    moments = gather_moments(run.engine.parameters, keep=keep)
    run.session.rank_zero_first(lambda: str(run.checkpoints.write(weights, moments, run.progress)))


def _work(run: Training) -> Iterator[tuple[int, list[SeededBatch], int]]:
    """For each step that is left: its index, this rank's batches, all supervised tokens of it."""
    plan, settings = run.plan, run.plan.settings
    layout = plan.layout
    shape = BatchShape(
        world_size=layout.world_size,
        accumulation_steps=plan.layout.accumulation_steps,
        micro_batch_size=layout.micro_batch_size,
    )
    work = RankWork(
        run.train_split.lengths,
        shape,
        seed=settings.seed,
        rank=run.session.placement.rank,
        first_step=run.progress.step,
        total_steps=plan.steps.total_steps,
    )
    batches = batches_of(
        run.train_split,
        work,
        num_workers=settings.dataloader_num_workers,
        prefetch_factor=settings.dataloader_prefetch_factor,
    )
    seeded = (
        SeededBatch(batch, forward_seed(settings.seed, work.step_of(i), work[i].first))
        for i, batch in enumerate(batches)
    )
    for step in range(run.progress.step, plan.steps.total_steps):
        supervised = int(run.train_split.supervised_counts[work.documents(step)].sum())
        yield step, list(islice(seeded, shape.accumulation_steps)), supervised


def _line(
    run: Training,
    step: int,
    loss: float,
    tokens: int,
    supervised: int,
    result: StepResult,
    seconds: float,
) -> dict[str, Any]:
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
        "peak_bytes": peak_device_bytes(run.engine.device),
        "was_applied": result.was_applied,
    }


def _record(run: Training, line: dict[str, Any]) -> None:
    left = run.plan.steps.total_steps - line["step"]
    run.display.step(line, left * line["step_seconds"])
    if run.metrics is not None:
        run.metrics.write(line)
    if run.status is not None:
        run.status.update(step=line["step"])


def _require_healthy(line: dict[str, Any], skipped: int, most_skipped: int) -> None:
    """The numbers are sums over ranks, so every rank raises or none does."""
    if not math.isfinite(line["loss"]) or line["loss"] == 0.0:
        raise RankZeroError(
            f"step {line['step']}: the loss is {line['loss']}; a lower lr or another precision "
            "may help; the last checkpoint is untouched"
        )
    if skipped == most_skipped:
        raise RankZeroError(
            f"step {line['step']}: {skipped} steps in a row had gradients that are not finite; "
            "a lower lr or bf16 may help; the last checkpoint is untouched"
        )


def _most_skipped(run: Training) -> int:
    dtype = run.plan.training_dtype
    is_debug = run.frozen_checksum is not None
    return 1 if is_debug and dtype != "float16" else _MOST_SKIPPED[dtype]


def _require_moved(run: Training) -> None:
    """Stop after two steps rather than after a day if the adapter does not learn."""
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    run.session.rank_zero_first(
        lambda: verify_tensors(weights, expected_shapes(run.plan), trained=True)
    )


def _is_due(run: Training, what: str, *, is_last: bool) -> bool:
    settings, step = run.plan.settings, run.progress.step
    if what == "evaluation" and run.eval_split is None:
        return False
    strategy = settings.evaluation_strategy if what == "evaluation" else settings.save_strategy
    every = settings.eval_steps if what == "evaluation" else settings.save_steps
    if strategy == "epoch":
        every = run.plan.steps.steps_per_epoch
    return strategy != "no" and (is_last or step % every == 0)


def _evaluate(run: Training) -> None:
    """Measure the held-out loss and keep the best."""
    assert run.eval_split is not None
    progress = run.progress
    progress.is_evaluation_due = False
    watch, micro = Stopwatch(), run.plan.layout.micro_batch_size
    loss = held_out_loss(run.engine.evaluate, run.eval_split, run.session, micro)
    run.display.say(f"step {progress.step}  held-out loss {loss:.4f}  ({watch.lap():.1f} s)")
    if run.metrics is not None:
        tokens = int(run.eval_split.supervised_counts.sum())
        run.metrics.write({"step": progress.step, "eval_loss": loss, "eval_tokens": tokens})
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_since_best = 0
        if run.plan.settings.keep_best:
            _keep_best(run)
    else:
        progress.evaluations_since_best += 1


def _is_patience_over(run: Training) -> bool:
    patience = run.plan.settings.early_stopping_patience
    return patience is not None and run.progress.evaluations_since_best >= patience


def _keep_best(run: Training) -> None:
    weights: dict[str, torch.Tensor]
    weights = gather_weights(run.engine.parameters, keep=run.session.is_rank_zero)
    run.session.rank_zero_first(lambda: run.checkpoints.write_best(weights, run.progress))
