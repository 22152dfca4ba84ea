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
    """The plan for these settings, and an Engine with the model and a new adapter."""
    plan = make_plan(folder, session.placement.world_size, documents, **settings)
    model, _ = build_model(plan, session, None)
    group = session.sequence_group(plan.layout.sequence_parallel_size)
    return plan, Engine(model, plan, group=group)


def batches_of_step(plan, split, step: int, rank: int) -> tuple[list[SeededBatch], int]:
    """The micro-batches of a rank in one step, and the step's number of supervised tokens.

    `split`: the data set. The ranks of a sequence-parallel group have the same sequences, and each
    rank has another part of each sequence.
    """
    group_size = plan.layout.sequence_parallel_size
    group, rank_in_group = divmod(rank, group_size)
    layout = BatchLayout(
        data_parallel_size=plan.layout.data_parallel_size,
        accumulation_steps=plan.layout.accumulation_steps,
        micro_batch_size=plan.layout.micro_batch_size,
        flops=sequence_flops(cost_per_token(plan.shape, plan.settings, plan.training_dtype)),
    )
    micro_batches = RankWork(split, layout, seed=0, rank=group, steps=range(step, step + 1))
    batches = [
        SeededBatch(
            build_batch(split, micro_batch.sequences, SequencePart(group_size, rank_in_group)),
            forward_seed(0, step, micro_batch.first, rank_in_group),
        )
        for micro_batch in micro_batches
    ]
    return batches, micro_batches.size_of(step).supervised_tokens


def train_tiny(
    session, folder: Path, settings: dict, steps: int = 5, documents: int = 40, split=None
) -> dict:
    """Train and return losses, gradient norms, final fp32 weights, and the gradients of step 0.

    A loss is the mean over the supervised tokens of a step. Weights are on rank 0 only.
    """
    plan, engine = build_engine(session, folder, settings, documents)
    split = split or Documents(documents)
    rank = session.placement.rank
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batches, supervised = batches_of_step(plan, split, step, rank)
        lr = plan.learning_rate(step)
        # Step 0 repeats the body of Engine.optimizer_step and reads the gradients within it.
        if step == 0:
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
    """Results of `train_tiny` for each of `runs`, a list of settings, on the ranks of `session`."""
    return [train_tiny(session, folder, settings, *arguments) for settings in runs]


def three_steps(session, plan, engine, state=None) -> dict:
    """Losses of steps 0 to 2, state (weights, moments) after step 0, and final weights.

    `state`: the state of another run after step 0. If given, it is restored and steps 1 and 2
    follow.
    """
    result, parameters = {"losses": []}, engine.parameters
    if state is not None:
        weights, moments = state
        restore(engine.deepspeed, parameters, weights, OptimizerState(moments=moments, step=1))
    for step in range(0 if state is None else 1, 3):
        batches, supervised = batches_of_step(plan, Documents(), step, session.placement.rank)
        loss = engine.optimizer_step(batches, supervised, plan.learning_rate(step)).loss_sum
        result["losses"].append(session.sum_over_ranks([loss])[0] / supervised)
        if step == 0:
            weights = gather_weights(parameters, keep=True)
            result["state"] = weights, gather_moments(parameters, keep=True)
    return result | {"final": gather_weights(parameters, keep=True)}


def assert_stages_equal_and_resumes_exact(runs: dict) -> None:
    """Compare results of `three_steps` at the ZeRO stages, and of runs resumed from stage 2.

    Keys of `runs`: zero1, zero2 and zero3; "zero2 resumed" and "zero3 resumed" restored the
    state of zero2.
    """
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
