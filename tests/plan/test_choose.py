"""The choice of a layout: where it changes, its invariants, and its reasons."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.choose import Cluster, candidates
from pipeline.plan.cost.memory import memory
from pipeline.plan.given.catalogue import gpu_named
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.layout import SequenceProfile
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import DoesNotFitError, make_plan, plan_and_candidates
from pipeline.plan.render import plan_overview
from tests.messages import assert_mentions, refused
from tests.plans import CPU, LLAMA_8B, LLAMA_70B, SMOLLM2, gpu

pytestmark = pytest.mark.unit

H100 = gpu_named("h100-80gb")


@pytest.fixture
def ranked(tmp_path):
    """Plan and candidates of a run; other keys are settings."""

    def make(config=LLAMA_8B, hardware=None, ranks=8, nodes=1, **keys):
        (tmp_path / "config.json").write_text(json.dumps(config))
        values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o", "lora_r": 16}
        run = RunSettings.model_validate(values | keys)
        shape = read_shape(run.model)
        return plan_and_candidates(run, shape, hardware or H100, nodes=nodes, ranks_per_node=ranks)

    return make


@pytest.fixture
def layout(ranked):
    def make(*arguments, **keys):
        return ranked(*arguments, **keys)[0].layout

    return make


def test_a_base_that_fits_is_replicated_and_one_that_does_not_is_sharded(layout, ranked):
    assert layout().zero_stage == 2
    sharded = ranked(LLAMA_70B)[0]
    assert sharded.layout.zero_stage == 3
    assert "zero_stage 2 needs" in sharded.why["zero_stage"]
    assert layout(LLAMA_70B, load_in_4bit=True).zero_stage == 2  # 40 GB in 4 bits


def test_the_stage_changes_at_the_memory_that_the_replicated_base_needs(ranked):
    """The smallest GPU with a replicated base is the smallest on which that layout fits."""
    keys = {"batch_size": 1, "gradient_checkpointing": True, "max_length": 256, "ranks": 2}
    plan = ranked(hardware=gpu(80), **keys)[0]
    need = plan.memory.device_need
    fitting = next(g for g in range(10, 81) if gpu(g).usable_bytes(2) >= need)
    assert ranked(hardware=gpu(fitting), **keys)[0].layout.zero_stage == 2
    assert ranked(hardware=gpu(fitting - 1), **keys)[0].layout.zero_stage == 3


def test_hpz_is_for_slow_links_between_nodes(layout):
    slow = replace(H100, network=H100.node_link / 20)
    assert layout(LLAMA_70B, slow, nodes=2).hpz_partition_size == 8
    assert layout(LLAMA_70B, slow, nodes=1).hpz_partition_size == 1
    # With 24 GiB a GPU, a copy of 70B parameters over the 8 GPUs of a node does not fit.
    small = replace(gpu_named("rtx-4090-24gb"), network=1e9)
    assert layout(LLAMA_70B, small, nodes=8, batch_size=1).hpz_partition_size == 1


def test_no_more_layers_are_checkpointed_than_memory_requires(ranked):
    few = ranked(max_length=512, batch_size=1)[0].layout
    assert few.checkpointed_layers == 0
    plan = ranked(max_length=8192, batch_size=4)[0]
    count = plan.layout.checkpointed_layers
    assert 0 < count < 32
    fewer = replace(plan.layout, checkpointed_layers=count - 1)
    need = memory(plan.shape, plan.settings, fewer, plan.hardware, SequenceProfile(tokens=8192))
    assert need.device_need > plan.hardware.usable_bytes(8) >= plan.memory.device_need
    assert_mentions(plan.why["checkpointed_layers"], f"{count} of 32", f"{count - 1}")


def test_the_base_is_offloaded_only_if_nothing_else_fits(layout):
    one_rank = {"ranks": 1, "batch_size": 1, "max_length": 512}
    large_host = replace(H100, host_bytes=512 * 2**30)
    assert layout(LLAMA_70B, large_host, **one_rank).offload_param == "cpu"
    with refused("load_in_4bit: true"):
        layout(LLAMA_70B, replace(H100, host_bytes=64 * 2**30), **one_rank)
    assert layout(LLAMA_70B, large_host, ranks=8).offload_param == "none"


def test_a_quantised_base_larger_than_a_device_and_the_host_is_sharded(layout):
    """Loading shards it at once, so neither a device nor the host needs room for the whole base."""
    small = replace(gpu_named("rtx-4090-24gb"), host_bytes=32 * 2**30)
    chosen = layout(LLAMA_70B, small, ranks=4, load_in_4bit=True, max_length=512)
    assert (chosen.zero_stage, chosen.offload_param) == (3, "none")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"zero_stage": 3, "batch_size": 2, "gradient_checkpointing": True},
            {"zero_stage": 3, "micro_batch_size": 2, "checkpointed_layers": 32},
        ),
        (
            {"zero_stage": 1, "gradient_accumulation_steps": 2},
            {"zero_stage": 1, "accumulation_steps": 2},
        ),
        (
            {"zero_stage": 3, "offload_param": "cpu", "gradient_checkpointing": False},
            {"zero_stage": 3, "offload_param": "cpu", "checkpointed_layers": 0},
        ),
        (
            {"zero_stage": 3, "hpz_partition_size": 4},
            {"zero_stage": 3, "hpz_partition_size": 4},
        ),
    ],
)
def test_every_candidate_has_the_values_that_the_settings_fix(ranked, keys, expected):
    every = ranked(max_length=512, **keys)[1]
    assert every
    for candidate in every:
        assert vars(candidate.layout).items() >= expected.items()


def test_a_run_that_does_not_fit_is_refused_with_a_change_that_makes_it_fit(ranked):
    """The run with the change of the message fits, and needs the memory of the message."""
    keys = {"hardware": gpu(16), "ranks": 1, "batch_size": 1, "offload_param": "none"}
    with refused("offload_param: auto"):
        ranked(**keys, max_length=256)
    del keys["offload_param"]
    assert ranked(**keys, max_length=256)[0].layout.offload_param == "cpu"
    keys |= {"offload_param": "none", "zero_stage": 2}
    with pytest.raises(UserError) as error:
        ranked(**keys)
    match = re.search(r"load_in_4bit: true it needs ([0-9.]+) of [0-9.]+ GiB$", str(error.value))
    need = ranked(**keys, load_in_4bit=True)[0].memory.device_need
    assert float(match[1]) == pytest.approx(need / 2**30, abs=0.05)


def test_if_no_setting_makes_a_run_fit_the_message_has_the_number_of_nodes(ranked):
    small = replace(gpu(16), host_bytes=32 * 2**30)
    keys = {"hardware": small, "ranks": 1, "load_in_4bit": True, "max_length": 256}
    with pytest.raises(UserError) as error:
        ranked(LLAMA_70B, **keys)
    nodes = int(re.search(r"on (\d+) nodes", str(error.value))[1])
    assert ranked(LLAMA_70B, nodes=nodes, **keys)[0].layout.world_size == nodes


def test_a_candidate_that_a_rule_refuses_names_the_rule(ranked):
    keys = {"load_in_4bit": True, "gradient_checkpointing": False, "max_length": 256}
    plan, every = ranked(**keys)
    assert plan.layout.zero_stage == 2
    sharded = [c for c in every if c.layout.zero_stage == 3]
    assert sharded
    assert all(c.refusal.endswith("[rule 4bit-zero3-unchecked]") for c in sharded)
    with refused("rule 4bit-zero3-unchecked"):
        ranked(**keys, zero_stage=3)


def test_a_plan_for_128_gpus_uses_all_of_them(layout):
    chosen = layout(LLAMA_70B, nodes=16, global_batch_size=256)
    assert (chosen.world_size, chosen.global_batch_size) == (128, 256)


def test_a_cpu_never_offloads_and_trains_in_fp32_without_sharding(layout):
    assert layout(SMOLLM2, CPU, ranks=2).offload_param == "none"
    in_fp32 = layout(SMOLLM2, CPU, ranks=2, bf16=False, fp16=False)
    assert in_fp32.zero_stage in (1, 2)


KEYS = st.fixed_dictionaries(
    {
        "lora_r": st.sampled_from([8, 64]),
        "max_length": st.sampled_from([256, 2048, 8192]),
        "load_in_4bit": st.booleans(),
        "global_batch_size": st.sampled_from([64, 128]),
    }
)


@settings(deadline=None, max_examples=40)
@given(keys=KEYS, ranks=st.sampled_from([1, 2, 8]), nodes=st.sampled_from([1, 2, 4]),
       gib=st.sampled_from([24, 40, 80, 141]))  # fmt: skip
def test_the_first_candidate_is_the_fastest_with_its_sharding_and_offloading(
    shape_of_8b, keys, ranks, nodes, gib
):
    values = {"model": "m", "train_data": "t", "output_dir": "o"}
    run, hardware = RunSettings.model_validate(values | keys), gpu(gib)
    cluster = Cluster(hardware=hardware, nodes=nodes, ranks_per_node=ranks)
    every = candidates(run, shape_of_8b, cluster)
    fitting = [c for c in every if c.refusal is None]
    assert every[: len(fitting)] == fitting
    for candidate in every:
        assert candidate.layout.global_batch_size == keys["global_batch_size"]
        fits = candidate.memory.device_need <= hardware.usable_bytes(ranks)
        assert fits or candidate.refusal
    if fitting:
        best = fitting[0]
        comparable = [c for c in fitting if c.layout.is_sharded == best.layout.is_sharded
               and c.layout.offload_param == best.layout.offload_param]  # fmt: skip
        assert best.speed.seconds_per_step == min(c.speed.seconds_per_step for c in comparable)
        assert not best.layout.is_sharded or all(c.layout.is_sharded for c in fitting)
    assert len({c.layout for c in every}) == len(every)


@pytest.fixture(scope="module")
def shape_of_8b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return read_shape(str(folder))


def test_the_plan_is_the_first_candidate(ranked, shape_of_8b):
    plan, every = ranked()
    same = make_plan(plan.settings, plan.shape, H100, nodes=1, ranks_per_node=8)
    assert plan.layout == every[0].layout == same.layout


def test_each_reason_names_the_alternative(ranked):
    why = ranked(bf16=False)[0].why
    assert why["training_dtype"] == "bf16: false"
    in_fp32 = ranked(bf16=False, fp16=False, max_length=256)[0].why
    assert_mentions(in_fp32["zero_stage"], "zero_stage 2", "s/step")
    fixed = ranked(gradient_accumulation_steps=4)[0].why
    assert_mentions(fixed["micro_batch_size"], "other settings")
    sharded = ranked(hpz_partition_size=4)[0].why
    assert_mentions(sharded["zero_stage"], "zero_stage 2", "rule hpz-without-zero3")
    assert_mentions(ranked()[0].why["zero_stage"], "only adapter gradients are communicated")


def test_ranks_that_share_sequences_count_once_in_the_global_batch(ranked):
    keys = {"global_batch_size": 16, "batch_size": 1, "ranks": 8}
    for size, accumulation in ((1, 2), (2, 4), (8, 16)):
        layout = ranked(sequence_parallel_size=size, **keys)[0].layout
        assert (layout.accumulation_steps, layout.global_batch_size) == (accumulation, 16)
        assert layout.data_parallel_size == 8 // size
    with refused("global_batch_size: 9", "4 groups of 2 ranks", "8 or 12"):
        ranked(sequence_parallel_size=2, ranks=8, global_batch_size=9, batch_size=1)


@pytest.mark.parametrize(("nodes", "batch"), [(1, 16), (3, 24)])
def test_a_group_that_is_chosen_does_not_change_the_global_batch(ranked, nodes, batch):
    plan, every = ranked(max_length=600_000, nodes=nodes)
    assert plan.layout.sequence_parallel_size > 1
    assert {candidate.layout.global_batch_size for candidate in every} == {batch}
    assert plan_overview(plan).count(f"{plan.layout.sequence_parallel_size} ranks") == 1


def test_layouts_with_unequal_global_batches_are_compared_by_the_time_of_a_sequence(ranked):
    """With `batch_size` alone, a larger group has a smaller global batch, and so shorter steps."""
    keys = {"batch_size": 1, "gradient_checkpointing": True, "offload_param": "none"}
    plan, every = ranked(max_length=131_072, hardware=gpu_named("a100-40gb"), **keys)
    fitting = [candidate for candidate in every if candidate.refusal is None]
    replicated = [c for c in fitting
        if not c.layout.is_sharded and not c.layout.offload_activations]  # fmt: skip
    assert len({candidate.layout.global_batch_size for candidate in replicated}) > 1
    assert plan.speed.tokens_per_second == max(c.speed.tokens_per_second for c in replicated)
    times = re.findall(r"([\d.]+) s/step", plan.why["sequence_parallel_size"])
    assert len(times) == 2
    assert float(times[0]) <= float(times[1])


def test_a_reason_says_if_the_alternative_would_offload_activations(ranked):
    """Its time is then no reason: such a layout is not preferred even if it is faster."""
    keys = {"max_length": 65_536, "offload_param": "cpu", "nodes": 4, "ranks": 2}
    plan = ranked(hardware=gpu_named("l4-24gb"), **keys)[0]
    assert not plan.layout.offload_activations
    assert "fastest" not in plan.why["sequence_parallel_size"]
    assert_mentions(plan.why["sequence_parallel_size"], "offload_activations")


def test_host_memory_holds_the_inputs_of_the_fewest_checkpointed_layers(ranked):
    """Checkpointing more layers than the device needs would need more host memory."""
    keys = {"max_length": 164_000, "ranks": 1, "zero_stage": 2, "mlp_tiles": 64, "lora_dropout": 0}
    layout = ranked(**keys)[0].layout
    assert layout.offload_activations
    count = layout.checkpointed_layers
    need = next(c for c in ranked(**keys)[1] if c.layout == layout).memory.host_peak_bytes
    host_bytes = int(need / 0.9) + 1
    smaller = ranked(hardware=replace(H100, host_bytes=host_bytes), **keys)[0].layout
    assert (smaller.checkpointed_layers, smaller.offload_activations) == (count, True)


def test_activations_are_not_offloaded_if_no_layer_may_be_checkpointed(ranked):
    plan, _ = ranked(offload_activations=True, gradient_checkpointing=False, max_length=512)
    assert not plan.layout.offload_activations
    rules = {rule.id: rule.message for rule in plan.rules}
    assert_mentions(rules["without-effect"], "offload_activations", "gradient_checkpointing")


@pytest.mark.parametrize(
    ("size", "nodes", "ranks", "possible"),
    [(4, 1, 6, "1, 2, 3, 6"), (16, 1, 8, "1, 2, 4, 8"), (32, 2, 8, "1, 2, 4, 8, 16"),
     (16, 3, 8, "1, 2, 4, 8, 24")],
)  # fmt: skip
def test_groups_lie_within_a_node_or_span_whole_nodes(ranked, size, nodes, ranks, possible):
    with refused(f"sequence_parallel_size: {size}", f"{ranks} ranks", possible):
        ranked(sequence_parallel_size=size, nodes=nodes, ranks=ranks)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_group_within_a_node_or_of_whole_nodes_is_planned(ranked, size):
    assert ranked(sequence_parallel_size=size, nodes=2)[0].layout.sequence_parallel_size == size


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_do(ranked):
    with refused("rule split-heads", "1, 3, 9 divide the 9 heads"):
        ranked(SMOLLM2, sequence_parallel_size=2)
    assert ranked(SMOLLM2, ranks=9, sequence_parallel_size=9)[0].layout.world_size == 9


def test_groups_divide_activations_and_logits_but_not_weights(ranked):
    keys = {"max_length": 16384, "batch_size": 1, "gradient_checkpointing": True}
    one, four = (ranked(sequence_parallel_size=size, **keys)[0] for size in (1, 4))
    one_terms, four_terms = one.memory.per_rank, four.memory.per_rank
    assert four_terms["base_weights"] == one_terms["base_weights"]
    assert four_terms["activations"] == pytest.approx(one_terms["activations"] / 4, rel=0.01)
    assert four.memory.peak_bytes < one.memory.peak_bytes


def test_an_exchange_is_priced_by_the_slowest_link_of_its_group(ranked):
    keys = {
        "max_length": 16384, "batch_size": 1, "nodes": 2, "global_batch_size": 16,
        "gradient_checkpointing": True,
    }  # fmt: skip
    seconds = {
        size: ranked(sequence_parallel_size=size, **keys)[0].speed.terms["sequence_exchange"]
        for size in (1, 2, 8, 16)
    }
    assert seconds[1] == 0
    # At the same global batch, a rank of a group of P sends (P - 1) / P of equally many values. A
    # group of 16 exchanges 2 copies of the 8 key heads, beside 32 query heads.
    assert seconds[8] / seconds[2] == pytest.approx((7 / 8) / (1 / 2), rel=0.05)
    links = H100.node_link / min(H100.node_link, H100.network)
    slower = (15 / 16) / (7 / 8) * (32 + 16) / (32 + 8) * links
    assert seconds[16] / seconds[8] == pytest.approx(slower, rel=0.1)


LONG = {"config": LLAMA_8B, "ranks": 1, "hardware": gpu(80, count=1), "global_batch_size": 1}


def test_tiles_and_offload_are_used_only_where_a_longer_sequence_needs_them(ranked):
    short, tiled, offloaded = (
        ranked(**LONG, max_length=length)[0] for length in (16_384, 131_072, 262_144)
    )
    assert (short.layout.mlp_tiles, short.layout.offload_activations) == (1, False)
    assert (tiled.layout.mlp_tiles, tiled.layout.offload_activations) == (32, False)
    assert (offloaded.layout.mlp_tiles, offloaded.layout.offload_activations) == (64, True)
    assert not {"mlp_tiles", "offload_activations"} & short.why.keys()
    assert "offload_activations False needs" in offloaded.why["offload_activations"]
    assert tiled.layout.offload_param == offloaded.layout.offload_param == "none"
    assert offloaded.memory.host_peak_bytes > 31 * 2**31 > tiled.memory.host_peak_bytes
    assert offloaded.speed.terms["tiles"] > 0
    assert offloaded.speed.terms["activation_copies"] > 0


def test_sequences_are_split_over_ranks_if_they_only_fit_with_copies_in_host_memory(ranked):
    keys = {"hardware": gpu(80), "global_batch_size": 8, "max_length": 262_144}
    plan, found = ranked(**keys)
    assert plan.layout.sequence_parallel_size == 8
    assert not plan.layout.offload_activations
    assert plan.layout.global_batch_size == 8
    assert {c.layout.sequence_parallel_size for c in found} == {1, 2, 4, 8}
    assert "sequence_parallel_size" in plan.why
    best, others = found[0], [c for c in found if c.layout.zero_stage == 2 and not c.refusal]
    on_devices = [c.speed.seconds_per_step for c in others if not c.layout.offload_activations]
    assert best.speed.seconds_per_step == min(on_devices)
    for refused_keys in ({"sequence_parallel_size": 1}, {"hardware": gpu(80, count=1), "ranks": 1}):
        assert ranked(**keys | refused_keys)[0].layout.sequence_parallel_size == 1


def test_sequences_are_not_split_if_a_rule_would_refuse_it(ranked):
    """SmolLM2 has 9 heads, and dropout in attention depends on the size."""
    keys = {"hardware": gpu(24), "global_batch_size": 8, "max_length": 1_048_576}
    for config in (SMOLLM2, SMOLLM2 | {"num_attention_heads": 8, "attention_dropout": 0.1}):
        try:
            found = ranked(config, **keys)[1]
        except DoesNotFitError as error:
            found = error.ranked
        assert {c.layout.sequence_parallel_size for c in found} == {1}


def test_offload_that_the_host_has_no_memory_for_is_refused(ranked):
    small = replace(gpu(80, count=1), host_bytes=32 * GIB)
    with refused("max_length", "does not fit"):
        ranked(**(LONG | {"hardware": small}), max_length=262_144)


def test_activations_are_not_offloaded_if_the_settings_forbid_it(ranked):
    for keys in ({"offload_activations": False}, {"gradient_checkpointing": False}):
        try:
            found = ranked(**LONG, **keys, max_length=262_144)[1]
        except DoesNotFitError as error:
            found = error.ranked
        assert not any(candidate.layout.offload_activations for candidate in found)
    _, found = ranked(SMOLLM2, CPU, ranks=2, max_length=4096)
    assert not any(candidate.layout.offload_activations for candidate in found)


def test_offload_set_to_true_checkpoints_every_layer(layout):
    chosen = layout(SMOLLM2, CPU, ranks=2, max_length=512, offload_activations=True, mlp_tiles=3)
    assert (chosen.checkpointed_layers, chosen.offload_activations, chosen.mlp_tiles) == (
        30,
        True,
        3,
    )


def test_tiles_of_an_mlp_save_memory_and_cost_time(ranked):
    whole, tiled = (
        ranked(**LONG, max_length=32_768, mlp_tiles=n, gradient_checkpointing=True)[0]
        for n in (1, 8)
    )
    assert tiled.memory.peak_bytes < whole.memory.peak_bytes
    assert tiled.speed.seconds_per_step > whole.speed.seconds_per_step
    assert "tiles" not in whole.speed.terms
