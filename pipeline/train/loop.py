"""The training loop. assemble.py builds the objects that it uses."""

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from pipeline.adapter.gather import gather_moments, gather_weights
from pipeline.adapter.verify import verify_gradients, verify_tensors
from pipeline.cluster.stop import StopAgreed
from pipeline.config.frequency import Frequency
from pipeline.data.order.batches import Batch, worker_deaths_reported
from pipeline.data.order.steps import SeededBatch, TrainingStep, training_steps
from pipeline.errors import RankZeroError
from pipeline.evaluate.heldout import held_out_loss
from pipeline.model.adapter import expected_shapes
from pipeline.plan.cost.stopping import STOP_INTERVAL_S
from pipeline.plan.given.adapter_counts import TOKEN_ROWS
from pipeline.train.engine import StepResult
from pipeline.train.metrics import Stopwatch
from pipeline.train.questions import HeldOutQuestions
from pipeline.train.snapshot import report_saves, save_before_stop, save_best, save_checkpoint
from pipeline.train.state import TrainingState

logger = logging.getLogger(__name__)
# A run fails after this many consecutive steps with a loss or gradient that is not finite.
_MAX_BAD_STEPS = 3


def training_loop(run: TrainingState) -> str | None:
    """Train until the last step, early stopping, or a stop request. Collective.

    After a stop request the last complete step is saved, and the reason of the stop is returned;
    otherwise the result is None.
    """
    try:
        with worker_deaths_reported():
            if run.progress.is_evaluation_due:
                _evaluate(run)
            run.step_watch.lap()
            for step in run.input_wait.over(_remaining_steps(run)):
                result = run.engine.optimizer_step(
                    _with_stop_checks(run, step.batches),
                    step.size.supervised_tokens,
                    run.plan.learning_rate(step.index),
                )
                _complete(run, step, result)
    except StopAgreed as stop:
        if run.session.is_rank_zero:
            # Before the save, because the save may fail; the file would also stop the next start.
            run.stops.remove_stop_file()
        with run.display.show_work("saving a checkpoint"):
            save_before_stop(run)
        if run.writer is not None:
            run.display.show_checkpoint(run.writer.last_step)
        return str(stop)
    finally:
        # From now on a stop request no longer ends the process: the adapter is published. Without
        # a remaining step, `_agree_on_stop` has not set this.
        run.stops.is_in_loop = True
    return None


def _remaining_steps(run: TrainingState) -> Iterator[TrainingStep]:
    """The remaining steps, until the last one or early stopping."""
    if _is_patience_over(run):
        return
    rank, first = run.session.placement.rank, run.progress.step
    for step in training_steps(run.plan, run.train_split, rank=rank, first_step=first):
        yield step
        if _is_patience_over(run):
            best = run.progress.best_step
            logger.info("early stop: no lower held-out loss since step %d", best)
            return


def _with_stop_checks(run: TrainingState, batches: Iterable[SeededBatch]) -> Iterator[SeededBatch]:
    """The batches of a step. Raises StopAgreed between two of them if a stop was requested.

    The ranks agree whether to stop before the first batch, and in a long step again after every
    `batches_per_agreement` batches. They do so rarely, because each agreement makes all ranks wait
    for the slowest one.
    """
    run.heartbeat.beat("waiting for its batch", run.progress.step)
    for index, batch in enumerate(run.input_wait.over(batches)):
        if index % run.batches_per_agreement == 0:
            _agree_on_stop(run)
        yield batch
        run.heartbeat.beat("waiting for its batch", run.progress.step)
    run.heartbeat.beat("the end of its step")


def _agree_on_stop(run: TrainingState) -> None:
    """Raise StopAgreed on every rank if one of them has a stop request. Collective."""
    run.heartbeat.beat("agreeing on stops", run.progress.step)
    reason = run.stops.reason()
    is_requested = run.session.any_rank(reason is not None)
    run.stops.is_in_loop = True
    if is_requested:
        raise StopAgreed(reason or "another rank has a stop request")


