"""The choice of a layout for long sequences: tiles, activations in host memory, groups of ranks."""

from dataclasses import replace

import pytest

from pipeline.plan.given.catalogue import gpu_named
from pipeline.plan.given.hardware import GIB
from pipeline.plan.plan import DoesNotFitError
from tests.messages import assert_mentions, refused
from tests.plans import CPU, LLAMA_8B, SMOLLM2, gpu

pytestmark = pytest.mark.unit

H100 = gpu_named("h100-80gb")
ONE_GPU = {"config": LLAMA_8B, "ranks": 1, "hardware": gpu(80, count=1), "global_batch_size": 1}


def test_tiles_and_offload_of_activations_are_used_only_if_the_sequence_does_not_fit_otherwise(
    plan_of,
):
    """MLP tiles: an MLP computes the parts of a sequence one after another."""
    short, tiled, offloaded = (
        plan_of(**ONE_GPU, max_length=length) for length in (16_384, 131_072, 262_144)
    )
    assert (short.layout.mlp_tiles, short.layout.offload_activations) == (1, False)
    assert (tiled.layout.mlp_tiles, tiled.layout.offload_activations) == (32, False)
    assert (offloaded.layout.mlp_tiles, offloaded.layout.offload_activations) == (64, True)
    assert not {"mlp_tiles", "offload_activations"} & short.why.keys()
    assert_mentions(tiled.why["mlp_tiles"], "without tiles", "76.0 GiB")
    assert "offload_activations False needs" in offloaded.why["offload_activations"]
    assert tiled.layout.offload_param == offloaded.layout.offload_param == "none"
    # At least 31 layers have their input in host memory: 262144 tokens x 4096 values x 2 bytes.
    input_bytes = 262_144 * 4096 * 2
    assert offloaded.memory.host_peak_bytes > 31 * input_bytes > tiled.memory.host_peak_bytes
    assert offloaded.speed.terms["tiles"] > 0
    assert offloaded.speed.terms["activation_copies"] > 0


def test_sequences_are_split_over_ranks_if_they_only_fit_with_activations_in_host_memory(
    plan_of, plan_and_candidates_of
):
    keys = {"hardware": gpu(80), "global_batch_size": 8, "max_length": 262_144}
    plan, candidates_of_run = plan_and_candidates_of(**keys)
    assert plan.layout.sequence_parallel_size == 8
    assert not plan.layout.offload_activations
    assert plan.layout.global_batch_size == 8
    assert {c.layout.sequence_parallel_size for c in candidates_of_run} == {1, 2, 4, 8}
    assert "sequence_parallel_size" in plan.why
    times_without_offload = [
        candidate.speed.seconds_per_step
        for candidate in candidates_of_run
        if candidate.layout.zero_stage == 2
        and not candidate.refusal
        and not candidate.layout.offload_activations
    ]
    assert candidates_of_run[0].speed.seconds_per_step == min(times_without_offload)
    one_rank = {"hardware": gpu(80, count=1), "ranks": 1}
    for changes in ({"sequence_parallel_size": 1}, one_rank):
        assert plan_of(**keys | changes).layout.sequence_parallel_size == 1


def candidates_even_if_none_fits(candidates_of, *arguments, **keywords):
    try:
        return candidates_of(*arguments, **keywords)
    except DoesNotFitError as error:
        return error.ranked


@pytest.mark.parametrize(
    "config_change",
    [
        {},  # the 9 heads of SmolLM2 cannot be divided over 2, 4 or 8 ranks
        # The random numbers of dropout in attention depend on the group size.
        {"num_attention_heads": 8, "attention_dropout": 0.1},
    ],
)
def test_sequences_are_not_split_if_a_rule_would_refuse_the_split(candidates_of, config_change):
    candidates_of_run = candidates_even_if_none_fits(
        candidates_of, SMOLLM2 | config_change,
        hardware=gpu(24), global_batch_size=8, max_length=1_048_576,
    )  # fmt: skip
    assert {c.layout.sequence_parallel_size for c in candidates_of_run} == {1}


def test_a_run_that_fits_only_with_more_host_memory_is_refused(plan_of):
    small_host = replace(gpu(80, count=1), host_bytes=32 * GIB)
    with refused("max_length", "does not fit"):
        plan_of(**(ONE_GPU | {"hardware": small_host}), max_length=262_144)


@pytest.mark.parametrize("key", ["offload_activations", "gradient_checkpointing"])
def test_activations_are_not_offloaded_if_a_setting_forbids_it(candidates_of, key):
    candidates_of_run = candidates_even_if_none_fits(
        candidates_of, **ONE_GPU, **{key: False}, max_length=262_144
    )
    assert not any(candidate.layout.offload_activations for candidate in candidates_of_run)


def test_activations_are_not_offloaded_on_a_cpu(candidates_of):
    candidates_of_run = candidates_of(SMOLLM2, CPU, ranks=2, max_length=4096)
    assert not any(candidate.layout.offload_activations for candidate in candidates_of_run)


def test_offload_activations_true_checkpoints_all_30_layers(layout_of):
    chosen = layout_of(SMOLLM2, CPU, ranks=2, max_length=512, offload_activations=True, mlp_tiles=3)
    assert chosen.offload_activations
    assert chosen.checkpointed_layers == 30
    assert chosen.mlp_tiles == 3


def test_mlp_tiles_save_memory_and_cost_time(plan_of):
    whole, tiled = (
        plan_of(**ONE_GPU, max_length=32_768, mlp_tiles=num_tiles, gradient_checkpointing=True)
        for num_tiles in (1, 8)
    )
    assert tiled.memory.peak_bytes < whole.memory.peak_bytes
    assert tiled.speed.seconds_per_step > whole.speed.seconds_per_step
    assert "tiles" not in whole.speed.terms


def test_the_plan_of_a_long_sequence_says_that_experts_are_not_tiled(plan_of):
    experts = LLAMA_8B | {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    dense, long, short = (
        plan_of(**ONE_GPU | {"config": config, "max_length": length}).why
        for config, length in ((LLAMA_8B, 16_384), (experts, 16_384), (experts, 8192))
    )
    assert "experts" in long["mlp_tiles"]
    assert "mlp_tiles" not in dense.keys() | short.keys()
