"""Adapter weights and Adam moments are gathered and restored exactly at any stage and size."""

from functools import cache

import pytest
import torch

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from tests.ranks import run_ranks
from tests.tiny import Documents
from tests.train_tiny import build_engine, distance, work

pytestmark = pytest.mark.engine

STEPS, MORE = 3, 3  # an epoch has 5 steps: the later steps cross into the second epoch


def train_and_gather(session, folder, settings):
    """Train a few steps, gather the state, and continue training without a restore."""
    plan, engine = build_engine(session, folder, settings)
    losses = train_steps(session, plan, engine, 0, STEPS)
    keep = session.is_rank_zero
    weights = gather_weights(engine.parameters, keep=keep)
    moments = gather_moments(engine.parameters, keep=keep)
    assert keep or not weights
    losses += train_steps(session, plan, engine, STEPS, MORE)
    return {"weights": weights, "moments": moments, "losses": losses}


def restore_and_train(session, folder, settings, saved):
    """Restore saved tensors into a new engine, gather them again, and continue training."""
    plan, engine = build_engine(session, folder, settings)
    state = OptimizerState(moments=saved["moments"], step=STEPS)
    restore(engine.deepspeed, engine.parameters, saved["weights"], state)
    weights = gather_weights(engine.parameters, keep=True)
    moments = gather_moments(engine.parameters, keep=True)
    losses = train_steps(session, plan, engine, STEPS, MORE)
    return {"weights": weights, "moments": moments, "losses": losses}


def train_each(session, folder, runs):
    """Results of `train_and_gather` for several settings; the ranks start once for all of them."""
    return [train_and_gather(session, folder, settings) for settings in runs]


def restore_each(session, folder, runs):
    """Results of `restore_and_train` for several settings, each with its saved tensors."""
    return [restore_and_train(session, folder, settings, saved) for settings, saved in runs]


def train_steps(session, plan, engine, first, count):
    split, losses = Documents(), []
    for step in range(first, first + count):
        batches, supervised = work(plan, split, step, session.placement.rank)
        result = engine.optimizer_step(batches, supervised, plan.learning_rate(step))
        losses.append(session.sum_over_ranks([result.loss_sum])[0] / supervised)
    return losses


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """State of a LoRA run on two ranks at ZeRO-2 in fp32."""
    folder = tmp_path_factory.mktemp("saved")
    return run_ranks(
        train_and_gather, tiny_model, {"zero_stage": 2, "batch_size": 2}, tmp_path=folder
    )[0]


def assert_restored(restored, saved):
    for kind in ("weights", "moments"):
        assert restored[kind].keys() == saved[kind].keys()
        for key, tensor in saved[kind].items():
            assert torch.equal(restored[kind][key], tensor), key


@pytest.fixture(scope="module")
def restored(tiny_model, tmp_path_factory, saved):
    """Function: number of ranks and batch settings -> results of a restore at each stage."""

    @cache
    def at(world_size, batch):
        settings = {"batch_size": 4} | dict(batch)
        runs = [(settings | {"zero_stage": stage}, saved) for stage in (1, 2, 3)]
        folder = tmp_path_factory.mktemp("restored")
        return run_ranks(restore_each, tiny_model, runs, tmp_path=folder, world_size=world_size)[0]

    return at


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_restored_run_has_the_same_state_and_losses_at_any_stage(
    saved, restored, stage, world_size
):
    result = restored(world_size, (("global_batch_size", 8),))[stage - 1]
    assert_restored(result, saved)
    assert result["losses"] == pytest.approx(saved["losses"][STEPS:], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_restored_exactly_on_ranks_with_padded_shards(saved, restored, stage):
    """Three ranks shard most matrices unevenly. Losses differ, as does the global batch."""
    batch = (("gradient_accumulation_steps", 1), ("global_batch_size", "auto"))
    assert_restored(restored(3, batch)[stage - 1], saved)


SAME_SPLIT = [
    {"zero_stage": 1, "bf16": True},
    {"zero_stage": 2, "bf16": True},
    {"zero_stage": 3, "bf16": True, "gradient_checkpointing": True},
    {"zero_stage": 3, "load_in_4bit": True},  # without checkpointing
    {"zero_stage": 2, "sequence_parallel_size": 2, "neftune_noise_alpha": 5.0},
]


@pytest.fixture(scope="module")
def same_split(tiny_model, tmp_path_factory):
    """The runs of SAME_SPLIT, and the same runs restored by other processes."""
    folder = tmp_path_factory.mktemp("same")
    runs = [settings | {"batch_size": 2, "lora_dropout": 0.1} for settings in SAME_SPLIT]
    before = run_ranks(train_each, tiny_model, runs, tmp_path=folder)[0]
    runs = list(zip(runs, before, strict=True))
    return before, run_ranks(restore_each, tiny_model, runs, tmp_path=folder)[0]


@pytest.mark.parametrize("number", range(len(SAME_SPLIT)))
def test_a_restored_run_with_the_same_split_is_bitwise_equal(same_split, number):
    before, after = same_split
    assert after[number]["losses"] == before[number]["losses"][STEPS:]


def test_gathered_weights_are_the_fp32_masters_not_the_bf16_copies(same_split):
    before, _ = same_split
    for run in before[:3]:
        weights = run["weights"]
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        rounded = {key: tensor.bfloat16().float() for key, tensor in weights.items()}
        assert 0 < distance(rounded, weights) < 2**-8