def _complete(run: TrainingState, step: TrainingStep, result: StepResult) -> None:
    """Count and record a step, check its numbers, then evaluate and save if that is due."""
    progress, settings = run.progress, run.plan.settings
    line, failed_saves = _measure(run, step, result)
    _count(run, line["loss"], result, step.size.documents)
    _record(run, line)
    _require_finite(run, line["loss"])
    if failed_saves and settings.save_must_succeed:
        raise RankZeroError("save_must_succeed: a checkpoint could not be written, see above")
    if progress.optimizer_step == 2 and result.was_applied:
        _require_trained(run)
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
    waits = [0.0] * placement.world_size  # after the sum: seconds that each rank waited for data
    waits[placement.rank] = run.input_wait.lap()
    failed_save = float(report_saves(run))
    loss_sum, tokens, failed_saves, seconds_sum, *waits = run.session.sum_over_ranks(
        [result.loss_sum, result.tokens, failed_save, run.step_watch.elapsed(), *waits]
    )
    seconds, peak = run.step_watch.lap(), run.peak.after_step()
    # The mean is the same number on all ranks, so they agree on stops before the same batches.
    run.micro_batch_s = seconds_sum / placement.world_size / run.plan.layout.accumulation_steps
    run.batches_per_agreement = max(1, int(STOP_INTERVAL_S / run.micro_batch_s))
    line = {
        "step": step.index + 1,
        "epoch": round((step.index + 1) / run.plan.steps.steps_per_epoch, 4),
        "loss": loss_sum / supervised,
        **run.engine.learning_rates(),
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
    return line, failed_saves


def _record(run: TrainingState, line: dict[str, Any]) -> None:
    run.display.show_step(line, None if run.writer is None else run.writer.last_step)
    if run.metrics is not None:
        run.metrics.write(line)
    if run.folder.status is not None:
        run.folder.status.update(step=line["step"])


def _count(run: TrainingState, loss: float, result: StepResult, documents: int) -> None:
    """Count a step. Data and learning rate schedule also advance in a step without an update."""
    progress = run.progress
    is_first = progress.step % run.plan.steps.steps_per_epoch == 0
    progress.documents = documents + (0 if is_first else progress.documents)
    progress.step += 1
    progress.optimizer_step += int(result.was_applied)
    progress.skipped_steps += int(not result.was_applied)
    # In fp16 an overflow only leads to a smaller loss scale, so the step is not bad.
    is_bad = not math.isfinite(loss) or not (result.was_applied or result.can_lower_scale)
    progress.bad_steps = progress.bad_steps + 1 if is_bad else 0


def _require_finite(run: TrainingState, loss: float) -> None:
    """Raise RankZeroError after too many bad steps in a row, as `_count` defines them.

    Their number is the same on all ranks.
    """
    progress = run.progress
    limit = 1 if run.context.is_debug else _MAX_BAD_STEPS
    if progress.bad_steps >= limit:
        raise RankZeroError(
            f"step {progress.step}: loss or gradient were not finite in {limit} steps in a row "
            f"(the loss is {loss}); try a lower lr or bf16; the last checkpoint is unchanged"
        )


def _require_trained(run: TrainingState) -> None:
    """Raise RankZeroError if a parameter has got no gradient in two steps. Collective.

    lora_B is zero at the start, so its weights show whether it was trained. Other parameters, and
    lora_B of PiSSA and OLoRA, start with other values; Adam's moments show whether they got a
    gradient. The embeddings of new tokens are not checked, because a new token may not occur in the
    first steps. The loss is not checked: in fp32 it can be exactly 0 if the model has learnt a
    short answer.
    """
    parameters, keep = run.engine.parameters, run.session.is_rank_zero
    weights = gather_weights(parameters, keep=keep)
    checks_lora_moments = run.plan.settings.initialises_from_base  # PiSSA or OLoRA
    checked_by_moments = {
        key: parameter
        for key, parameter in parameters.items()
        if (checks_lora_moments or ".lora_" not in key) and not key.endswith(TOKEN_ROWS)
    }
    moments = gather_moments(checked_by_moments, keep=keep)

    def verify() -> None:
        verify_tensors(weights, expected_shapes(run.plan), is_trained=True)
        verify_gradients(moments)

    run.session.rank_zero_first(verify)


def _is_due(run: TrainingState, frequency: Frequency | None, *, is_last: bool) -> bool:
    """Whether an evaluation or a save is due after this step. `is_last`: it is the last step."""
    if frequency is None:  # the strategy is `no`
        return False
    steps = run.plan.steps
    return is_last or frequency.is_due(run.progress.step, steps.steps_per_epoch, steps.total_steps)


def _evaluate(run: TrainingState) -> None:
    """Measure the held-out loss, and save the weights if it is the lowest so far."""
    assert run.eval_split is not None
    progress = run.progress

    def summed_loss(batch: Batch) -> float:
        _agree_on_stop(run)
        return run.engine.evaluate(batch)

    watch = Stopwatch()
    loss = held_out_loss(
        summed_loss, run.eval_split, run.session, run.plan.layout, run.display.show_work
    )
    seconds = {"eval_seconds": watch.lap()}
    scores = {}
    if run.questions is not None:
        scores = _answer_scores(run, run.questions)
        seconds["eval_answers_seconds"] = watch.lap()
    progress.is_evaluation_due = False
    run.display.show_evaluation(progress.step, loss, sum(seconds.values()), scores)
    if run.metrics is not None:
        tokens = run.eval_split.sequences.supervised_tokens
        line = {"step": progress.step, "eval_loss": loss, "eval_tokens": tokens} | seconds
        run.metrics.write(line | {f"eval_{name}": value for name, value in scores.items()})
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_since_best = 0
        if run.plan.settings.keep_best:
            save_best(run)
    else:
        progress.evaluations_since_best += 1


def _answer_scores(run: TrainingState, questions: HeldOutQuestions) -> dict[str, Any]:
    """Scores of the answers to held-out rows; on ranks other than 0, empty. Collective."""
    answers: list[tuple[int, str]] = []  # index of the question, text of the answer
    batches = [*questions.batches_of_rank(run.session.placement)]
    max_tokens = questions.generator.max_new_tokens
    text = f"answering {len(questions.prompts)} held-out rows"
    with run.display.show_work(text, max_tokens * len(batches)) as work:
        for num_done, batch in enumerate(batches, start=1):

            def on_token() -> None:
                run.heartbeat.renew()
                work.advance()

            _agree_on_stop(run)
            prompts = [questions.prompts[i] for i in batch]
            texts = run.engine.answers(questions.generator, prompts, on_token)
            work.advance(num_done * max_tokens - work.done)  # answers may be shorter
            answers += zip(batch, texts, strict=True)
    answers_by_rank = run.session.gather_objects(answers)
    if answers_by_rank is None:
        return {}
    return questions.scores([*chain.from_iterable(answers_by_rank)])


def _is_patience_over(run: TrainingState) -> bool:
    patience = run.plan.settings.early_stopping_patience
    return patience is not None and run.progress.evaluations_since_best >= patience
