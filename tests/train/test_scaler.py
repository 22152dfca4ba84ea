"""The fp16 loss scale is resumed; a step that is not finite on one rank is skipped on all."""

from dataclasses import replace

import pytest
import torch

from pipeline.adapter.gather import (
    OptimizerState,
    gather_moments,
    gather_weights,
    is_at_smallest_scale,
    is_scaled,
    loss_scaler_state,
    restore,
)
from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from pipeline.plan.deepspeed.config import deepspeed_config
from pipeline.train.engine import Engine
from tests.ranks import run_ranks
from tests.tiny import Documents, make_plan
from tests.train_tiny import batches_of_step, build_engine

pytestmark = pytest.mark.engine


def build_fp16(session, folder, settings):
    """An fp16 engine on CPU ranks, which a plan would refuse."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    plan = make_plan(folder, session.placement.world_size, 40, **settings)
    layout = replace(plan.layout, training_dtype="float16")
    config = deepspeed_config(plan.shape, plan.settings, layout, is_cuda=False)
    config["fp16"]["loss_scale_window"] = 2  # doubled after 2 steps, so it soon overflows again
    plan = replace(plan, layout=layout, deepspeed=config)
    return plan, Engine(attach_adapter(load_base(plan, session.device), plan), plan)


def train_steps(session, plan, engine, first, count):
    """Train steps `first` to `first + count - 1`.

    Returns for each step: the loss, whether the update was applied, whether the scale can be
    lowered, and the scale.
    """
    split, results = Documents(), []
    for step in range(first, first + count):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        result = engine.optimizer_step(batches, supervised, plan.learning_rate(step))
        loss = session.sum_over_ranks([result.loss_sum])[0] / supervised
        scale = loss_scaler_state(engine.deepspeed)["cur_scale"]
        results.append((loss, result.was_applied, result.can_lower_scale, scale))
    return results


def scaled_run(session, folder, settings):
    """Train `before` (14 steps), save the state, and train `after` (6 steps)."""
    keep = session.is_rank_zero
    plan, engine = build_fp16(session, folder, settings)
    assert is_scaled(engine.deepspeed)
    engine.deepspeed.optimizer.loss_scaler.cur_scale = 2.0**24  # overflows in the first steps
    before = train_steps(session, plan, engine, 0, 14)
    num_applied = sum(applied for _, applied, *_ in before)
    saved = {
        "weights": gather_weights(engine.parameters, keep=keep),
        "moments": gather_moments(engine.parameters, keep=keep),
        "scaler": loss_scaler_state(engine.deepspeed),
        "optimizer_step": num_applied,
    }
    return {"before": before, "saved": saved, "after": train_steps(session, plan, engine, 14, 6)}


def scaled_resume(session, folder, settings, saved):
    """Results of the last 6 steps of `scaled_run`, resumed from its saved state."""
    plan, engine = build_fp16(session, folder, settings)
    restore(
        engine.deepspeed,
        engine.parameters,
        saved["weights"],
        OptimizerState(
            moments=saved["moments"], step=saved["optimizer_step"], loss_scaler=saved["scaler"]
        ),
    )
    return train_steps(session, plan, engine, 14, 6)


def scaled_runs(session, folder, runs):
    return [scaled_run(session, folder, settings) for settings in runs]


def scaled_resumes(session, folder, runs):
    return [scaled_resume(session, folder, *run) for run in runs]


@pytest.fixture(scope="module")
def scaled(tiny_model, tmp_path_factory):
    """ZeRO stage -> `scaled_run`, and `scaled_resume` in other processes."""
    folder = tmp_path_factory.mktemp("scaled")
    runs = [{"zero_stage": stage, "batch_size": 2, "lora_dropout": 0.1} for stage in (1, 2, 3)]
    uninterrupted = run_ranks(scaled_runs, tiny_model, runs, tmp_path=folder)[0]
    runs = [(run, result["saved"]) for run, result in zip(runs, uninterrupted, strict=True)]
    resumed = run_ranks(scaled_resumes, tiny_model, runs, tmp_path=folder)[0]
    return dict(enumerate(zip(uninterrupted, resumed, strict=True), start=1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_fp16_run_has_the_same_scale(scaled, stage):
    uninterrupted, resumed = scaled[stage]
    skipped = [not was_applied for _, was_applied, *_ in uninterrupted["before"]]
    assert skipped[0]
    assert any(skipped[1:])
    assert not all(skipped)
    # An overflow at such a scale does not count as a step that is not finite.
    assert all(can_lower_scale for _, _, can_lower_scale, _ in uninterrupted["before"])
    scales = [scale for *_, scale in uninterrupted["after"]]
    assert len(set(scales)) > 1  # so the resumed counters matter
    assert resumed == uninterrupted["after"]


def overflow_at_the_smallest_scale(session, folder):
    """Whether the update of such a step was applied, and whether the scale can be lowered."""
    plan, engine = build_fp16(session, folder, {"zero_stage": 2, "batch_size": 2})
    scaler = engine.deepspeed.optimizer.loss_scaler
    scaler.cur_scale = scaler.min_scale
    assert is_at_smallest_scale(engine.deepspeed)
    if session.placement.rank == 1:
        make_next_loss_infinite(engine)
    batches, supervised = batches_of_step(plan, Documents(), 0, session.placement.rank)
    result = engine.optimizer_step(batches, supervised, 1e-3)
    return result.was_applied, result.can_lower_scale


def test_an_overflow_at_the_smallest_scale_is_counted_and_not_raised(tiny_model, tmp_path):
    by_rank = run_ranks(overflow_at_the_smallest_scale, tiny_model, tmp_path=tmp_path)
    assert by_rank == [(False, False)] * 2


def make_next_loss_infinite(engine) -> None:
    """Make the loss of the next forward pass infinite, on this rank."""
    forward = engine._forward

    def infinite_once(batch):
        engine._forward = forward
        return forward(batch) * float("inf")

    engine._forward = infinite_once


BAD_STEP = 2


def train_with_bad_step(session, folder, settings):
    """Train five steps; in BAD_STEP, the loss of rank 1 is infinite.

    Returns whether each update was applied, and the final weights.
    """
    plan, engine = build_engine(session, folder, settings)
    split, applied = Documents(), []
    for step in range(5):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        if step == BAD_STEP and session.placement.rank == 1:
            make_next_loss_infinite(engine)
        applied.append(engine.optimizer_step(batches, supervised, 1e-3).was_applied)
    return applied, gather_weights(engine.parameters, keep=True)


def train_without_bad_step(session, folder, settings):
    """Final weights after the same steps without BAD_STEP."""
    plan, engine = build_engine(session, folder, settings)
    for step in range(5):
        batches, supervised = batches_of_step(plan, Documents(), step, session.placement.rank)
        if step != BAD_STEP:
            engine.optimizer_step(batches, supervised, 1e-3)
    return gather_weights(engine.parameters, keep=True)


RUNS = {  # each step has 2 micro-batches on a rank, the first of which is infinite in BAD_STEP
    (stage, dtype): {"zero_stage": stage, "batch_size": 2, "bf16": dtype == "bf16"}
    for stage in (1, 2, 3)
    for dtype in ("bf16", "fp32")
}


def train_with_and_without_bad_step(session, folder):
    return {
        run: (
            train_with_bad_step(session, folder, settings),
            train_without_bad_step(session, folder, settings),
        )
        for run, settings in RUNS.items()
    }


@pytest.fixture(scope="module")
def results_by_rank(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    return run_ranks(train_with_and_without_bad_step, tiny_model, tmp_path=folder)


@pytest.mark.parametrize("run", RUNS)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(results_by_rank, run):
    results = [results_of_rank[run] for results_of_rank in results_by_rank]
    assert [applied for (applied, _), _ in results] == [[True, True, False, True, True]] * 2
    (_, weights), expected = results[0]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items())
