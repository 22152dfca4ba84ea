"""A few training steps on the tiny model, called on every rank by the engine tests."""

from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from pipeline.data.order.batches import SequencePart, build_batch
from pipeline.data.order.order import BatchLayout, RankWork, forward_seed
from pipeline.data.order.steps import SeededBatch
from pipeline.plan.cost.per_token import cost_per_token, sequence_flops
from pipeline.train.assemble import build_model
from pipeline.train.engine import Engine
from tests.tiny import Documents, make_plan


def build_engine(session, folder: Path, settings: dict, documents: int = 40):
    plan = make_plan(folder, session.placement.world_size, documents, **settings)
    model, _ = build_model(plan, session, None)
    group = session.sequence_group(plan.layout.sequence_parallel_size)
    return plan, Engine(model, plan, group=group)


def work(plan, split, step: int, rank: int) -> tuple[list[SeededBatch], int]:
    """The micro-batches of a rank in one step, and the step's number of supervised tokens."""
    size = plan.layout.sequence_parallel_size
    group, place = divmod(rank, size)
    layout = BatchLayout(
        data_parallel_size=plan.layout.data_parallel_size,
        accumulation_steps=plan.layout.accumulation_steps,
        micro_batch_size=plan.layout.micro_batch_size,
        flops=sequence_flops(cost_per_token(plan.shape, plan.settings, plan.training_dtype)),
    )
    work_of_rank = RankWork(split, layout, seed=0, rank=group, steps=range(step, step + 1))
    batches = [
        SeededBatch(
            build_batch(split, m.sequences, SequencePart(size, place)),
            forward_seed(0, step, m.first, place),
        )
        for m in work_of_rank
    ]
    return batches, work_of_rank.size_of(step).supervised_tokens


def train_tiny(
    session, folder: Path, settings: dict, steps: int = 5, documents: int = 40, split=None
) -> dict:
    """Losses (mean over supervised tokens), gradient norms, fp32 weights; gradients of step 0."""
    plan, engine = build_engine(session, folder, settings, documents)
    split = split or Documents(documents)
    rank = session.placement.rank
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batches, supervised = work(plan, split, step, rank)
        lr = plan.learning_rate(step)
        if step == 0:  # as in Engine.optimizer_step, with the gradients read before the step
            engine.deepspeed.train()
            engine.set_learning_rate(lr)
            total, _ = engine.backward_passes(batches, supervised)
            gradients = full_gradients(engine)
            engine.deepspeed.step()
            loss_sum = float(total)
            norms.append(float(engine.deepspeed.get_global_grad_norm()))
        else:
            result = engine.optimizer_step(batches, supervised, lr)
            loss_sum = result.loss_sum
            norms.append(result.grad_norm)
        losses.append(session.sum_over_ranks([loss_sum])[0] / supervised)
    weights = gather_weights(engine.parameters, keep=rank == 0)
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def train_each(session, folder: Path, runs: list[dict], *arguments) -> list[dict]:
    """Results of `train_tiny` for several settings; the ranks start once for all of them."""
    return [train_tiny(session, folder, settings, *arguments) for settings in runs]


def three_steps(session, plan, engine, state=None) -> dict:
    """Losses of steps 0 to 2, state (weights, moments) after step 0, and final weights.

    `state`: that of another run after step 0, which is restored and continued at step 1.
    """
    result, parameters = {"losses": []}, engine.parameters
    if state is not None:
        weights, moments = state
        restore(engine.deepspeed, parameters, weights, OptimizerState(moments=moments, step=1))
    for step in range(0 if state is None else 1, 3):
        batches, supervised = work(plan, Documents(), step, session.placement.rank)
        loss = engine.optimizer_step(batches, supervised, plan.learning_rate(step)).loss_sum
        result["losses"].append(session.sum_over_ranks([loss])[0] / supervised)
        if step == 0:
            weights = gather_weights(parameters, keep=True)
            result["state"] = weights, gather_moments(parameters, keep=True)
    return result | {"final": gather_weights(parameters, keep=True)}


def assert_stages_equal_and_resumes_exact(runs: dict) -> None:
    """Compare results of `three_steps` at each stage, and of runs resumed from `zero2`."""
    losses, final = runs["zero2"]["losses"], runs["zero2"]["final"]
    for name in ("zero1", "zero3"):
        assert runs[name]["losses"] == pytest.approx(losses, rel=1e-6)
        assert distance(runs[name]["final"], final) < 1e-5
    assert runs["zero2 resumed"]["losses"] == losses[1:]
    assert all(torch.equal(t, final[key]) for key, t in runs["zero2 resumed"]["final"].items())
    assert runs["zero3 resumed"]["losses"] == pytest.approx(losses[1:], rel=1e-6)


def full_gradients(engine) -> dict:
    """The reduced gradients of all adapter weights, in fp32."""
    return {
        key: safe_get_full_grad(p).float().cpu().reshape(shape_of(p)).clone()
        for key, p in engine.parameters.items()
    }


def shape_of(parameter):
    return getattr(parameter, "ds_shape", parameter.shape)


def distance(a: dict, b: dict) -> float:
    """Norm of the difference of all tensors, relative to the norm of `b`."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).pow(2).sum()) for k in b) ** 0.5
    return difference / sum(float(b[k].double().pow(2).sum()) for k in b) ** 0.5
