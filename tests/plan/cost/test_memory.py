"""The memory model: the table of LoRA Basics (docs/memory.md), and invariants over all layouts."""

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

GB = 10**9
H100, CPU = GPUS["h100-80gb"], cpu_of(8, 64 * GIB)
SEVEN = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def model(widths, **keys):
    """A Llama whose seven linear layers have these (d_in, d_out); `linears` adds others."""
    linears = tuple(Linear(name, *width) for name, width in zip(SEVEN, widths, strict=True))
    block = {"num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
    block |= {key: keys.pop(key) for key in Block.__dataclass_fields__.keys() & keys.keys()}
    block["linears"] = linears + block.pop("linears", ())
    values = {"folder": "m", "model_type": "llama", "dtype": "bfloat16", "is_tied": False}
    kinds = (0,) * keys.pop("num_layers")
    return ModelShape(**values | keys, blocks=(Block(**block),), layer_kinds=kinds)


def decoder(hidden, inner, keys, layers, vocab, **rest):
    queries = rest.pop("queries", hidden)
    widths = [
        (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    ]  # fmt: skip
    size = {"hidden_size": hidden, "intermediate_size": inner}
    return model(widths, num_layers=layers, vocab_size=vocab, **size | rest)


# The model of LoRA Basics: 27e9 parameters, no embeddings, seven square targets, one other linear
# layer in each block.
REST = 27 * GB // 32 - 7 * 4096**2
BASICS = model(
    [(4096, 4096)] * 7, hidden_size=4096, intermediate_size=4096, num_layers=32, vocab_size=0,
    linears=(Linear("mlp.rest", 4096, REST // 4096),),
)  # fmt: skip
GEMMA2_27B = decoder(
    4608, 36864, 2048, 46, 256000, queries=4096, num_kv_heads=16, num_norms=4, is_tied=True,
    model_type="gemma2", logit_softcap=True, score_softcap=True,
)  # fmt: skip
SMALL = decoder(512, 1408, 256, 4, 8192, num_heads=8, num_kv_heads=4, head_dim=64)


def run(**keys):
    targets = [name.split(".")[-1] for name in SEVEN]
    values = {"model": "m", "train_data": "t", "output_dir": "o", "lora_r": 64,
              "lora_target_modules": targets}  # fmt: skip
    return RunSettings.model_validate(values | keys)


def layout(**keys):
    values = {
        "zero_stage": 2, "micro_batch_size": 2, "accumulation_steps": 2, "checkpointed_layers": 0,
        "nodes": 1, "ranks_per_node": 4, "training_dtype": "bfloat16",
    }  # fmt: skip
    return Layout(**values | keys)


def need_of(shape, settings, layout, machine, tokens):
    return memory(shape, settings, layout, machine, SequenceProfile(tokens=tokens))


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
    assert 4 * trainable == pytest.approx(500e6, rel=0.08)  # "~500MB adapters": fp32


def test_gemma_2_27b_has_its_published_size():
    assert GEMMA2_27B.parameters == 27_227_128_320  # its model card: 27 B
    trainable = trainable_parameters(GEMMA2_27B, LORA)
    assert trainable == 456_720_384
    assert trainable / GEMMA2_27B.parameters == pytest.approx(0.0168, abs=5e-5)
    nf4 = base_bytes(GEMMA2_27B, NF4, "bfloat16")
    assert nf4 == pytest.approx(15.8e9, rel=0.003)
    embeddings = 2 * 256000 * 4608
    quantised = nf4 - embeddings
    assert quantised == pytest.approx(GEMMA2_27B.quantised_parameters * 0.516, rel=0.001)


def test_double_quantisation_saves_only_constants():
    single = run(load_in_4bit=True, bnb_4bit_use_double_quant=False)
    for shape in (SMALL, GEMMA2_27B):
        sizes = [base_bytes(shape, keys, "bfloat16") for keys in (NF4, single, INT8, LORA)]
        assert sizes == sorted(set(sizes))
        saved = quantisation_constants(shape, single) - quantisation_constants(shape, NF4)
        assert sizes[1] - sizes[0] == saved


# Some of these layouts are refused (rules 8bit-zero3 and 4bit-zero3-unchecked), but the arithmetic
# must hold for them too.
DROPOUT, QUERIES = run(lora_dropout=0.1), run(lora_target_modules=["q_proj"])
RUNS = st.sampled_from([LORA, NF4, INT8, DROPOUT, QUERIES])
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
def test_terms_are_counts_and_the_peak_is_their_sum(run_settings, plan_layout, machine, tokens):
    need = need_of(SMALL, run_settings, plan_layout, machine, tokens)
    assert all(size > 0 for size in need.per_rank.values())
    assert need.peak_bytes == sum(need.per_rank.values())
    assert need.device_need >= need.load_peak_bytes >= need.loading_tensors > 0
    assert need.device_need >= need.tensor_bytes
    assert need.host_peak_bytes >= (need.device_need if machine.kind == "cpu" else 0)


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS, st.integers(1, 64))
def test_more_sequences_or_tokens_never_need_less_memory(
    run_settings, plan_layout, machine, tokens, more
):
    need = need_of(SMALL, run_settings, plan_layout, machine, tokens).device_need
    wider = replace(plan_layout, micro_batch_size=plan_layout.micro_batch_size + more)
    assert need_of(SMALL, run_settings, wider, machine, tokens).device_need >= need
    assert need_of(SMALL, run_settings, plan_layout, machine, tokens + more).device_need >= need


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS)
def test_more_checkpointed_layers_never_need_more_memory(
    run_settings, plan_layout, machine, tokens
):
    """The last layer is an exception: its input is saved besides its recomputed activations."""
    needs = [
        need_of(
            SMALL, run_settings, replace(plan_layout, checkpointed_layers=k), machine, tokens
        ).device_need
        for k in range(SMALL.num_layers + 1)
    ]
    assert needs[:-1] == sorted(needs[:-1], reverse=True)
    block_input = (
        plan_layout.micro_batch_size * tokens * SMALL.hidden_size * plan_layout.bytes_per_value
    )
    assert needs[-1] <= needs[-2] + 1.03 * block_input + 1  # plus 3 % for the allocator


@settings(deadline=None)
@given(RUNS, LAYOUTS, MACHINES, TOKENS)
def test_at_zero_3_more_ranks_never_need_more_memory_per_rank(
    run_settings, plan_layout, machine, tokens
):
    plan_layout = replace(plan_layout, zero_stage=3, nodes=1)
    needs = [
        need_of(
            SMALL, run_settings, replace(plan_layout, ranks_per_node=ranks), machine, tokens
        ).device_need
        for ranks in (1, 2, 4, 8, 64)
    ]
    assert needs == sorted(needs, reverse=True)


@settings(deadline=None)
@given(RUNS, LAYOUTS, TOKENS)
def test_shards_of_the_ranks_add_up_to_the_whole_base(run_settings, plan_layout, tokens):
    plan_layout = replace(plan_layout, zero_stage=3, offload_param="none")
    terms = need_of(SMALL, run_settings, plan_layout, H100, tokens).per_rank
    whole = base_bytes(SMALL, run_settings, plan_layout.training_dtype)
    world, constants = plan_layout.world_size, terms.get("quantisation_constants", 0)
    assert 0 <= whole - (world * terms["base_weights"] + constants) < world
    copied = need_of(
        SMALL, run_settings, replace(plan_layout, hpz_partition_size=1 + world), H100, tokens
    )
    assert copied.per_rank["hpz_copy"] == (whole - constants) // (1 + world)


@settings(deadline=None)
@given(LAYOUTS, TOKENS)
def test_at_zero_3_the_base_is_never_whole_on_a_device_or_a_host(plan_layout, tokens):
    plan_layout = replace(
        plan_layout, zero_stage=3, nodes=2, ranks_per_node=8, training_dtype="bfloat16",
        hpz_partition_size=1, offload_param="none", offload_activations=False,
    )  # fmt: skip
    for run_settings in (LORA, NF4):
        need = need_of(GEMMA2_27B, run_settings, plan_layout, H100, tokens)
        whole = base_bytes(GEMMA2_27B, run_settings, "bfloat16")
        adapter_and_states = 16 * trainable_parameters(GEMMA2_27B, run_settings)
        assert need.loading_tensors < whole
        assert need.host_peak_bytes == 8 * 4 * GIB + adapter_and_states


def test_a_larger_adapter_needs_more_memory():
    needs = [need_of(SMALL, run(lora_r=r), layout(), H100, 512).peak_bytes for r in (4, 16, 64)]
    assert needs == sorted(set(needs))


def test_disk_space_has_room_for_kept_new_and_best_checkpoints():
    """Space for save_total_limit checkpoints and a new one; with held-out data for the best too."""
    held_out = {"eval_data": "h", "save_total_limit": 3}

    def checkpoints(**keys) -> float:
        size = checkpoint_bytes(trainable_parameters(SMALL, run()))
        return disk_bytes(SMALL, run(**keys))["checkpoints"] / size

    assert checkpoints(save_total_limit=3) == 3 + 1
    assert checkpoints(**held_out) == 3 + 2
    assert checkpoints(**held_out, evaluation_strategy="no") == 3 + 1
    # Weights of the best adapter, kept and being written: a third of a checkpoint each.
    assert checkpoints(**held_out, keep_best=True) == pytest.approx(3 + 2 + 2 / 3)


def test_buffers_of_all_to_alls_grow_with_the_group_and_with_the_link():
    """8 H100s had 3.28 GB of them (github.com/NVIDIA/nccl/issues/1685)."""
    slow = GPUS["l40s-48gb"]

    def buffers(size, machine, nodes=1):
        plan_layout = layout(ranks_per_node=8, nodes=nodes, sequence_parallel_size=size)
        need = need_of(SMALL, LORA, plan_layout, machine, 64)
        return need.per_rank.get("exchange_buffers", 0)

    assert buffers(1, H100) == 0
    assert buffers(8, H100) == pytest.approx(3.28e9, rel=0.01)
    assert buffers(8, slow) < buffers(2, H100) < buffers(4, H100)
    assert buffers(8, H100) < buffers(16, H100, nodes=2) < 2 * buffers(8, H100)
