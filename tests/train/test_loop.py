"""The training loop: which steps end a run on all ranks, and which are only counted."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.adapter.gather import gather_weights
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.placement import Placement
from pipeline.data.dataset.sequences import StepSize
from pipeline.data.order.steps import TrainingStep
from pipeline.errors import RankZeroError
from pipeline.train import loop
from pipeline.train.checkpoint import Progress
from pipeline.train.engine import StepResult
from pipeline.train.metrics import InputWait, Stopwatch
from tests.messages import assert_mentions, refused
from tests.ranks import run_ranks
from tests.tiny import Documents
from tests.train_tiny import batches_of_step, build_engine

pytestmark = pytest.mark.engine


NAN, INF = float("nan"), float("inf")


def new_run(is_debug: bool = False):
    """The attributes of a TrainingState that are needed to count steps."""
    steps = SimpleNamespace(steps_per_epoch=5)
    return SimpleNamespace(
        plan=SimpleNamespace(steps=steps),
        progress=Progress(),
        context=SimpleNamespace(is_debug=is_debug),
    )


def step(run, loss=1.0, *, was_applied=True, can_lower_scale=False, documents=4):
    """Count a step, and check that it is finite.

    DeepSpeed skips an update (`was_applied` is False) if a gradient is not finite.
    """
    result = StepResult(
        loss_sum=1.0, tokens=1, grad_norm=1.0, was_applied=was_applied,
        can_lower_scale=can_lower_scale,
    )  # fmt: skip
    loop._count(run, loss, result, documents)
    loop._require_finite(run, loss)


def test_three_consecutive_steps_that_are_not_finite_end_the_run():
    run = new_run()
    step(run, NAN, was_applied=False)
    step(run, was_applied=False)
    step(run)  # finite, so the next three count from one again
    assert (run.progress.step, run.progress.optimizer_step, run.progress.skipped_steps) == (3, 1, 2)
    step(run, was_applied=False)
    step(run, INF, was_applied=False)
    with refused("step 6", "not finite", "3 steps", "unchanged", error=RankZeroError):
        step(run, was_applied=False)


def test_one_step_that_is_not_finite_ends_a_debug_run():
    with refused("1 steps", error=RankZeroError):
        step(new_run(is_debug=True), was_applied=False)


def test_overflows_while_the_loss_scale_can_shrink_do_not_end_the_run():
    run = new_run()
    for _ in range(20):
        step(run, was_applied=False, can_lower_scale=True)
    assert (run.progress.skipped_steps, run.progress.bad_steps) == (20, 0)
    for _ in range(2):  # the loss itself is NaN, which a smaller scale does not change
        step(run, NAN, was_applied=False, can_lower_scale=True)
    with refused("not finite", error=RankZeroError):
        step(run, NAN, was_applied=False, can_lower_scale=True)


def test_a_loss_of_zero_is_finite():
    """In fp32 a short, learned answer has loss 0 and a non-zero gradient."""
    run = new_run()
    for _ in range(5):
        step(run, 0.0)
    assert (run.progress.optimizer_step, run.progress.bad_steps) == (5, 0)


def test_progress_counts_the_documents_of_the_epoch():
    run, positions = new_run(), []
    for documents in (4, 4, 4, 4, 2, 4, 4):  # an epoch has 18 documents, in five steps
        step(run, documents=documents)
        positions.append(run.progress.documents)
    assert positions == [4, 8, 12, 16, 18, 4, 8]


def test_the_recorded_loss_is_the_mean_over_the_supervised_tokens_of_all_ranks():
    """Two ranks have equal sums; 5 of the 40 tokens of the step are supervised."""
    run = SimpleNamespace(
        session=SimpleNamespace(
            placement=Placement(world_size=2, local_size=2),
            sum_over_ranks=lambda values: [2 * value for value in values],
        ),
        plan=SimpleNamespace(
            layout=SimpleNamespace(accumulation_steps=1), steps=SimpleNamespace(steps_per_epoch=4)
        ),
        engine=SimpleNamespace(learning_rates=dict),
        input_wait=InputWait(), step_watch=Stopwatch(), writer=None,
        peak=SimpleNamespace(after_step=lambda: None),
    )  # fmt: skip
    step = TrainingStep(2, iter([]), StepSize(documents=4, supervised_tokens=5))
    result = StepResult(
        loss_sum=10.0, tokens=20, grad_norm=INF, was_applied=False, can_lower_scale=False
    )
    line, failed_saves = loop._measure(run, step, result)
    assert (line["loss"], line["tokens"], line["supervised_tokens"]) == (4.0, 40, 5)
    assert (line["step"], line["epoch"], line["grad_norm"], failed_saves) == (3, 0.75, None, 0)


def run_with_batches(heartbeat, agreements, batches_per_agreement=1):
    """The attributes that `_with_stop_checks` reads; each agreement of the ranks is recorded."""
    return SimpleNamespace(
        heartbeat=heartbeat,
        progress=Progress(step=4),
        input_wait=InputWait(),
        stops=SimpleNamespace(reason=lambda: None),
        session=SimpleNamespace(any_rank=agreements.append),
        batches_per_agreement=batches_per_agreement,
    )


@pytest.mark.parametrize(
    ("batches_per_agreement", "num_agreements"), [(1, 6), (2, 3), (4, 2), (6, 1), (99, 1)]
)
def test_ranks_agree_on_stops_at_the_start_of_a_step_and_after_batches_per_agreement(
    batches_per_agreement, num_agreements
):
    agreements = []
    run = run_with_batches(Heartbeat(), agreements, batches_per_agreement)
    assert list(loop._with_stop_checks(run, range(6))) == list(range(6))
    assert len(agreements) == num_agreements


def test_waiting_for_input_is_a_separate_phase_of_the_heartbeat():
    """The watchdog names the phase of a hanging rank: here not the backward pass before it."""
    heartbeat = Heartbeat()
    run = run_with_batches(heartbeat, agreements=[])
    phases = []

    def source():
        for batch in range(3):
            phases.append((heartbeat.phase, heartbeat.step))
            yield batch

    for _ in loop._with_stop_checks(run, source()):
        heartbeat.beat("the backward pass")
    assert phases == [("waiting for its batch", 4)] * 3
    assert heartbeat.phase == "the end of its step"


@pytest.mark.parametrize(("num_updates", "num_checks"), [(1, 0), (2, 1), (5, 1)])
def test_the_adapter_is_checked_once_after_the_second_update(monkeypatch, num_updates, num_checks):
    checked = []
    monkeypatch.setattr(loop, "_require_trained", checked.append)
    monkeypatch.setattr(loop, "_measure", lambda *_: ({"loss": 1.0}, 0.0))
    monkeypatch.setattr(loop, "_record", lambda *_: None)
    run = new_run()
    run.eval_split, run.step_watch, run.plan.steps.total_steps = None, Stopwatch(), 9
    run.plan.settings = SimpleNamespace(saves=None, evaluations=None, early_stopping_patience=None)
    run.plan.settings.save_must_succeed = False
    finished = SimpleNamespace(size=StepSize(documents=4, supervised_tokens=5))
    was_applied = [True, False] + [True] * (num_updates - 1)  # the second step has no update
    for applied in was_applied:
        loop._complete(run, finished, SimpleNamespace(was_applied=applied, can_lower_scale=True))
    assert checked == [run] * num_checks


def test_a_fully_trained_module_without_a_gradient_ends_the_run(monkeypatch):
    """Its weights are not zero at the start, so Adam's moments are checked instead."""
    head = "base_model.model.lm_head.weight"
    parameters = {head: None, "base_model.model.model.layers.0.q_proj.lora_B.weight": None}
    monkeypatch.setattr(loop, "gather_weights", lambda *_, **__: {})
    monkeypatch.setattr(loop, "expected_shapes", lambda plan: {})
    monkeypatch.setattr(
        loop, "gather_moments", lambda checked, keep: {key: torch.zeros(2) for key in checked}
    )
    run = SimpleNamespace(
        engine=SimpleNamespace(parameters=parameters),
        session=SimpleNamespace(is_rank_zero=True, rank_zero_first=lambda work: work()),
        plan=SimpleNamespace(settings=SimpleNamespace(initialises_from_base=False)),
    )
    with refused(head, "1 of 1", "gradient", error=RankZeroError):
        loop._require_trained(run)


def two_steps(session, folder, lr):
    """Train two steps; the message if the adapter counts as untrained, else an empty string."""
    plan, engine = build_engine(session, folder, {"zero_stage": 2, "batch_size": 2})
    for index in range(2):
        batches, supervised = batches_of_step(plan, Documents(), index, session.placement.rank)
        engine.optimizer_step(batches, supervised, lr)
    run = SimpleNamespace(engine=engine, session=session, plan=plan)
    try:
        loop._require_trained(run)
    except RankZeroError as error:
        return str(error)
    return "" if gather_weights(engine.parameters, keep=True) else "nothing gathered"


def test_an_adapter_that_does_not_change_in_two_steps_ends_the_run_on_all_ranks(
    tiny_model, tmp_path
):
    assert run_ranks(two_steps, tiny_model, 1e-3, tmp_path=tmp_path) == ["", ""]
    # In fp32 this learning rate is 0.
    messages = run_ranks(two_steps, tiny_model, 1e-60, tmp_path=tmp_path)
    assert messages[0] == messages[1]
    assert_mentions(messages[0], "14 of 14 lora_B")
