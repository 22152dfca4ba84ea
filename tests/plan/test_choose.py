"""The choice of a layout: conditions at which it changes, invariants, and stated reasons.

A layout says how a run is divided over ranks and how it saves memory: ZeRO stage, micro-batch,
checkpointed layers, offload, sequence parallelism. Candidates are the layouts that the settings
allow, best first; a candidate with a `refusal` does not fit or is excluded by a rule.
"""

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
from pipeline.plan.plan import make_plan
from pipeline.plan.render import plan_overview
from tests.messages import assert_mentions, refused
from tests.plans import CPU, LLAMA_8B, LLAMA_70B, SMOLLM2, gpu

pytestmark = pytest.mark.unit

H100 = gpu_named("h100-80gb")


def test_a_base_that_fits_is_replicated_and_one_that_does_not_is_sharded(plan_of, layout_of):
    assert layout_of().zero_stage == 2
    sharded = plan_of(LLAMA_70B)
    assert sharded.layout.zero_stage == 3
    assert "zero_stage 2 needs" in sharded.why["zero_stage"]
    assert layout_of(LLAMA_70B, load_in_4bit=True).zero_stage == 2  # about 40 GB in 4 bits


def test_the_stage_changes_at_the_memory_that_the_replicated_base_needs(plan_of):
    """The smallest GPU with a replicated base is the smallest on which that layout fits."""
    keys = {"batch_size": 1, "gradient_checkpointing": True, "max_length": 256, "ranks": 2}
    plan = plan_of(hardware=gpu(80), **keys)
    need = plan.memory.device_peak_bytes
    smallest_gib = next(gib for gib in range(10, 81) if gpu(gib).usable_bytes(2) >= need)
    assert plan_of(hardware=gpu(smallest_gib), **keys).layout.zero_stage == 2
    assert plan_of(hardware=gpu(smallest_gib - 1), **keys).layout.zero_stage == 3


def test_hpz_is_used_for_slow_links_between_nodes(layout_of):
    """With hpZ the ranks of each node together have a copy of the base, and gather it locally."""
    slow = replace(H100, network=H100.node_link / 20)
    assert layout_of(LLAMA_70B, slow, nodes=2).hpz_partition_size == 8
    assert layout_of(LLAMA_70B, slow, nodes=1).hpz_partition_size == 1
    # With 24 GiB a GPU, a copy of 70B parameters over the 8 GPUs of a node does not fit.
    small = replace(gpu_named("rtx-4090-24gb"), network=1e9)
    assert layout_of(LLAMA_70B, small, nodes=8, batch_size=1).hpz_partition_size == 1


def test_no_more_layers_are_checkpointed_than_memory_requires(plan_of):
    small_batch = plan_of(max_length=512, batch_size=1).layout
    assert small_batch.checkpointed_layers == 0
    plan = plan_of(max_length=8192, batch_size=4)
    num_checkpointed = plan.layout.checkpointed_layers
    assert 0 < num_checkpointed < 32
    with_one_less = replace(plan.layout, checkpointed_layers=num_checkpointed - 1)
    need = memory(
        plan.shape, plan.settings, with_one_less, plan.hardware, SequenceProfile(tokens=8192)
    )
    assert need.device_peak_bytes > plan.hardware.usable_bytes(8) >= plan.memory.device_peak_bytes
    reason = plan.why["checkpointed_layers"]
    assert_mentions(reason, f"{num_checkpointed} of 32", f"{num_checkpointed - 1}")


def test_the_base_is_offloaded_only_if_nothing_else_fits(layout_of):
    one_rank = {"ranks": 1, "batch_size": 1, "max_length": 512}
    large_host = replace(H100, host_bytes=512 * 2**30)
    assert layout_of(LLAMA_70B, large_host, **one_rank).offload_param == "cpu"
    with refused("load_in_4bit: true"):
        layout_of(LLAMA_70B, replace(H100, host_bytes=64 * 2**30), **one_rank)
    assert layout_of(LLAMA_70B, large_host, ranks=8).offload_param == "none"


def test_a_quantised_base_larger_than_a_device_and_the_host_is_sharded(layout_of):
    """Loading shards it at once, so neither a device nor the host needs room for the whole base."""
    small = replace(gpu_named("rtx-4090-24gb"), host_bytes=32 * 2**30)
    chosen = layout_of(LLAMA_70B, small, ranks=4, load_in_4bit=True, max_length=512)
    assert (chosen.zero_stage, chosen.offload_param) == (3, "none")


