"""The training loop: which steps end a run on all ranks, and which are only counted."""

from types import SimpleNamespace

import pytest

from pipeline.adapter.gather import gather_weights
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.errors import RankZeroError
from pipeline.train import loop
from pipeline.train.checkpoint import Progress
from pipeline.train.engine import StepResult
from pipeline.train.metrics import InputWait
from tests.messages import assert_mentions, refused
from tests.ranks import run_ranks
from tests.tiny import Documents
from tests.train_tiny import build_engine, work

pytestmark = pytest.mark.engine


def run_of(debug: bool = False):
    """The attributes of a TrainingState that are needed to count steps."""
    steps = SimpleNamespace(steps_per_epoch=5)
    return SimpleNamespace(
        plan=SimpleNamespace(steps=steps),
        progress=Progress(),
        context=SimpleNamespace(is_debug=debug),
    )


def result(was_applied=True, can_lower_scale=False):
    return StepResult(
        loss_sum=1.0, tokens=1, grad_norm=1.0, was_applied=was_applied,
        can_lower_scale=can_lower_scale,
    )  # fmt: skip


def advance(run, loss, step_result, documents=4):
    loop._count(run, loss, step_result, documents)
    loop._require_finite(run, loss)


def test_three_consecutive_steps_that_are_not_finite_end_the_run():
    run = run_of()
    for loss, each in ((float("nan"), result(False)), (1.0, result(False)), (1.0, result())):
        advance(run, loss, each)
    assert (run.progress.step, run.progress.optimizer_step, run.progress.skipped_steps) == (3, 1, 2)
    advance(run, 1.0, result(False))
    advance(run, float("inf"), result(False))
    with refused("step 6", "not finite", "3 steps", "unchanged", error=RankZeroError):
        advance(run, 1.0, result(False))
    with refused("1 steps", error=RankZeroError):
        advance(run_of(debug=True), 1.0, result(False))


def test_overflows_while_the_loss_scale_can_shrink_do_not_end_the_run():
    run = run_of()
    for _ in range(20):
        advance(run, 1.0, result(False, can_lower_scale=True))
    assert (run.progress.skipped_steps, run.progress.bad_steps) == (20, 0)
    for _ in range(2):
        advance(run, float("nan"), result(False, can_lower_scale=True))
    with refused("not finite", error=RankZeroError):
        advance(run, float("nan"), result(False, can_lower_scale=True))


def test_a_loss_of_zero_is_finite():
    """In fp32 a short, learned answer has loss 0 and a non-zero gradient."""
    run = run_of()
    for _ in range(5):
        advance(run, 0.0, result())
    assert (run.progress.optimizer_step, run.progress.bad_steps) == (5, 0)


def test_the_position_in_the_epoch_is_in_documents():
    run, positions = run_of(), []
    for documents in (4, 4, 4, 4, 2, 4, 4):
        advance(run, 1.0, result(), documents)
        positions.append(run.progress.documents)
    assert positions == [4, 8, 12, 16, 18, 4, 8]


def run_with_batches(heartbeat, agreements, batches_per_agreement=1):
    return SimpleNamespace(
        heartbeat=heartbeat,
        progress=Progress(step=4),
        input_wait=InputWait(),
        stops=SimpleNamespace(reason=lambda: None),
        session=SimpleNamespace(any_rank=agreements.append),
        batches_per_agreement=batches_per_agreement,
    )


@pytest.mark.parametrize(
    ("batches_per_agreement", "agreements"), [(1, 6), (2, 3), (4, 2), (6, 1), (99, 1)]
)
def test_ranks_agree_on_stops_at_the_start_of_a_step_and_after_so_many_batches(
    batches_per_agreement, agreements
):
    made = []
    run = run_with_batches(Heartbeat(), made, batches_per_agreement)
    assert list(loop._with_stop_checks(run, range(6))) == list(range(6))
    assert len(made) == agreements


def test_waiting_for_input_is_a_separate_phase_of_the_heartbeat():
    """The watchdog names the phase: hanging input must not appear as the previous collective."""
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


def two_steps(session, folder, lr):
    plan, engine = build_engine(session, folder, {"zero_stage": 2, "batch_size": 2})
    for step in range(2):
        batches, supervised = work(plan, Documents(), step, session.placement.rank)
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
    messages = run_ranks(two_steps, tiny_model, 1e-60, tmp_path=tmp_path)  # too small for fp32
    assert messages[0] == messages[1]
    assert_mentions(messages[0], "14 of 14 lora_B")
