"""The memory model: the table of LoRA Basics (docs/memory.md), and invariants over all layouts.

LoRA Basics is the guide that the project follows; it states the memory of a model of 27 billion
parameters. A layout says how a run is divided over ranks and how it saves memory.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.memory import (
    base_bytes,
    checkpoint_bytes,
    disk_bytes,
    memory,
    quantisation_constants,
    trainable_parameters,
)
from pipeline.plan.given.block import Block
from pipeline.plan.given.catalogue import GPUS, cpu_of
from pipeline.plan.given.families import Linear
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import ModelShape

pytestmark = pytest.mark.unit

H100, CPU = GPUS["h100-80gb"], cpu_of(num_cores=8, memory_bytes=64 * GIB)
LINEAR_LAYERS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def model(widths, *, other_linears=(), num_layers, **fields):
    """The ModelShape of a Llama of equal blocks.

    `widths`: (input, output) width of each of LINEAR_LAYERS. `other_linears`: further linear layers
    of a block. `fields`: other fields of ModelShape and of Block.
    """
    linears = tuple(Linear(name, *width) for name, width in zip(LINEAR_LAYERS, widths, strict=True))
    block_fields = {"num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
    for name in Block.__dataclass_fields__.keys() & fields.keys():
        block_fields[name] = fields.pop(name)
    block = Block(**block_fields, linears=linears + other_linears)
    shape_fields = {"folder": "m", "model_type": "llama", "dtype": "bfloat16", "is_tied": False}
    shape_fields |= fields
    return ModelShape(**shape_fields, blocks=(block,), layer_kinds=(0,) * num_layers)


def decoder(*, hidden, inner, key_width, query_width, **fields):
    """A Llama of these widths: hidden states, MLP, all key heads, all query heads."""
    widths = [
        (hidden, query_width), (hidden, key_width), (hidden, key_width), (query_width, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    ]  # fmt: skip
    return model(widths, hidden_size=hidden, intermediate_size=inner, **fields)


# The model of LoRA Basics: 27e9 parameters, no embeddings, seven square targets, one other linear
# layer in each block.
OTHER_PARAMETERS = 27_000_000_000 // 32 - 7 * 4096**2
BASICS = model(
    [(4096, 4096)] * 7, hidden_size=4096, intermediate_size=4096, num_layers=32, vocab_size=0,
    other_linears=(Linear("mlp.other", 4096, OTHER_PARAMETERS // 4096),),
)  # fmt: skip
GEMMA2_27B = decoder(
    hidden=4608, inner=36864, key_width=2048, query_width=4096, num_layers=46, vocab_size=256000,
    num_kv_heads=16, num_norms=4, is_tied=True, model_type="gemma2", has_logit_softcap=True,
    has_score_softcap=True,
)  # fmt: skip
SMALL = decoder(
    hidden=512, inner=1408, key_width=256, query_width=512, num_layers=4, vocab_size=8192,
    num_heads=8, num_kv_heads=4, head_dim=64,
)  # fmt: skip


def run(**settings_of_run):
    targets = [name.split(".")[-1] for name in LINEAR_LAYERS]
    values = {"model": "m", "train_data": "t", "output_dir": "o", "lora_r": 64,
              "lora_target_modules": targets}  # fmt: skip
    return RunSettings.model_validate(values | settings_of_run)


def layout(**fields):
    values = {
        "zero_stage": 2, "micro_batch_size": 2, "accumulation_steps": 2, "checkpointed_layers": 0,
        "nodes": 1, "ranks_per_node": 4, "training_dtype": "bfloat16",
    }  # fmt: skip
    return Layout(**values | fields)


def need_of(shape, settings, layout, machine, tokens):
    return memory(shape, settings, layout, machine, SequenceProfile(tokens=tokens))


ZERO_3_ON_8 = layout(zero_stage=3, ranks_per_node=8)
LORA, NF4 = run(), run(load_in_4bit=True, bnb_4bit_use_double_quant=True)
INT8 = run(load_in_8bit=True)


def test_the_formulas_give_the_table_of_lora_basics():
    assert BASICS.parameters == pytest.approx(27e9, rel=1e-4)
    assert base_bytes(BASICS, LORA, "bfloat16") == pytest.approx(54e9, rel=0.05)
    assert base_bytes(BASICS, NF4, "bfloat16") == pytest.approx(14e9, rel=0.05)
    trainable = trainable_parameters(BASICS, LORA)
    assert trainable == 7 * 32 * 64 * (4096 + 4096)
    # LoRA Basics says "about 0.4 %"; 112 of 27000 million parameters are 0.43 %.
    assert trainable == pytest.approx(112e6, rel=0.05)
    assert round(100 * trainable / BASICS.parameters, 1) == 0.4
    fp32_bytes = 4 * trainable
    assert fp32_bytes == pytest.approx(500e6, rel=0.08)  # LoRA Basics: "~500MB adapters"


def test_gemma_2_27b_has_its_published_size():
    assert GEMMA2_27B.parameters == 27_227_128_320  # its model card: 27 B
    trainable = trainable_parameters(GEMMA2_27B, LORA)
    assert trainable == 456_720_384
    assert trainable / GEMMA2_27B.parameters == pytest.approx(0.0168, abs=5e-5)
    nf4 = base_bytes(GEMMA2_27B, NF4, "bfloat16")
    assert nf4 == pytest.approx(15.8e9, rel=0.003)
    embedding_bytes = 2 * 256000 * 4608  # bf16
    # 4 bits and, with double quantisation, 0.127 bits of scales for each value.
    bytes_per_value = 0.516
    quantised_bytes = GEMMA2_27B.quantised_parameters * bytes_per_value
    assert nf4 - embedding_bytes == pytest.approx(quantised_bytes, rel=0.001)


@pytest.mark.parametrize("shape", [SMALL, GEMMA2_27B], ids=["small", "gemma2"])
def test_double_quantisation_saves_only_quantisation_constants(shape):
    not_double = run(load_in_4bit=True, bnb_4bit_use_double_quant=False)
    nf4, nf4_not_double, int8, bf16 = (
        base_bytes(shape, run_settings, "bfloat16")
        for run_settings in (NF4, not_double, INT8, LORA)
    )
    assert nf4 < nf4_not_double < int8 < bf16
    constants_saved = quantisation_constants(shape, not_double) - quantisation_constants(shape, NF4)
    assert nf4_not_double - nf4 == constants_saved


# Some of these layouts are refused (rules 8bit-zero3 and 4bit-zero3-unchecked), but the arithmetic
# must hold for them too.
DROPOUT, ONLY_QUERIES = run(lora_dropout=0.1), run(lora_target_modules=["q_proj"])
RUNS = st.sampled_from([LORA, NF4, INT8, DROPOUT, ONLY_QUERIES])
LAYOUTS = st.builds(
    layout,
    zero_stage=st.sampled_from([1, 2, 3]),
    micro_batch_size=st.integers(1, 8),
    accumulation_steps=st.integers(1, 3),
    checkpointed_layers=st.integers(0, 4),
    nodes=st.integers(1, 3),
    ranks_per_node=st.integers(1, 8),
    training_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    offload_param=st.sampled_from(["none", "cpu"]),
)
MACHINES = st.sampled_from([H100, CPU])
TOKENS = st.integers(1, 4096)


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS)
def test_terms_are_positive_and_the_peak_is_their_sum(run_settings, plan_layout, machine, tokens):
    need = need_of(SMALL, run_settings, plan_layout, machine, tokens)
    assert all(size > 0 for size in need.per_rank.values())
    assert need.peak_bytes == sum(need.per_rank.values())
    assert need.device_peak_bytes >= need.load_peak_bytes >= need.loading_tensor_bytes > 0
    assert need.device_peak_bytes >= need.tensor_bytes
    assert need.host_peak_bytes >= (need.device_peak_bytes if machine.kind == "cpu" else 0)


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS, st.integers(1, 64))
def test_more_sequences_or_tokens_never_need_less_memory(
    run_settings, plan_layout, machine, tokens, increase
):
    need = need_of(SMALL, run_settings, plan_layout, machine, tokens).device_peak_bytes
    larger_batch = replace(plan_layout, micro_batch_size=plan_layout.micro_batch_size + increase)
    longer = tokens + increase
    assert need_of(SMALL, run_settings, larger_batch, machine, tokens).device_peak_bytes >= need
    assert need_of(SMALL, run_settings, plan_layout, machine, longer).device_peak_bytes >= need


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS)
def test_more_checkpointed_layers_never_need_more_memory(
    run_settings, plan_layout, machine, tokens
):
    """Checkpointing all layers may need one layer's input more than checkpointing all but one.

    At the peak, the activations of one layer are in memory in both cases: saved or recomputed. A
    checkpointed layer also saves its input.
    """
    layouts = [
        replace(plan_layout, checkpointed_layers=count) for count in range(SMALL.num_layers + 1)
    ]
    *needs, with_all = [
        need_of(SMALL, run_settings, each, machine, tokens).device_peak_bytes for each in layouts
    ]
    assert needs == sorted(needs, reverse=True)
    block_input = (
        plan_layout.micro_batch_size * tokens * SMALL.hidden_size * plan_layout.bytes_per_value
    )
    allocator_overhead, rounding = 1.03, 1
    assert with_all <= needs[-1] + allocator_overhead * block_input + rounding


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS)
def test_at_zero_3_more_ranks_never_need_more_memory_per_rank(
    run_settings, plan_layout, machine, tokens
):
    plan_layout = replace(plan_layout, zero_stage=3, nodes=1)
    needs = [
        need_of(
            SMALL, run_settings, replace(plan_layout, ranks_per_node=ranks), machine, tokens
        ).device_peak_bytes
        for ranks in (1, 2, 4, 8, 64)
    ]
    assert needs == sorted(needs, reverse=True)


@settings(deadline=None)
@given(RUNS, LAYOUTS, TOKENS)
def test_shards_of_the_ranks_add_up_to_the_whole_base(run_settings, plan_layout, tokens):
    """Every rank has all quantisation constants. With hpZ, a second copy of the base is sharded."""
    plan_layout = replace(plan_layout, zero_stage=3, offload_param="none")
    terms = need_of(SMALL, run_settings, plan_layout, H100, tokens).per_rank
    whole_base = base_bytes(SMALL, run_settings, plan_layout.training_dtype)
    constants = terms.get("quantisation_constants", 0)
    num_ranks = plan_layout.world_size
    rounding = whole_base - (num_ranks * terms["base_weights"] + constants)
    assert 0 <= rounding < num_ranks
    hpz_size = 1 + num_ranks  # more than 1 for every layout, so that there is a copy
    with_hpz = replace(plan_layout, hpz_partition_size=hpz_size)
    terms_with_hpz = need_of(SMALL, run_settings, with_hpz, H100, tokens).per_rank
    assert terms_with_hpz["hpz_copy"] == (whole_base - constants) // hpz_size


@settings(deadline=None)
@given(LAYOUTS, TOKENS)
def test_at_zero_3_the_base_is_never_whole_on_a_device_or_a_host(plan_layout, tokens):
    plan_layout = replace(
        plan_layout, zero_stage=3, nodes=2, ranks_per_node=8, training_dtype="bfloat16",
        hpz_partition_size=1, offload_param="none", offload_activations=False,
    )  # fmt: skip
    bytes_of_processes = 8 * 4 * GIB  # 8 ranks on a node, 4 GiB for the libraries of each process
    for run_settings in (LORA, NF4):
        need = need_of(GEMMA2_27B, run_settings, plan_layout, H100, tokens)
        whole_base = base_bytes(GEMMA2_27B, run_settings, "bfloat16")
        adapter_and_states = 16 * trainable_parameters(GEMMA2_27B, run_settings)
        assert need.loading_tensor_bytes < whole_base
        assert need.host_peak_bytes == bytes_of_processes + adapter_and_states


def test_on_one_rank_zero_3_gathers_views_of_the_shards_unless_they_are_in_host_memory():
    """tests.bench.memory measures it: `zero3 1 rank`."""

    def gathered_bytes(**fields):
        terms = need_of(SMALL, LORA, layout(zero_stage=3, **fields), H100, 128).per_rank
        return terms.get("gathered_layers", 0)

    assert gathered_bytes(ranks_per_node=1) == 0
    assert gathered_bytes(ranks_per_node=2) > 0
    assert gathered_bytes(ranks_per_node=1, offload_param="cpu") > 0


EMBEDDINGS_OF_BLOCKS = 50_000_000  # values; the embeddings of SMALL have 4 million


def test_zero_3_gathers_a_parameter_outside_blocks_that_is_larger_than_the_embeddings():
    """Gemma 3n has embeddings for each block. ZeRO-3 loads and gathers a parameter as a whole."""
    outside = {"other_parameters": EMBEDDINGS_OF_BLOCKS}
    many_small, one_large = (
        need_of(replace(SMALL, **outside, largest_other=size), LORA, ZERO_3_ON_8, H100, 128)
        for size in (1, EMBEDDINGS_OF_BLOCKS)
    )
    values_of_embeddings = SMALL.vocab_size * SMALL.hidden_size
    more = 2 * (EMBEDDINGS_OF_BLOCKS - values_of_embeddings)  # bf16
    loading = one_large.loading_tensor_bytes - many_small.loading_tensor_bytes
    assert loading == more
    assert one_large.per_rank["gathered_layers"] >= 2 * EMBEDDINGS_OF_BLOCKS
    assert one_large.worst_moment == "the embeddings"


def test_host_memory_has_room_for_shards_that_pytorch_rounds_up_to_powers_of_two():
    """A rank's shard of an MLP's matrix of Gemma 2 27B has 40.5 MiB; 64 MiB are pinned."""
    plan_layout = layout(zero_stage=3, ranks_per_node=8)
    offloaded = replace(plan_layout, offload_param="cpu")
    on_device, on_host = (
        need_of(GEMMA2_27B, LORA, each, H100, 512).host_peak_bytes
        for each in (plan_layout, offloaded)
    )
    pinned = on_host - on_device
    assert pinned >= 8 * 46 * 3 * 64 * 2**20
    assert 1.4 < pinned / base_bytes(GEMMA2_27B, LORA, "bfloat16") < 2


def test_a_larger_adapter_needs_more_memory():
    peaks = [need_of(SMALL, run(lora_r=r), layout(), H100, 512).peak_bytes for r in (4, 16, 64)]
    assert peaks == sorted(set(peaks))


def test_disk_space_has_room_for_kept_new_and_best_checkpoints():
    """The plan has space for save_total_limit checkpoints and for one that is being written.

    With held-out data there is also space for the checkpoint of the best evaluation.
    """
    held_out = {"eval_data": "h", "save_total_limit": 3}

    def num_checkpoints(**settings_of_run) -> float:
        size = checkpoint_bytes(trainable_parameters(SMALL, run()))
        return disk_bytes(SMALL, run(**settings_of_run))["checkpoints"] / size

    assert num_checkpoints(save_total_limit=3) == 3 + 1
    assert num_checkpoints(**held_out) == 3 + 1 + 1
    assert num_checkpoints(**held_out, evaluation_strategy="no") == 3 + 1
    # Without the two Adam moments, the best adapter is a third of a checkpoint. There are two of
    # it: the kept one and one that is being written.
    assert num_checkpoints(**held_out, keep_best=True) == pytest.approx(3 + 1 + 1 + 2 / 3)


def test_nccl_buffers_for_all_to_alls_grow_with_the_group_and_with_the_speed_of_the_link():
    """A group of 8 H100s had 3.28 GB of buffers (github.com/NVIDIA/nccl/issues/1685)."""
    gpu_with_slow_link = GPUS["l40s-48gb"]

    def buffer_bytes(group_size, machine, nodes=1):
        plan_layout = layout(ranks_per_node=8, nodes=nodes, sequence_parallel_size=group_size)
        need = need_of(SMALL, LORA, plan_layout, machine, 64)
        return need.per_rank.get("exchange_buffers", 0)

    assert buffer_bytes(1, H100) == 0
    on_8 = buffer_bytes(8, H100)
    assert on_8 == pytest.approx(3.28e9, rel=0.01)
    assert buffer_bytes(8, gpu_with_slow_link) < buffer_bytes(2, H100) < buffer_bytes(4, H100)
    assert on_8 < buffer_bytes(16, H100, nodes=2) < 2 * on_8