@pytest.mark.parametrize(
    ("fixed_settings", "fixed_layout_fields"),
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
def test_every_candidate_has_the_values_that_the_settings_fix(
    candidates_of, fixed_settings, fixed_layout_fields
):
    candidates_of_run = candidates_of(max_length=512, **fixed_settings)
    assert candidates_of_run
    for candidate in candidates_of_run:
        assert vars(candidate.layout).items() >= fixed_layout_fields.items()


def test_a_run_that_does_not_fit_is_refused_with_a_change_that_makes_it_fit(plan_of):
    """With the change that the message proposes, the run needs the memory that it predicts."""
    keys = {"hardware": gpu(16), "ranks": 1, "batch_size": 1, "offload_param": "none"}
    with refused("offload_param: auto"):
        plan_of(**keys, max_length=256)
    del keys["offload_param"]
    assert plan_of(**keys, max_length=256).layout.offload_param == "cpu"
    keys |= {"offload_param": "none", "zero_stage": 2}
    with pytest.raises(UserError) as error:
        plan_of(**keys)
    match = re.search(r"load_in_4bit: true it needs ([0-9.]+) of [0-9.]+ GiB$", str(error.value))
    need = plan_of(**keys, load_in_4bit=True).memory.device_peak_bytes
    rounding_error = 0.05  # GiB
    assert float(match[1]) == pytest.approx(need / GIB, abs=rounding_error)


def test_if_no_setting_makes_a_run_fit_the_message_has_the_number_of_nodes(plan_of):
    small = replace(gpu(16), host_bytes=32 * 2**30)
    keys = {"hardware": small, "ranks": 1, "load_in_4bit": True, "max_length": 256}
    with pytest.raises(UserError) as error:
        plan_of(LLAMA_70B, **keys)
    nodes = int(re.search(r"on (\d+) nodes", str(error.value))[1])
    assert plan_of(LLAMA_70B, nodes=nodes, **keys).layout.world_size == nodes


def test_the_refusal_of_a_candidate_by_a_rule_has_the_id_of_the_rule(
    plan_of, plan_and_candidates_of
):
    keys = {"load_in_4bit": True, "gradient_checkpointing": False, "max_length": 256}
    plan, candidates_of_run = plan_and_candidates_of(**keys)
    assert plan.layout.zero_stage == 2
    at_zero3 = [candidate for candidate in candidates_of_run if candidate.layout.zero_stage == 3]
    assert at_zero3
    assert all(each.refusal.endswith("[rule 4bit-zero3-unchecked]") for each in at_zero3)
    with refused("rule 4bit-zero3-unchecked"):
        plan_of(**keys, zero_stage=3)


def test_a_plan_for_128_gpus_uses_all_of_them(layout_of):
    chosen = layout_of(LLAMA_70B, nodes=16, global_batch_size=256)
    assert (chosen.world_size, chosen.global_batch_size) == (128, 256)


def test_on_a_cpu_nothing_is_offloaded_and_the_base_is_not_sharded(layout_of):
    assert layout_of(SMOLLM2, CPU, ranks=2).offload_param == "none"
    in_fp32 = layout_of(SMOLLM2, CPU, ranks=2, bf16=False, fp16=False)
    assert in_fp32.zero_stage in (1, 2)


SETTINGS = st.fixed_dictionaries(
    {
        "lora_r": st.sampled_from([8, 64]),
        "max_length": st.sampled_from([256, 2048, 8192]),
        "load_in_4bit": st.booleans(),
        "global_batch_size": st.sampled_from([64, 128]),
    }
)


@settings(deadline=None, max_examples=40)
@given(run_settings=SETTINGS, ranks=st.sampled_from([1, 2, 8]), nodes=st.sampled_from([1, 2, 4]),
       gib=st.sampled_from([24, 40, 80, 141]))  # fmt: skip
def test_the_first_candidate_is_the_fastest_of_those_with_the_same_sharding_and_offload(
    shape_of_8b, run_settings, ranks, nodes, gib
):
    """A replicated base is preferred to a sharded one, and no offload to offload, at any speed."""
    values = {"model": "m", "train_data": "t", "output_dir": "o"}
    run, hardware = RunSettings.model_validate(values | run_settings), gpu(gib)
    cluster = Cluster(hardware=hardware, nodes=nodes, ranks_per_node=ranks)
    candidates_of_run = candidates(run, shape_of_8b, cluster)
    fitting = [candidate for candidate in candidates_of_run if candidate.refusal is None]
    assert candidates_of_run[: len(fitting)] == fitting
    for candidate in candidates_of_run:
        assert candidate.layout.global_batch_size == run_settings["global_batch_size"]
        fits = candidate.memory.device_peak_bytes <= hardware.usable_bytes(ranks)
        assert fits or candidate.refusal
    if fitting:
        best = fitting[0]

        def is_comparable(layout):
            best_choice = best.layout.is_sharded, best.layout.offload_param
            return (layout.is_sharded, layout.offload_param) == best_choice

        times = [c.speed.seconds_per_step for c in fitting if is_comparable(c.layout)]
        assert best.speed.seconds_per_step == min(times)
        assert not best.layout.is_sharded or all(c.layout.is_sharded for c in fitting)
    assert len({candidate.layout for candidate in candidates_of_run}) == len(candidates_of_run)


@pytest.fixture(scope="module")
def shape_of_8b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return read_shape(str(folder))


def test_the_layout_of_the_plan_is_that_of_the_first_candidate(plan_and_candidates_of):
    plan, candidates_of_run = plan_and_candidates_of()
    made_directly = make_plan(plan.settings, plan.shape, H100, nodes=1, ranks_per_node=8)
    assert plan.layout == candidates_of_run[0].layout == made_directly.layout


def test_each_reason_has_the_setting_or_the_alternative_that_decided(plan_of):
    why = plan_of(bf16=False).why
    assert why["training_dtype"] == "bf16: false"
    why_in_fp32 = plan_of(bf16=False, fp16=False, max_length=256).why
    assert_mentions(why_in_fp32["zero_stage"], "zero_stage 2", "s/step")
    why_with_accumulation = plan_of(gradient_accumulation_steps=4).why
    assert_mentions(why_with_accumulation["micro_batch_size"], "other settings")
    why_with_hpz = plan_of(hpz_partition_size=4).why
    assert_mentions(why_with_hpz["zero_stage"], "zero_stage 2", "rule hpz-without-zero3")
    assert_mentions(plan_of().why["zero_stage"], "only adapter gradients are communicated")


@pytest.mark.parametrize(("group_size", "accumulation_steps"), [(1, 2), (2, 4), (8, 16)])
def test_ranks_of_a_sequence_parallel_group_count_once_in_the_global_batch(
    plan_of, group_size, accumulation_steps
):
    plan = plan_of(sequence_parallel_size=group_size, global_batch_size=16, batch_size=1, ranks=8)
    assert plan.layout.global_batch_size == 16
    assert plan.layout.accumulation_steps == accumulation_steps
    assert plan.layout.data_parallel_size == 8 // group_size


def test_a_global_batch_that_groups_of_ranks_cannot_divide_is_refused(plan_of):
    with refused("global_batch_size: 9", "4 groups of 2 ranks", "8 or 12"):
        plan_of(sequence_parallel_size=2, ranks=8, global_batch_size=9, batch_size=1)


@pytest.mark.parametrize(("nodes", "global_batch"), [(1, 16), (3, 24)])
def test_an_automatic_sequence_parallel_size_does_not_change_the_global_batch(
    plan_and_candidates_of, nodes, global_batch
):
    plan, candidates_of_run = plan_and_candidates_of(max_length=600_000, nodes=nodes)
    assert plan.layout.sequence_parallel_size > 1
    assert {each.layout.global_batch_size for each in candidates_of_run} == {global_batch}
    assert plan_overview(plan).count(f"{plan.layout.sequence_parallel_size} ranks") == 1


def test_layouts_with_unequal_global_batches_are_compared_by_the_time_of_a_sequence(
    plan_and_candidates_of,
):
    """With `batch_size` alone, a larger group has a smaller global batch, and so shorter steps."""
    keys = {"batch_size": 1, "gradient_checkpointing": True, "offload_param": "none"}
    plan, candidates_of_run = plan_and_candidates_of(
        max_length=131_072, hardware=gpu_named("a100-40gb"), **keys
    )
    replicated = [
        candidate
        for candidate in candidates_of_run
        if candidate.refusal is None
        and not candidate.layout.is_sharded
        and not candidate.layout.offload_activations
    ]
    assert len({candidate.layout.global_batch_size for candidate in replicated}) > 1
    assert plan.speed.tokens_per_second == max(c.speed.tokens_per_second for c in replicated)
    times = re.findall(r"([\d.]+) s/step", plan.why["sequence_parallel_size"])
    of_plan, of_alternative = map(float, times)
    assert of_plan <= of_alternative


def test_a_reason_says_if_the_alternative_would_offload_activations(plan_of):
    """The alternative is then not called slower, because it is not preferred at any speed."""
    keys = {"max_length": 65_536, "offload_param": "cpu", "nodes": 4, "ranks": 2}
    plan = plan_of(hardware=gpu_named("l4-24gb"), **keys)
    assert not plan.layout.offload_activations
    assert "fastest" not in plan.why["sequence_parallel_size"]
    assert_mentions(plan.why["sequence_parallel_size"], "offload_activations")


def test_offload_uses_no_more_host_memory_than_the_device_requires(plan_of, plan_and_candidates_of):
    """Host memory has the inputs of the checkpointed layers, so that more layers need more of it.

    The layout that is chosen with a large host is also chosen with a host of just its size.
    """
    keys = {"max_length": 164_000, "ranks": 1, "zero_stage": 2, "mlp_tiles": 64, "lora_dropout": 0}
    plan, candidates_of_run = plan_and_candidates_of(**keys)
    assert plan.layout.offload_activations
    chosen = next(each for each in candidates_of_run if each.layout == plan.layout)
    usable_share = 0.9  # of host memory
    host_bytes = int(chosen.memory.host_peak_bytes / usable_share) + 1
    on_small_host = plan_of(hardware=replace(H100, host_bytes=host_bytes), **keys).layout
    assert on_small_host.checkpointed_layers == plan.layout.checkpointed_layers
    assert on_small_host.offload_activations


def test_activations_are_not_offloaded_if_no_layer_may_be_checkpointed(plan_of):
    plan = plan_of(offload_activations=True, gradient_checkpointing=False, max_length=512)
    assert not plan.layout.offload_activations
    rules = {rule.id: rule.message for rule in plan.rules}
    assert_mentions(rules["without-effect"], "offload_activations", "gradient_checkpointing")


@pytest.mark.parametrize(
    ("size", "nodes", "ranks", "possible_sizes"),
    [(4, 1, 6, "1, 2, 3, 6"), (16, 1, 8, "1, 2, 4, 8"), (32, 2, 8, "1, 2, 4, 8, 16"),
     (16, 3, 8, "1, 2, 4, 8, 24")],
)  # fmt: skip
def test_a_sequence_parallel_group_neither_within_a_node_nor_of_whole_nodes_is_refused(
    plan_of, size, nodes, ranks, possible_sizes
):
    with refused(f"sequence_parallel_size: {size}", f"{ranks} ranks", possible_sizes):
        plan_of(sequence_parallel_size=size, nodes=nodes, ranks=ranks)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_sequence_parallel_group_within_a_node_or_of_whole_nodes_is_planned(plan_of, size):
    assert plan_of(sequence_parallel_size=size, nodes=2).layout.sequence_parallel_size == size


def test_a_group_size_that_does_not_divide_the_heads_is_refused_with_the_sizes_that_do(plan_of):
    with refused("rule split-heads", "1, 3, 9 divide the 9 heads"):
        plan_of(SMOLLM2, sequence_parallel_size=2)
    assert plan_of(SMOLLM2, ranks=9, sequence_parallel_size=9).layout.world_size == 9


def test_a_group_of_4_ranks_divides_activations_by_4_and_leaves_weights(plan_of):
    keys = {"max_length": 16384, "batch_size": 1, "gradient_checkpointing": True}
    one, four = (plan_of(sequence_parallel_size=size, **keys).memory.per_rank for size in (1, 4))
    assert four["base_weights"] == one["base_weights"]
    assert four["activations"] == pytest.approx(one["activations"] / 4, rel=0.01)
    assert sum(four.values()) < sum(one.values())


def test_the_time_of_all_to_alls_follows_the_slowest_link_of_the_group(plan_of):
    """Ranks of a sequence-parallel group exchange sequence parts for heads by all-to-alls."""
    keys = {
        "max_length": 16384, "batch_size": 1, "nodes": 2, "global_batch_size": 16,
        "gradient_checkpointing": True,
    }  # fmt: skip
    seconds = {
        size: plan_of(sequence_parallel_size=size, **keys).speed.terms["sequence_exchange"]
        for size in (1, 2, 8, 16)
    }
    assert seconds[1] == 0
    # A rank has values for 32 query heads and 8 key and value heads at each group size, and sends
    # the part (size - 1) / size of them.
    assert seconds[8] / seconds[2] == pytest.approx((7 / 8) / (1 / 2), rel=0.05)
    # A group of 16 spans two nodes, and needs 2 copies of the 8 key heads, one head for each rank.
    link_ratio = H100.node_link / min(H100.node_link, H100.network)
    expected_ratio = (15 / 16) / (7 / 8) * (32 + 2 * 8) / (32 + 8) * link_ratio
    assert seconds[16] / seconds[8] == pytest.approx(expected_ratio, rel=0.1)
