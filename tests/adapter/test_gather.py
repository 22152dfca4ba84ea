"""Adapter weights and Adam moments are gathered and restored exactly at any stage and size."""

from functools import cache

import pytest
import torch

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from tests.ranks import run_ranks
from tests.tiny import Documents
from tests.train_tiny import batches_of_step, build_engine, distance

pytestmark = pytest.mark.engine

# Steps before and after the state is gathered. An epoch has 5 steps, so the last is in the second.
STEPS, MORE = 3, 3


def train_and_gather(session, folder, settings):
    """Train STEPS, gather the state, and train MORE without a restore; state and all losses."""
    plan, engine = build_engine(session, folder, settings)
    losses = train_steps(session, plan, engine, 0, STEPS)
    keep = session.is_rank_zero
    weights = gather_weights(engine.parameters, keep=keep)
    moments = gather_moments(engine.parameters, keep=keep)
    assert keep or not weights
    losses += train_steps(session, plan, engine, STEPS, MORE)
    return {"weights": weights, "moments": moments, "losses": losses}


def restore_and_train(session, folder, settings, saved):
    """Restore saved tensors into a new engine, gather them, and train MORE; state and losses."""
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
    """Train steps `first` to `first + count - 1`; the mean loss of each."""
    split, losses = Documents(), []
    for step in range(first, first + count):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
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
    """Function: number of ranks and batch settings -> results of a restore at ZeRO-1, 2 and 3."""

    @cache
    def results_of(world_size, batch_settings):
        settings = {"batch_size": 4} | dict(batch_settings)
        runs = [(settings | {"zero_stage": stage}, saved) for stage in (1, 2, 3)]
        folder = tmp_path_factory.mktemp("restored")
        return run_ranks(restore_each, tiny_model, runs, tmp_path=folder, world_size=world_size)[0]

    return results_of


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
    """Three ranks shard most matrices unevenly.

    Their losses are not compared: 3 does not divide the global batch of 8, so they have another.
    """
    batch_settings = (("gradient_accumulation_steps", 1), ("global_batch_size", "auto"))
    assert_restored(restored(3, batch_settings)[stage - 1], saved)


# Settings of runs that are restored at the same stage, on as many ranks.
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


@pytest.mark.parametrize("index", range(len(SAME_SPLIT)))
def test_a_run_restored_at_the_same_stage_and_world_size_is_bitwise_equal(same_split, index):
    before, after = same_split
    assert after[index]["losses"] == before[index]["losses"][STEPS:]


def test_gathered_weights_are_the_fp32_masters_not_the_bf16_copies(same_split):
    before, _ = same_split
    for run in before[:3]:  # those in bf16
        weights = run["weights"]
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        rounded = {key: tensor.bfloat16().float() for key, tensor in weights.items()}
        assert 0 < distance(rounded, weights) < 2**-8
