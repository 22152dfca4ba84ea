"""The speed model: hand-counted FLOPs, which of two settings is faster, and invariants.

The model assumes that arithmetic and links reach 0.7 of their nominal rates, and memory 0.8. The
time of a step is a sum of named terms, in seconds. A layout says how a run is divided over ranks.
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

H100, TWO_CORES = GPUS["h100-80gb"], cpu_of(num_cores=2, memory_bytes=16 * 2**30)
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = ("flops", "memory_bandwidth", "node_link", "network", "host_link")


def llama(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128256):
    """The ModelShape of a Llama; the defaults are those of Llama 3.1 8B."""
    query_width, key_width = heads * head_dim, kv_heads * head_dim
    linears = (
        Linear("self_attn.q_proj", hidden, query_width),
        Linear("self_attn.k_proj", hidden, key_width),
        Linear("self_attn.v_proj", hidden, key_width),
        Linear("self_attn.o_proj", query_width, hidden),
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
CAPPED = replace(LLAMA_8B, has_score_softcap=True)
LLAMA_70B = llama(hidden=8192, inner=28672, layers=80, heads=64)
SMOLLM2 = replace(
    llama(hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152),
    is_tied=True,
)


def run(**settings_of_run):
    values = {"model": "m", "train_data": "t", "output_dir": "o", "lora_r": 16, "max_length": 2048,
              "lora_target_modules": LINEAR_LAYERS}  # fmt: skip
    return RunSettings.model_validate(values | settings_of_run)


def layout(**fields):
    values = {
        "zero_stage": 2, "micro_batch_size": 1, "accumulation_steps": 1, "checkpointed_layers": 0,
        "nodes": 1, "ranks_per_node": 8, "training_dtype": "bfloat16",
    }  # fmt: skip
    return Layout(**values | fields)


LORA, QLORA, INT8 = run(), run(load_in_4bit=True), run(load_in_8bit=True)


def speed(shape=LLAMA_8B, run_settings=LORA, hardware=H100, tokens=1024.0, **layout_fields):
    """The predicted Speed of a step; default: LoRA on Llama 8B, ZeRO-2, 8 GPUs."""
    return step_seconds(
        shape, run_settings, layout(**layout_fields), hardware, SequenceProfile(tokens=tokens)
    )


def test_the_time_of_arithmetic_follows_from_flops_counted_by_hand():
    """4 FLOPs per frozen weight and token, 6 per adapter weight."""
    num_weights = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    num_trainable = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert num_weights == LLAMA_8B.linear_parameters
    assert num_trainable == trainable_parameters(LLAMA_8B, LORA)
    tokens = 1024
    flops = tokens * (4 * num_weights + 6 * num_trainable)
    one_teraflop = replace(H100, flops=1e12 / 0.7)
    predicted = speed(hardware=one_teraflop, tokens=tokens).terms["arithmetic"]
    assert predicted == pytest.approx(flops / 1e12)


@pytest.mark.parametrize(
    ("hardware", "share"), [(GPUS["a100-80gb"], 0.6), (H100, 0.35), (TWO_CORES, 0.64 / 8)]
)
def test_the_softmax_of_attention_takes_time(hardware, share):
    """Heads of width 128 reach this fraction of the nominal rate of products.

    The backward pass recomputes the scores. The eight ranks of a node share its CPU.
    """
    tokens = 1024
    forward_flops = 2 * tokens * 4096 * 32  # of a token: causal, 32 layers
    for checkpointed_layers, passes in ((0, 3.5), (32, 4.5)):
        terms = speed(
            hardware=hardware, tokens=tokens, checkpointed_layers=checkpointed_layers
        ).terms
        expected = tokens * passes * forward_flops / (share * hardware.flops)
        assert terms["attention"] == pytest.approx(expected, rel=0.01)


def test_narrow_heads_take_more_time_for_the_same_flops():
    """They have more scores. Measured on a CPU: docs/speed.md."""
    wide, narrow = (
        speed(llama(heads=heads, head_dim=4096 // heads), hardware=TWO_CORES).terms["attention"]
        for heads in (64, 256)
    )
    assert narrow / wide == pytest.approx((64 + 45) / 64 / ((256 + 45) / 256))


def test_materialised_scores_are_matrix_products():
    attention, arithmetic = (speed(CAPPED).terms[term] for term in ("attention", "arithmetic"))
    num_weights, num_trainable = LLAMA_8B.linear_parameters, trainable_parameters(LLAMA_8B, LORA)
    of_scores = 2 * 3.5 * 2 * 1024 * 4096 * 32  # of a token, without a mask that skips half of them
    ratio = of_scores / (4 * num_weights + 6 * num_trainable)
    assert attention / arithmetic == pytest.approx(ratio)


def test_a_frozen_base_costs_4_flops_per_parameter_and_token_and_6_if_recomputed():
    tiny_adapter = run(lora_r=1, lora_target_modules=["q_proj"])
    none, half, all_layers = (
        speed(run_settings=tiny_adapter, tokens=8.0, checkpointed_layers=num).terms["arithmetic"]
        for num in (0, 16, 32)
    )
    flops = 4 * LLAMA_8B.linear_parameters * 8
    assert none == pytest.approx(flops / (0.7 * H100.flops), rel=1e-3)
    assert half / none == pytest.approx(5 / 4, rel=1e-3)
    assert all_layers / none == pytest.approx(6 / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "use_flash_attention", "has_all_scores"),
    [
        (LLAMA_8B, "auto", False),
        (LLAMA_8B, True, False),
        (CAPPED, "auto", True),
        (CAPPED, True, False),
    ],
)
def test_scores_of_later_tokens_are_computed_only_with_soft_caps_and_without_flash_attention(
    shape, use_flash_attention, has_all_scores
):
    """A fused kernel skips the scores of later tokens, which are half of all scores."""
    settings_of_run = run(use_flash_attention=use_flash_attention)
    cost = cost_per_token(shape, settings_of_run, "bfloat16")
    assert cost.score_flops == (4 if has_all_scores else 2) * 4096 * 32
    assert (cost.score_values > 0) == has_all_scores


def test_a_micro_batch_reads_only_the_experts_of_its_tokens():
    """Compare mixtures of 128 and of 8 experts, both with 8 experts for each token.

    From 16 tokens, all 128 experts are read; with one token, 8 are read in both models.
    """
    of_128 = Experts(count=128, per_token=8, size=768).tensors(4096)
    of_8 = Experts(count=8, per_token=8, size=768).tensors(4096)

    def memory_seconds(experts, tokens):
        shape = with_blocks(LLAMA_8B, experts=experts, experts_per_token=8)
        return speed(shape, tokens=tokens).terms["memory_traffic"]

    additional_seconds = {
        tokens: memory_seconds(of_128, tokens) - memory_seconds(of_8, tokens)
        for tokens in (1.0, 8.0, 16.0, 1024.0)
    }
    # The other 120 experts of 32 blocks, with three bf16 matrices each, are read twice.
    bytes_of_others = 2 * 120 * 32 * 3 * 4096 * 768
    seconds_of_others = 2 * bytes_of_others / (0.8 * H100.memory_bandwidth)
    assert additional_seconds[1] == pytest.approx(0, abs=1e-9)
    assert 0 < additional_seconds[8] < additional_seconds[16]
    assert additional_seconds[16] == pytest.approx(seconds_of_others)
    assert additional_seconds[1024] == pytest.approx(seconds_of_others)


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


def test_without_fast_paths_zero_2_reduces_gradients_of_every_micro_batch():
    """With `fast_paths`, the gradients of a step are reduced once, after its last micro-batch."""
    without_fast_paths = LORA.model_copy(update={"fast_paths": False})
    once_per_step, for_8_micro_batches = (
        speed(run_settings=run_settings, zero_stage=2, accumulation_steps=8).terms[
            "gradient_reduction"
        ]
        for run_settings in (LORA, without_fast_paths)
    )
    assert for_8_micro_batches == pytest.approx(8 * once_per_step)
    # An all-reduce over 8 ranks is a reduce-scatter and an all-gather, with 7 hops each.
    gradient_bytes = 4 * trainable_parameters(LLAMA_8B, LORA)  # fp32
    transfer_s = 2 * 7 / 8 * gradient_bytes / (0.7 * H100.node_link)
    latency_s = 2 * 7 * 5e-6
    assert once_per_step == pytest.approx(transfer_s + latency_s)


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


def test_with_hpz_the_base_is_gathered_within_the_node():
    """With hpZ the 8 ranks of each node together have a copy of the base."""
    slow_network = replace(H100, network=3e9)
    values = {"shape": LLAMA_70B, "hardware": slow_network, "zero_stage": 3}
    on_one_node = speed(**values)
    assert speed(**values, hpz_partition_size=8) == on_one_node
    without_hpz, with_hpz = (speed(**values, nodes=2, hpz_partition_size=size) for size in (1, 8))
    assert with_hpz.seconds_per_step < without_hpz.seconds_per_step / 10
    terms_that_use_the_network = {
        term for term in with_hpz.terms if with_hpz.terms[term] != on_one_node.terms[term]
    }
    assert terms_that_use_the_network == {"gradient_reduction", "adapter_gather", "optimizer"}


def test_4_bits_gather_a_quarter_of_the_linear_weights():
    not_quantised = 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)  # embeddings, head, norms
    bytes_16_bit, bytes_4_bit = (
        cost_per_token(LLAMA_8B, run_settings, "bfloat16").stored_bytes - not_quantised
        for run_settings in (LORA, QLORA)
    )
    assert bytes_4_bit == bytes_16_bit / 4
    assert bytes_16_bit + not_quantised == base_bytes(LLAMA_8B, LORA, "bfloat16")
    slow = replace(H100, network=1e8)  # so slow that computation hides nothing of the gathers
    seconds_16_bit, seconds_4_bit = (
        speed(LLAMA_8B, run_settings, slow, tokens=1.0, zero_stage=3, nodes=16).terms[
            "base_gathers"
        ]
        for run_settings in (LORA, QLORA)
    )
    assert seconds_4_bit / seconds_16_bit == pytest.approx(
        (bytes_4_bit + not_quantised) / (bytes_16_bit + not_quantised), rel=0.01
    )


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_quantised_weights_are_slower_than_16_bit_weights(micro_batch_size):
    bits_16, bits_4, bits_8 = (
        speed(run_settings=run_settings, micro_batch_size=micro_batch_size)
        for run_settings in (LORA, QLORA, INT8)
    )
    assert bits_16.seconds_per_step < bits_4.seconds_per_step
    assert bits_16.seconds_per_step < bits_8.seconds_per_step
    assert bits_16.terms["arithmetic"] == bits_4.terms["arithmetic"]
    # The forward and the backward pass each read the 4-bit weights and write 16-bit weights.
    num_weights = LLAMA_8B.linear_parameters
    bytes_per_pass = num_weights / 2 + 2 * num_weights
    seconds = 2 * bytes_per_pass / (0.8 * H100.memory_bandwidth)
    assert bits_4.terms["dequantisation"] == pytest.approx(seconds)


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize("run_settings", [LORA, QLORA])
@pytest.mark.parametrize("hardware", [*GPUS.values(), cpu_of(16, 2**36)], ids=lambda h: h.name)
def test_a_larger_micro_batch_is_never_slower_except_for_recomputed_logits(
    shape, run_settings, hardware
):
    """Logits that need more than one chunk are computed again in the backward pass.

    A step has 16 sequences on each rank, in micro-batches of 1 to 16.
    """
    for stage in (2, 3):
        speeds = [
            speed(
                shape, run_settings, hardware, 128.0, zero_stage=stage,
                micro_batch_size=micro_batch_size, accumulation_steps=16 // micro_batch_size,
            )
            for micro_batch_size in (1, 2, 4, 8, 16)
        ]  # fmt: skip
        without_logits = [each.seconds_per_step - each.terms["logits"] for each in speeds]
        assert without_logits == sorted(without_logits, reverse=True)
        assert speeds[-1].terms["logits"] <= 2 * speeds[0].terms["logits"]


def test_offloaded_shards_cross_the_host_link_twice_a_micro_batch():
    """Once for the forward pass and once for the backward pass."""
    slow_host_link = replace(H100, host_link=1e8)  # bytes per second
    on_device, in_host_memory = (
        speed(LLAMA_70B, hardware=slow_host_link, zero_stage=3, offload_param=location).terms[
            "base_gathers"
        ]
        for location in ("none", "cpu")
    )
    shard_bytes = cost_per_token(LLAMA_70B, LORA, "bfloat16").stored_bytes / 8
    transfer_s = 2 * shard_bytes / (0.7 * 1e8)
    assert in_host_memory - on_device == pytest.approx(transfer_s, rel=0.05)


def test_computation_hides_at_most_nine_tenths_of_the_gathers_of_the_base():
    """The term has the gather time that no computation overlaps."""
    short, long = (speed(LLAMA_70B, zero_stage=3, tokens=tokens).terms for tokens in (1, 8192))
    device_terms = ("arithmetic", "attention", "logits", "memory_traffic")
    computing_s = sum(short[term] for term in device_terms)
    assert short["base_gathers"] > long["base_gathers"]
    gathers_without_overlap_s = short["base_gathers"] + computing_s
    assert long["base_gathers"] == pytest.approx(gathers_without_overlap_s / 10)


def test_half_as_many_supervised_tokens_take_about_half_the_time_for_logits():
    with_all_tokens = speed().terms["logits"]
    with_half = step_seconds(
        LLAMA_8B, LORA, layout(), H100, SequenceProfile(tokens=1024, supervised_share=0.5)
    ).terms["logits"]
    assert with_all_tokens / 3 < with_half < with_all_tokens * 0.7


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
machines = st.sampled_from([*GPUS.values(), TWO_CORES])


@given(
    run_layout=layouts,
    machine=machines,
    run_settings=st.sampled_from([LORA, QLORA, INT8]),
    tokens=st.floats(1, 4096),
    rate=st.sampled_from(RATES),
    factor=st.floats(1, 100),
)
@settings(max_examples=300, deadline=None)
def test_terms_add_up_and_faster_hardware_never_makes_a_step_slower(
    run_layout, machine, run_settings, tokens, rate, factor
):
    sequences = SequenceProfile(tokens=tokens)
    result = step_seconds(SMOLLM2, run_settings, run_layout, machine, sequences)
    assert all(seconds >= 0 for seconds in result.terms.values())
    assert result.seconds_per_step == sum(result.terms.values())
    assert result.tokens_per_second * result.seconds_per_step == pytest.approx(
        run_layout.global_batch_size * tokens
    )
    largest_first = sorted(result.terms.values(), reverse=True)
    assert [seconds for _, seconds in result.three_largest()] == largest_first[:3]
    faster = replace(machine, **{rate: getattr(machine, rate) * factor})
    on_faster = step_seconds(SMOLLM2, run_settings, run_layout, faster, sequences)
    assert on_faster.seconds_per_step <= result.seconds_per_step * (1 + 1e-9)


def test_cached_costs_of_other_settings_are_not_used():
    with_r_8 = speed(run_settings=run(lora_r=8)).terms["adapter_gather"]
    for _ in range(40):  # new settings objects may get the addresses of deleted ones
        assert speed(run_settings=run(lora_r=16)).terms["adapter_gather"] > with_r_8
        assert speed(run_settings=run(lora_r=8)).terms["adapter_gather"] == with_r_8


@pytest.mark.parametrize(("micro_batch_size", "lowest", "highest"), [(4, 240, 294), (1, 140, 220)])
def test_the_predicted_speed_of_the_quickstart_is_near_the_measured_speed(
    micro_batch_size, lowest, highest
):
    """The rates of the catalogue's CPU are fitted to two measurements of docs/benchmarks.md.

    On two cores and rows of 74 tokens, they are 267 tokens/s for micro-batches of 4, and 140 to 220
    for micro-batches of 1.
    """
    run_settings = run(
        lora_target_modules="all-linear", lora_dropout=0.0, max_length=512, fast_paths=False
    )
    predicted = step_seconds(
        SMOLLM2,
        run_settings,
        layout(micro_batch_size=micro_batch_size, ranks_per_node=2),
        TWO_CORES,
        SequenceProfile(tokens=73.75, supervised_share=0.44),
    )
    assert lowest < predicted.tokens_per_second < highest


def test_the_example_of_docs_speed_has_the_predicted_numbers():
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
    # In fp16 the other fast path of one rank, the gradient of the loss, is always off.
    sharded = layout(zero_stage=3, training_dtype="float16")
    sequences = SequenceProfile(tokens=2048)

    def memory_and_time(run_settings):
        arguments = LLAMA_8B, run_settings, sharded, H100, sequences
        return memory(*arguments).per_rank, step_seconds(*arguments).terms

    without_joint_lora = memory_and_time(run(fast_paths=False))
    assert memory_and_time(run(deepspeed_json="own.json")) == without_joint_lora
    memory_terms, time_terms = memory_and_time(run())
    assert memory_terms != without_joint_lora[0]
    assert time_terms != without_joint_lora[1]
