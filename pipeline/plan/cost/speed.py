"""Predicted seconds of an optimizer step, from the cost per token and the rates of the machine.

The prediction is a sum of terms. Each term counts only time that does not overlap with another
term. The constants below are assumptions, not measured on a GPU; docs/speed.md lists them.

Parameter names that occur in many functions: `cost` are the FLOPs, values and kernels of the model
per token. `micro` is the number of tokens of a micro-batch on one rank. `reach` is the number of
tokens to which a token may attend: the length of its sequence, or of its document in a pack.
`recomputed` is the fraction of the blocks that are checkpointed, so that their forward pass runs
twice. `rates` are the rates that one rank reaches. b is the number of bytes per value in the
training dtype.
"""

from dataclasses import dataclass
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.loss import LOGITS_CHUNK_BYTES
from pipeline.plan.cost.per_token import TRAFFIC_BACKWARD, CostPerToken, cost_per_token
from pipeline.plan.given.fast_paths import has_loss_gradient, has_one_reduction
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.saved_modules import has_head_gradient
from pipeline.plan.given.sequence_parallel import key_copies
from pipeline.plan.given.shape import ModelShape

# Fractions of the vendor's figures that large kernels and collectives are assumed to reach.
_MATRIX_SHARE = 0.7
_BANDWIDTH_SHARE = 0.8
_LINK_SHARE = 0.7
# FLOPs of matrix products that take as long as the softmax of a score in fused attention kernels.
# On a CPU measured in fp32 (docs/speed.md). On GPUs such that heads of width 128 reach the fraction
# of the vendor's rate that was published for FlashAttention-2, whose kernels PyTorch has: 50 to
# 73 % of an A100 (arXiv 2307.08691), 35 % of an H100 (arXiv 2407.08608).
_SOFTMAX_FLOPS_CPU = 45
_SOFTMAX_FLOPS_AMPERE = 85
_SOFTMAX_FLOPS_HOPPER = 512  # and later GPUs: an assumption
# fp32 rate relative to 16 bits: 19.5 of 312 TFLOPS (A100 data sheet). On a CPU it was 0.3 on one
# machine and 2.0 on another (docs/benchmarks.md: 89 tokens/s in fp32 and 267 in bf16, 204 and 100).
_FLOAT32_SHARE = {"cuda": 1 / 16, "cpu": 1.0}
# Attention's backward relative to its forward: five matrix products instead of two, because the
# scores are recomputed (FlashAttention-2, arXiv 2307.08691 s.4.1).
_SCORES_BACKWARD = 2.5
# Adapters of experts are added ("folded") to the experts' weights. Memory passes of the backward
# pass relative to those of the forward pass: 3 to 2.
_FOLD_BACKWARD = 1.5
# Passes over modules that are trained in full, for their gradients in each micro-batch: zeroed,
# written, and read and written while they are summed.
_GRADIENT_PASSES = 4
KERNEL_S = 8e-6  # host time in seconds to launch one kernel from eager PyTorch
FETCH_S = 50e-6  # host time in seconds for ZeRO-3's hooks around one module of the base
_HOP_S = 5e-6  # latency in seconds of one hop of a ring
_STEP_S = 0.01  # seconds per step: small all-reduces, learning rate, a line of metrics.jsonl
# Fraction of the time of ZeRO-3's gathers that never overlaps with computing: the first block of a
# pass is gathered before it can run, and copies slow down concurrent kernels.
_EXPOSED_SHARE = 0.1
# Bytes per parameter: Adam reads gradient, master weight and two moments, and writes all except the
# gradient, in fp32.
_ADAM_BYTES = 28
# bf16 runs reduce fp32 gradients (plan/deepspeed/config.py); fp16 and fp32 runs their own dtype.
_REDUCED_BYTES = {"bfloat16": 4, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Predicted time of a step.

    `terms`: seconds of each term. `tokens`: tokens of a step on all ranks, padding included.
    """

    terms: dict[str, float]
    tokens: float

    @property
    def seconds_per_step(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.tokens / self.seconds_per_step

    def three_largest(self) -> list[tuple[str, float]]:
        """Name and seconds of the three largest terms, the largest first."""
        return sorted(self.terms.items(), key=lambda term: -term[1])[:3]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Sustained rates of one rank, in bytes/s in each direction unless noted.

    `flops`: FLOP/s of matrix products. `softmax_s`: seconds of the softmax of one score in a fused
    attention kernel. `memory`: device memory. `ring`: slowest link of a ring over all ranks.
    `base_ring`: slowest link of a ring over the ranks that gather the base together. `exchange`:
    slowest link between ranks that share sequences. `host`: link to host memory.
    """

    flops: float
    softmax_s: float
    memory: float
    ring: float
    base_ring: float
    exchange: float
    host: float


def step_seconds(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    hardware: Hardware,
    sequences: SequenceProfile,
) -> Speed:
    """Predicted time of a step; `sequences` is the average profile of its sequences."""
    cost = cost_per_token(shape, settings, layout.training_dtype, is_sharded=layout.is_sharded)
    rates = reachable_rates(layout, hardware)
    tokens, attended = sequences.tokens, sequences.attended
    micro = layout.micro_batch_size * tokens / layout.sequence_parallel_size
    reach = tokens if attended is None else attended
    num_documents = layout.micro_batch_size * (1 if attended is None else tokens / attended)
    recomputed = layout.checkpointed_layers / shape.num_layers
    device = {
        "arithmetic": _block_flops(cost, micro, recomputed) / rates.flops,
        "attention": _attention_seconds(cost, rates, micro, reach, recomputed),
        "logits": _logits_seconds(
            shape, settings, layout, rates, micro * sequences.supervised_share
        ),
        "memory_traffic": _traffic_bytes(cost, layout, micro, reach, recomputed) / rates.memory,
        "dequantisation": _dequantisation_bytes(cost, settings, layout, recomputed) / rates.memory,
    }
    if layout.mlp_tiles > 1:
        device["tiles"] = _tile_seconds(shape, settings, layout, rates, micro)
    busy = sum(device.values())
    gathers = _exposed_seconds(2 * gather_seconds(cost, layout, rates), busy)
    launches = _launch_seconds(cost, layout, recomputed, num_documents)
    if hardware.kind == "cuda":  # asynchronous: only the excess over device time counts
        launches = max(0.0, launches - busy - gathers)
    per_micro_batch = device | {
        "launches": launches,
        "base_gathers": gathers,
        "sequence_exchange": _exchange_seconds(shape, layout, rates, micro, recomputed),
    }
    if layout.offload_activations:
        size = layout.checkpointed_layers * micro * shape.hidden_size * layout.bytes_per_value
        per_micro_batch["activation_copies"] = _copy_seconds(size / rates.host, busy, recomputed)
    num_micro_batches = layout.accumulation_steps
    terms = {term: num_micro_batches * seconds for term, seconds in per_micro_batch.items()}
    is_reduced_once = has_one_reduction(settings, layout)
    num_reductions = 1 if is_reduced_once else num_micro_batches
    return Speed(
        terms=terms | _seconds_per_step(cost, layout, rates, num_reductions),
        tokens=layout.global_batch_size * tokens,
    )


def reachable_rates(layout: Layout, hardware: Hardware) -> Rates:
    """Rates that kernels and collectives are assumed to sustain on this machine."""
    # The ranks of a node share its CPU; each has a GPU of its own.
    sharers = layout.ranks_per_node if hardware.kind == "cpu" else 1
    is_float32 = layout.training_dtype == "float32"
    factor = _FLOAT32_SHARE[hardware.kind] if is_float32 else 1.0
    within_node = _LINK_SHARE * hardware.node_link
    across_nodes = min(within_node, _LINK_SHARE * hardware.network)
    ring = within_node if layout.nodes == 1 else across_nodes
    gathers_within_node = 1 < layout.hpz_partition_size <= layout.ranks_per_node
    splits_within_node = layout.sequence_parallel_size <= layout.ranks_per_node
    flops = _MATRIX_SHARE * factor * hardware.flops / sharers
    return Rates(
        flops=flops,
        softmax_s=_softmax_flops(hardware) / flops,
        memory=_BANDWIDTH_SHARE * hardware.memory_bandwidth / sharers,
        ring=ring,
        base_ring=within_node if gathers_within_node else ring,
        exchange=within_node if splits_within_node else across_nodes,
        host=_LINK_SHARE * hardware.host_link / sharers,
    )


def _softmax_flops(hardware: Hardware) -> int:
    """FLOPs of matrix products that take as long as the softmax of one attention score."""
    if hardware.kind == "cpu":
        return _SOFTMAX_FLOPS_CPU
    is_ampere = hardware.compute_capability is None or hardware.compute_capability < (9, 0)
    return _SOFTMAX_FLOPS_AMPERE if is_ampere else _SOFTMAX_FLOPS_HOPPER


def _attention_seconds(
    cost: CostPerToken, rates: Rates, micro: float, reach: float, recomputed: float
) -> float:
    """Seconds of attention for one micro-batch: products and softmax, without memory traffic.

    The softmax of materialised scores is part of the memory traffic.
    """
    seconds = cost.score_flops / rates.flops  # of a pair of tokens
    if not cost.score_values:
        seconds += cost.scores * rates.softmax_s
    return micro * reach * (1 + _SCORES_BACKWARD + recomputed) * seconds


def _block_flops(cost: CostPerToken, micro: float, recomputed: float) -> float:
    """FLOPs of the blocks for one micro-batch, without those of attention's scores.

    A frozen weight costs 2 FLOPs per token in the forward pass. It costs 2 in the backward pass,
    for the gradient of its input. An adapter's weight costs 2 and 4, because it also has a gradient
    itself. (arXiv 2001.08361 s.2.1 counts the same for models whose weights are all trained.)
    Recomputation is one more forward pass.

    An adapter of experts does not compute on tokens: it is added ("folded") to the experts'
    weights. This happens twice in each forward pass, because torch 2.13 nn/utils/parametrize.py
    also computes the sum to check its shape. The backward pass computes the gradient of the sum,
    with 2 FLOPs per token and weight of its experts, and from this gradient those of A and B.
    """
    fold = (2 + 2 + 2 * recomputed) * cost.fold_flops
    per_token = (
        (2 + recomputed) * cost.base_flops
        + (3 + recomputed) * cost.adapter_flops
        + cost.expert_gradient_flops
    )
    return micro * per_token + fold + (1 + recomputed) * cost.norm_flops


def _logits_seconds(
    shape: ModelShape, settings: RunSettings, layout: Layout, rates: Rates, positions: float
) -> float:
    """Seconds of head and loss for `positions` tokens with logits (model/loss.py).

    A logit is written in the training dtype, cast to fp32, and read and written by log-softmax; the
    backward pass does the same in reverse. If the logits need more than one chunk, their forward
    pass is recomputed in the backward pass.

    If the gradient is computed in the forward pass (model/loss_gradient.py), nothing is recomputed.
    Log-softmax reads the logits and writes fp32 values, which are turned into the gradient in
    place, cast to the training dtype and read.
    """
    b, vocabulary = layout.bytes_per_value, shape.vocab_size
    max_positions = positions
    if layout.is_sharded:  # all ranks need as many chunks as the longest sequence
        max_positions = (
            layout.micro_batch_size * settings.max_length / layout.sequence_parallel_size
        )
    chunks = max(1, ceil(max_positions * vocabulary * 4 / LOGITS_CHUNK_BYTES))
    has_gradient_in_forward = has_loss_gradient(shape, settings, layout)
    recomputed = 0 if chunks == 1 or has_gradient_in_forward else 1
    bytes_per_logit = 4 * b + 24 + recomputed * (2 * b + 12)
    if has_gradient_in_forward:
        bytes_per_logit = 4 * b + (16 if b < 4 else 8)
    traffic = positions * vocabulary * bytes_per_logit
    # each chunk reads the head's weight in each pass
    traffic += (2 + recomputed) * chunks * vocabulary * shape.hidden_size * b
    passes = 2 + recomputed + (1 if has_head_gradient(shape, settings) else 0)
    flops = passes * 2 * vocabulary * shape.hidden_size * positions
    return flops / rates.flops + traffic / rates.memory


def _traffic_bytes(
    cost: CostPerToken, layout: Layout, micro: float, reach: float, recomputed: float
) -> float:
    """Bytes of memory traffic of the blocks for one micro-batch.

    Each pass reads all weights once, even for few tokens, so small micro-batches are slow. This is
    the roofline model (Williams et al. 2009), except that compute time and memory time are added,
    where the original takes the larger of the two. Only the experts that a token selects are read.
    """
    experts = min(1.0, micro * cost.expert_share) * cost.expert_values
    weights = (2 + recomputed) * (cost.linear_values + experts)
    values_per_token = (1 + recomputed) * (cost.token_values + cost.score_values * reach)
    values_per_token += cost.backward_values + TRAFFIC_BACKWARD * cost.score_values * reach
    activations = micro * values_per_token
    # An adapter of experts is added to their weights twice in each forward pass. The gradient of
    # the sum is written once and read twice.
    folds = (2 + _FOLD_BACKWARD + 2 * recomputed) * cost.fold_values
    norms = (1 + recomputed) * cost.norm_values
    gradients = _GRADIENT_PASSES * cost.saved_values
    return layout.bytes_per_value * (weights + activations + folds + norms + gradients)


def _dequantisation_bytes(
    cost: CostPerToken, settings: RunSettings, layout: Layout, recomputed: float
) -> float:
    """Bytes of memory traffic for dequantising the weights in one micro-batch.

    The classes are those of bitsandbytes 0.50 (autograd/_functions.py). MatMul4Bit dequantises in
    each forward and backward pass: it reads the quantised weight and writes the dequantised one.
    MatMul8bitLt multiplies int8 values in the forward pass. In its backward pass it casts the
    weight, then reads and writes it again. The fused kernel for few tokens is not included.
    """
    dequantised = layout.bytes_per_value * cost.linear_values
    if settings.load_in_4bit:
        return (2 + recomputed) * (cost.quantised_bytes + dequantised)
    return cost.quantised_bytes + 3 * dequantised if settings.load_in_8bit else 0.0


def _launch_seconds(
    cost: CostPerToken, layout: Layout, recomputed: float, num_documents: float
) -> float:
    """Seconds that the host needs to launch the kernels of a micro-batch."""
    fetches = 2 * cost.modules * FETCH_S if layout.is_sharded else 0.0
    kernels = (1 + recomputed) * cost.kernels + cost.backward_kernels
    # a document's backward pass has as many kernels as its forward pass
    kernels += (2 + recomputed) * cost.document_kernels * num_documents
    return kernels * KERNEL_S + fetches


def gather_seconds(cost: CostPerToken, layout: Layout, rates: Rates) -> float:
    """Seconds of ZeRO-3's gathers of the base in one pass, before overlap is considered.

    A micro-batch has two passes: the forward pass, and the backward pass with its recomputation
    (stage3_max_reuse_distance, DeepSpeed 0.19.8 partitioned_param_coordinator.py). Each gather is a
    ring all-gather, which sends (p - 1)/p of the bytes over p ranks (Thakur et al. 2005). With hpZ,
    groups of `hpz_partition_size` ranks hold a second copy of the base, and every gather reads this
    copy (stage3.py, ZeRO++ arXiv 2306.10209 s.3.2). An offloaded shard is copied from host memory
    for each gather.
    """
    if not layout.is_sharded:
        return 0.0
    group = layout.hpz_partition_size if layout.hpz_partition_size > 1 else layout.world_size
    num_gathers = cost.modules  # at most one collective per linear layer
    seconds = ring_seconds(group, cost.stored_bytes, rates.base_ring, rings=num_gathers)
    if layout.offload_param == "cpu":
        seconds += cost.stored_bytes / group / rates.host
    return seconds


def exchanged_values(shape: ModelShape, size: int) -> int:
    """Values per token that the ranks of a sequence-parallel group exchange in a forward pass.

    A block exchanges query, key and value before its attention, and the output after it
    (model/ulysses.py).
    """
    return sum(
        count
        * (
            block.num_heads * (block.key_dim + block.head_dim)  # queries and the output
            + block.keys_and_values_width * key_copies(block.num_kv_heads, size)
        )
        for block, count in shape.counts()
    )


def _exchange_seconds(
    shape: ModelShape, layout: Layout, rates: Rates, micro: float, recomputed: float
) -> float:
    """Seconds of the all-to-alls of a sequence-parallel group of P ranks in a micro-batch.

    A rank keeps 1/P of the values and sends the others. Nothing overlaps with the exchanges,
    because attention needs their results.
    """
    size, b = layout.sequence_parallel_size, layout.bytes_per_value
    if size == 1:
        return 0.0
    passes = 2 + recomputed
    sent = passes * micro * exchanged_values(shape, size) * b * (size - 1) / size
    return sent / rates.exchange + passes * 2 * shape.num_layers * _HOP_S


def _tile_seconds(
    shape: ModelShape, settings: RunSettings, layout: Layout, rates: Rates, micro: float
) -> float:
    """Seconds that tiled MLPs add to a micro-batch.

    The backward pass of a tiled MLP computes its forward pass once more. Each tile reads the
    weights of the MLP in each pass, and dequantises them if they are quantised.
    """
    cost = cost_per_token(shape, settings, layout.training_dtype, is_sharded=layout.is_sharded)
    b = layout.bytes_per_value
    weights = sum(
        count * block.mlp_weights for block, count in shape.counts() if block.has_tileable_mlp
    )
    share = weights / cost.linear_values  # of MLPs in all linear layers
    flops = share * (cost.base_flops + cost.adapter_flops) * micro
    reads = (layout.mlp_tiles - 1) * (3 + layout.checkpointed_layers / shape.num_layers) + 1
    per_read = b * weights + (
        share * (cost.quantised_bytes + b * weights) if cost.quantised_bytes else 0
    )
    traffic = share * b * cost.token_values * micro + reads * per_read
    return flops / rates.flops + traffic / rates.memory


def _copy_seconds(one_way: float, busy: float, recomputed: float) -> float:
    """Seconds that copies of activations add: to the host in the forward pass, and back after it.

    `one_way`: seconds of the copies in one direction. `busy`: seconds of computing, with which they
    overlap. The backward pass computes as long as the forward pass, because a frozen weight has no
    gradient. Recomputation is added to it.
    """
    forward = busy / (2 + recomputed)
    return _exposed_seconds(one_way, forward) + _exposed_seconds(one_way, busy - forward)


def _exposed_seconds(transfers: float, busy: float) -> float:
    """Seconds of gathers or copies that do not overlap with `busy` seconds of computing.

    Gathers can overlap because the config sets `overlap_comm` at ZeRO-3.
    """
    return _EXPOSED_SHARE * transfers + max(0.0, (1 - _EXPOSED_SHARE) * transfers - busy)


def _seconds_per_step(
    cost: CostPerToken, layout: Layout, rates: Rates, num_reductions: int
) -> dict[str, float]:
    """Seconds of the terms that a step has once: the adapter's communication and its update.

    ZeRO-1 all-reduces gradients once per step, ZeRO-2 `num_reductions` times (DeepSpeed 0.19.8
    stage_1_and_2.py). ZeRO-3 reduce-scatters them `num_reductions` times, and a reduce-scatter
    costs half an all-reduce. Updated weights are gathered once per step (at ZeRO-3 as persistent
    parameters, stage3.py).
    """
    world, b = layout.world_size, layout.bytes_per_value
    # an all-reduce is a reduce-scatter and an all-gather
    num_rings = {1: 2, 2: 2 * num_reductions, 3: num_reductions}[layout.zero_stage]
    gradients = cost.trainable * _REDUCED_BYTES[layout.training_dtype]
    partition = cost.trainable / world
    return {
        "gradient_reduction": num_rings * ring_seconds(world, gradients, rates.ring),
        "adapter_gather": ring_seconds(world, cost.trainable * b, rates.ring),
        "optimizer": partition * (_ADAM_BYTES + b) / rates.memory,
        "fixed": _STEP_S,
    }


def ring_seconds(ranks: int, num_bytes: float, rate: float, *, rings: int = 1) -> float:
    """Seconds to all-gather or reduce-scatter `num_bytes` in `rings` consecutive collectives."""
    return (ranks - 1) / ranks * num_bytes / rate + rings * (ranks - 1) * _HOP_S
