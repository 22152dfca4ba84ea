"""The speed model: hand-counted FLOPs, which of two settings is faster, and invariants.

The model assumes that arithmetic and links reach 0.7 of their nominal rates, and memory 0.8.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.memory import base_bytes, memory, trainable_parameters
from pipeline.plan.cost.per_token import cost_per_token
from pipeline.plan.cost.speed import step_seconds
from pipeline.plan.given.block import Block
from pipeline.plan.given.catalogue import GPUS, cpu_of
from pipeline.plan.given.families import Experts, Linear
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import ModelShape
from tests import ROOT
from tests.plans import with_blocks

pytestmark = pytest.mark.unit

H100 = GPUS["h100-80gb"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = ("flops", "memory_bandwidth", "node_link", "network", "host_link")


def llama(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128256):
    queries, keys = heads * head_dim, kv_heads * head_dim
    linears = (
        Linear("self_attn.q_proj", hidden, queries), Linear("self_attn.k_proj", hidden, keys),
        Linear("self_attn.v_proj", hidden, keys), Linear("self_attn.o_proj", queries, hidden),
        Linear("mlp.gate_proj", hidden, inner), Linear("mlp.up_proj", hidden, inner),
        Linear("mlp.down_proj", inner, hidden),
    )  # fmt: skip
    block = Block(
        linears=linears, hidden_size=hidden, intermediate_size=inner, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    return ModelShape(
        folder="m", model_type="llama", dtype="bfloat16", vocab_size=vocab, is_tied=False,
        blocks=(block,), layer_kinds=(0,) * layers,
    )  # fmt: skip


LLAMA_8B = llama()
LLAMA_70B = llama(hidden=8192, inner=28672, layers=80, heads=64)
SMOLLM2 = replace(llama(576, 1536, 30, 9, 3, 64, 49152), is_tied=True)


def run(**keys):
    values = {"model": "m", "train_data": "t", "output_dir": "o", "lora_r": 16, "max_length": 2048,
              "lora_target_modules": SEVEN}  # fmt: skip
    return RunSettings.model_validate(values | keys)


def layout(**keys):
    values = {
        "zero_stage": 2, "micro_batch_size": 1, "accumulation_steps": 1, "checkpointed_layers": 0,
        "nodes": 1, "ranks_per_node": 8, "training_dtype": "bfloat16",
    }  # fmt: skip
    return Layout(**values | keys)


LORA, QLORA, INT8 = run(), run(load_in_4bit=True), run(load_in_8bit=True)


def speed(shape=LLAMA_8B, run_settings=LORA, hardware=H100, tokens=1024.0, **rest):
    return step_seconds(
        shape, run_settings, layout(**rest), hardware, SequenceProfile(tokens=tokens)
    )


def test_arithmetic_is_that_counted_by_hand():
    """4 FLOPs per frozen weight and token, 6 per adapter weight.

    The backward pass of attention has 2.5 times the FLOPs of its forward pass.
    """
    # n: weights of the linear layers; p: weights of the adapter
    n = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    p = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert (n, p) == (LLAMA_8B.linear_parameters, trainable_parameters(LLAMA_8B, LORA))
    counted = 1024 * (4 * n + 6 * p + 3.5 * 2 * 1024 * 4096 * 32)
    ideal = replace(H100, flops=1e12 / 0.7)
    assert speed(hardware=ideal).terms["arithmetic"] == pytest.approx(counted / 1e12)


def test_a_frozen_base_costs_4_flops_per_parameter_and_token_and_6_if_recomputed():
    run_settings = run(lora_r=1, lora_target_modules=["q_proj"])
    times = [
        speed(run_settings=run_settings, tokens=8.0, checkpointed_layers=k).terms["arithmetic"]
        for k in (0, 16, 32)
    ]
    n = LLAMA_8B.linear_parameters
    assert times[0] == pytest.approx(4 * n * 8 / (0.7 * H100.flops), rel=1e-3)
    assert times[1] / times[0] == pytest.approx(5 / 4, rel=1e-3)
    assert times[2] / times[0] == pytest.approx(6 / 4, rel=1e-3)


def test_scores_of_later_tokens_are_computed_only_with_soft_caps_and_without_flash_attention():
    """A fused kernel skips the scores of later tokens: half of all."""
    capped = replace(LLAMA_8B, score_softcap=True)
    for shape, flag, has_all_scores in (
        (LLAMA_8B, "auto", False),
        (LLAMA_8B, True, False),
        (capped, "auto", True),
        (capped, True, False),
    ):
        work = cost_per_token(shape, run(use_flash_attention=flag), "bfloat16")
        assert work.score_flops == (4 if has_all_scores else 2) * 4096 * 32
        assert (work.score_values > 0) == has_all_scores


def test_a_micro_batch_reads_only_the_experts_of_its_tokens():
    tensors = {n: Experts(count=n, per_token=8, size=768).tensors(4096) for n in (8, 128)}
    mixture = with_blocks(LLAMA_8B, experts=tensors[128], experts_per_token=8)
    few, some, many, more = (
        speed(mixture, tokens=tokens).terms["memory_traffic"]
        - speed(with_blocks(mixture, experts=tensors[8]), tokens=tokens).terms["memory_traffic"]
        for tokens in (1.0, 8.0, 16.0, 1024.0)
    )
    # The other 120 experts of 32 blocks, with three bf16 matrices each, are read twice.
    num_values = 120 * 32 * 3 * 4096 * 768
    all_experts = 2 * 2 * num_values / (0.8 * H100.memory_bandwidth)
    assert few == pytest.approx(0, abs=1e-9)  # eight experts either way
    assert 0 < some < many
    assert many == pytest.approx(all_experts) == pytest.approx(more)


def test_adapter_traffic_at_zero_2_does_not_depend_on_the_base():
    """Two models with the same adapters; one has more than eight times the weights."""
    wide = with_blocks(
        LLAMA_8B,
        linears=(*LLAMA_8B.blocks[0].linears, Linear("self_attn.extra", 4096, 400_000)),
    )
    assert wide.linear_parameters > 8 * LLAMA_8B.linear_parameters
    for term in ("gradient_reduction", "adapter_gather", "base_gathers", "optimizer"):
        assert speed(wide).terms[term] == speed().terms[term]
    assert speed().terms["base_gathers"] == 0
    assert (
        speed(wide, zero_stage=3).terms["base_gathers"] > speed(zero_stage=3).terms["base_gathers"]
    )


def test_without_fast_paths_zero_2_reduces_every_micro_batch():
    plain = LORA.model_copy(update={"fast_paths": False})
    once, often = (
        speed(run_settings=run_settings, zero_stage=2, accumulation_steps=8).terms[
            "gradient_reduction"
        ]
        for run_settings in (LORA, plain)
    )
    assert often == pytest.approx(8 * once)
    p = trainable_parameters(LLAMA_8B, LORA)
    # An all-reduce of fp32 gradients over 8 ranks is a reduce-scatter and an all-gather.
    transfer = 2 * 7 / 8 * 4 * p / (0.7 * H100.node_link)
    latency = 2 * 7 * 5e-6  # seven hops each
    assert once == pytest.approx(transfer + latency)


@pytest.mark.parametrize("run_settings", [LORA, QLORA])
@pytest.mark.parametrize("gpu", GPUS)
def test_a_higher_zero_stage_is_never_faster_and_zero_3_is_slower_than_zero_2(gpu, run_settings):
    times = [
        speed(
            run_settings=run_settings, hardware=GPUS[gpu], zero_stage=stage, accumulation_steps=4
        ).seconds_per_step
        for stage in (1, 2, 3)
    ]
    assert times == sorted(times)
    assert times[2] > times[1]


def test_hpz_gathers_within_the_node():
    slow = replace(H100, network=3e9)
    values = {"shape": LLAMA_70B, "hardware": slow, "zero_stage": 3}
    one_node = speed(**values)
    assert speed(**values, hpz_partition_size=8) == one_node
    plain, hpz = (speed(**values, nodes=2, hpz_partition_size=size) for size in (1, 8))
    assert hpz.seconds_per_step < plain.seconds_per_step / 10
    differs = {term for term in hpz.terms if hpz.terms[term] != one_node.terms[term]}
    assert differs == {"gradient_reduction", "adapter_gather", "optimizer"}


def test_4_bits_gather_a_quarter_of_the_linear_weights():
    not_quantised = 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)  # embeddings, head, norms
    whole, packed = (
        cost_per_token(LLAMA_8B, run_settings, "bfloat16").stored_bytes - not_quantised
        for run_settings in (LORA, QLORA)
    )
    assert packed == whole / 4
    assert whole + not_quantised == base_bytes(LLAMA_8B, LORA, "bfloat16")
    slow = replace(H100, network=1e8)  # nothing hides the gathers
    times = [
        speed(LLAMA_8B, run_settings, slow, 1.0, zero_stage=3, nodes=16).terms["base_gathers"]
        for run_settings in (LORA, QLORA)
    ]
    assert times[1] / times[0] == pytest.approx(
        (packed + not_quantised) / (whole + not_quantised), rel=0.01
    )


def test_quantised_weights_are_slower_than_16_bit_weights():
    for micro in (1, 8):
        whole, packed, int8 = (
            speed(run_settings=run_settings, micro_batch_size=micro)
            for run_settings in (LORA, QLORA, INT8)
        )
        assert whole.seconds_per_step < packed.seconds_per_step
        assert whole.seconds_per_step < int8.seconds_per_step
        assert whole.terms["arithmetic"] == packed.terms["arithmetic"]
    n = LLAMA_8B.linear_parameters
    # In two passes the 4-bit weights are read and the 16-bit weights are written.
    in_two_passes = 2 * (n / 2 + 2 * n) / (0.8 * H100.memory_bandwidth)
    assert packed.terms["dequantisation"] == pytest.approx(in_two_passes)


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize("run_settings", [LORA, QLORA])
@pytest.mark.parametrize("hardware", [*GPUS.values(), cpu_of(16, 2**36)], ids=lambda h: h.name)
def test_a_larger_micro_batch_is_never_slower_except_for_recomputed_logits(
    shape, run_settings, hardware
):
    """Logits that need more than one chunk are computed again in the backward pass."""
    for stage in (2, 3):
        times = [
            speed(
                shape, run_settings, hardware, 128.0, zero_stage=stage, micro_batch_size=2**i,
                accumulation_steps=2 ** (4 - i),
            )
            for i in range(5)
        ]  # fmt: skip
        without_logits = [time.seconds_per_step - time.terms["logits"] for time in times]
        assert without_logits == sorted(without_logits, reverse=True)
        assert times[-1].terms["logits"] <= 2 * times[0].terms["logits"]


def test_offloaded_shards_cross_the_host_link_twice_a_micro_batch():
    slow = replace(H100, host_link=1e8)
    resident, offloaded = (
        speed(LLAMA_70B, hardware=slow, zero_stage=3, offload_param=where).terms["base_gathers"]
        for where in ("none", "cpu")
    )
    assert offloaded - resident == pytest.approx(
        2 * cost_per_token(LLAMA_70B, LORA, "bfloat16").stored_bytes / 8 / 0.7e8, rel=0.05
    )


def test_computation_hides_nine_tenths_of_the_gathers():
    short, long = (speed(LLAMA_70B, zero_stage=3, tokens=t).terms for t in (1, 8192))
    computing = sum(short[term] for term in ("arithmetic", "logits", "memory_traffic"))
    assert short["base_gathers"] > long["base_gathers"]
    gathers = short["base_gathers"] + computing  # without overlap
    assert long["base_gathers"] == pytest.approx(gathers / 10)


def test_fewer_supervised_tokens_make_logits_cheaper():
    of_all_tokens = speed().terms["logits"]
    half = step_seconds(
        LLAMA_8B, LORA, layout(), H100, SequenceProfile(tokens=1024, supervised_share=0.5)
    ).terms["logits"]
    assert of_all_tokens / 3 < half < of_all_tokens * 0.7


layouts = st.builds(
    Layout,
    zero_stage=st.sampled_from([1, 2, 3]),
    micro_batch_size=st.integers(1, 16),
    accumulation_steps=st.integers(1, 16),
    checkpointed_layers=st.integers(0, 30),
    nodes=st.integers(1, 16),
    ranks_per_node=st.sampled_from([1, 2, 8]),
    training_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    hpz_partition_size=st.sampled_from([1, 2, 8]),
    offload_param=st.sampled_from(["none", "cpu"]),
)
machines = st.sampled_from([*GPUS.values(), cpu_of(2, 2**34)])


@given(
    where=layouts,
    machine=machines,
    run_settings=st.sampled_from([LORA, QLORA, INT8]),
    tokens=st.floats(1, 4096),
    rate=st.sampled_from(RATES),
    factor=st.floats(1, 100),
)
@settings(max_examples=300, deadline=None)
def test_terms_add_up_and_faster_hardware_never_makes_a_step_slower(
    where, machine, run_settings, tokens, rate, factor
):
    result = step_seconds(SMOLLM2, run_settings, where, machine, SequenceProfile(tokens=tokens))
    assert all(seconds >= 0 for seconds in result.terms.values())
    assert result.seconds_per_step == sum(result.terms.values())
    assert result.tokens_per_second * result.seconds_per_step == pytest.approx(
        where.global_batch_size * tokens
    )
    assert [seconds for _, seconds in result.three_largest()] == sorted(result.terms.values())[
        :-4:-1
    ]
    faster = replace(machine, **{rate: getattr(machine, rate) * factor})
    after = step_seconds(SMOLLM2, run_settings, where, faster, SequenceProfile(tokens=tokens))
    assert after.seconds_per_step <= result.seconds_per_step * (1 + 1e-9)


def test_the_cache_distinguishes_settings():
    first = speed(run_settings=run(lora_r=8)).terms["adapter_gather"]
    for _ in range(40):  # new objects may have addresses of earlier ones
        assert speed(run_settings=run(lora_r=16)).terms["adapter_gather"] > first
        assert speed(run_settings=run(lora_r=8)).terms["adapter_gather"] == first


def test_the_predicted_speed_of_the_quickstart_is_near_the_measured_one():
    """On two cores, with 74 tokens a row, docs/benchmarks.md has 267 tokens/s for micro-batches of
    4, and 140 to 220 for micro-batches of 1. The rates of the catalogue's CPU are fitted to both.
    """
    run_settings = run(
        lora_target_modules="all-linear", lora_dropout=0.0, max_length=512, fast_paths=False
    )
    for micro, low, high in ((4, 240, 294), (1, 140, 220)):
        where = layout(micro_batch_size=micro, ranks_per_node=2)
        result = step_seconds(
            SMOLLM2, run_settings, where, cpu_of(2, 2**34),
            SequenceProfile(tokens=73.75, supervised_share=0.44),
        )  # fmt: skip
        assert low < result.tokens_per_second < high


def test_the_example_of_the_docs_has_the_predicted_numbers():
    run_settings = run(lora_dropout=0.05)
    result = speed(
        run_settings=run_settings, tokens=2048.0, micro_batch_size=4, checkpointed_layers=32
    )
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for term, seconds in result.terms.items():
        assert (f"| `{term}` | {seconds:.4f} |" in text) == (seconds > 0), term
    assert f"{result.tokens_per_second:,.0f} tokens/s".replace(",", " ") in text


def test_a_deepspeed_json_at_zero3_is_predicted_without_joint_lora():
    """Joint LoRA: layers with the same input share one product with their A matrices."""
    sharded, sequences = layout(zero_stage=3), SequenceProfile(tokens=2048)

    def predicted(run_settings):
        arguments = LLAMA_8B, run_settings, sharded, H100, sequences
        return memory(*arguments).per_rank, step_seconds(*arguments).terms

    without = predicted(run(fast_paths=False))
    assert predicted(run(deepspeed_json="own.json")) == without
    assert all(ours != others for ours, others in zip(predicted(run()), without, strict=True))
