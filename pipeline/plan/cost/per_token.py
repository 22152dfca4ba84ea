"""FLOPs, memory traffic and kernel launches of a model and its adapter, per token.

These costs do not depend on hardware or layout. A multiplication with its addition counts as 2
FLOPs. A "pass" over a tensor reads or writes each of its values once. The numbers of kernels and
passes are those of transformers 5.23 (models/llama/modeling_llama.py) and peft 0.21
(tuners/lora/layer.py); tests/plan/cost/test_per_token.py counts them on models.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import attends_by_document, has_scores
from pipeline.plan.given.adapter_counts import (
    AdaptedLayer,
    adapted_layers,
    adapter_counts,
    input_of,
    trainable_parameters,
)
from pipeline.plan.given.block import Block
from pipeline.plan.given.fast_paths import has_joint_lora
from pipeline.plan.given.layout import DTYPE_BYTES
from pipeline.plan.given.saved_modules import has_head_gradient, saved_parameters
from pipeline.plan.given.shape import ModelShape

# Passes over a tensor of the training dtype in a block's forward pass. Those of matrix products are
# counted in the functions below.
_NORM_PASSES = 18  # RMSNorm in fp32: cast, square, mean, two products, cast; a kernel each
_RESIDUAL_PASSES = 3  # two read, one written, after attention and after the MLP
_ROTARY_PASSES = 10  # halves rotated and concatenated, two products, one sum
_GATE_PASSES = 5  # activation: one read, one written; product: two read, one written
_LORA_IN_PASSES = 1  # A reads its input
_DROPOUT_PASSES = 2  # dropout reads and writes the input of A
_WEIGHT_NORM_PASSES = 7  # DoRA: B A is written, scaled, added to the weight; the norm reads the sum
_LORA_OUT_PASSES = 6  # B writes; scaling reads and writes; the sum reads two and writes one
# Joint LoRA (model/joint_lora.py) multiplies an input that several layers share by all of their A
# matrices at once. One kernel then multiplies by B and adds the product to a layer's output.
_JOINT_OUT_PASSES = 2
# Experts (grouped_mm). Routing has passes over the hidden state. Each expert that a token is routed
# to has passes over tensors of the hidden width (copied in and out, weighted, summed) and of the
# expert's inner width.
_ROUTING_PASSES = 8
_EXPERT_HIDDEN_PASSES = 12
_EXPERT_INNER_PASSES = 8
_FOLD_PASSES = 2  # adding ("folding") an adapter of experts to their weights: one read, one written
# Soft-capped attention scores, which are "materialised" (a tensor in memory): scaled, capped in
# three kernels, masked, softmax in fp32, cast.
_SCORE_PASSES = 22

# A backward pass has 1.7 times the passes and 1.6 times the kernels of its forward pass
# (test_per_token.py). Joint LoRA has its own numbers below.
TRAFFIC_BACKWARD = 1.7
_KERNELS_BACKWARD = 1.6
# Passes in the backward pass of joint LoRA, fitted in test_per_token.py: over each shared input;
# over the input of each layer, to sum the gradients of layers that share it; over the output of
# each layer.
_JOINT_IN_BACKWARD = 4
_JOINT_SUM_BACKWARD = 3
_JOINT_OUT_BACKWARD = 3

# Kernels of a block's forward pass: two norms (8 each), rotary embedding (10), residuals and gate
# (4) and attention (1).
_BLOCK_KERNELS = 31
_LORA_KERNELS = 4  # A, B, scaling, sum; dropout is one more
_JOINT_KERNELS = 1  # B with scaling and sum; `_num_kernels` counts A and dropout once per input
# Kernels of joint LoRA's backward pass: for each layer, and for each shared input.
_JOINT_LAYER_KERNELS_BACKWARD = 5
_JOINT_INPUT_KERNELS_BACKWARD = 2
_DEQUANTISE_KERNELS = 2  # the constants, then the weight
_SCORES_KERNELS = 15  # attention of one document with materialised scores; a fused kernel is 1
# An adapter of experts is added to two fused tensors (gate with up, and down). torch computes each
# sum twice, the second time to check its shape (nn/utils/parametrize.py).
_FOLD_KERNELS = 4
_EXPERTS_KERNELS = 22  # routing, sorting by expert, two grouped products, and the inverse sort


@dataclass(frozen=True, kw_only=True)
class CostPerToken:
    """Costs of one forward pass of a model and its adapter.

    Fields whose names begin with `backward_` are costs of the backward pass. A field whose name
    ends in `_values` counts values that are read from memory or written to it. To "fold" an adapter
    of experts is to add it to their weights.
    """

    # Constants of the model
    trainable: int  # trainable parameters
    saved_values: int = 0  # parameters of modules that are trained in full
    linear_values: int  # weights of all linear layers
    expert_values: int  # weights of all experts
    expert_share: float  # fraction of the experts that one token is routed to
    quantised_bytes: float  # bytes of the linear weights if they are quantised, else 0
    # Bytes of the base that ZeRO-3 shards. Quantisation constants are replicated and not included.
    stored_bytes: float
    modules: int  # number of linear layers

    # Per token
    base_flops: float
    adapter_flops: float
    head_flops: float
    token_values: float  # in all blocks, attention scores excluded
    backward_values: float
    expert_gradient_flops: float = 0.0  # for the gradients of adapted experts' weights

    # Per pair of a token and a token that it attends to
    scores: float  # that are computed, in all heads and blocks
    score_flops: float
    score_values: float  # 0 unless attention scores are materialised

    # Per micro-batch
    kernels: int  # launches, without those for each document
    backward_kernels: float
    document_kernels: int  # further launches for each packed document
    norm_flops: float  # for the norms of DoRA's merged weights
    norm_values: float
    fold_flops: float = 0.0  # for adding the adapter of experts once to all fused tensors
    fold_values: float = 0.0

    # Per supervised token
    head_gradient_flops: float = 0.0  # for the gradient of a trained head's weight


def cost_per_token(
    shape: ModelShape, settings: RunSettings, training_dtype: str, *, is_sharded: bool = False
) -> CostPerToken:
    """The costs of a model, cached because the search for a layout needs them often.

    `is_sharded`: whether the run uses ZeRO-3, which can exclude joint LoRA. FLOPs do not depend on
    it.
    """
    is_joint = has_joint_lora(settings, is_sharded=is_sharded)
    return _compute_cost(_Identity(shape, settings), training_dtype, is_joint=is_joint)


@dataclass(frozen=True, kw_only=True)
class SequenceFlops:
    """Coefficients of the model FLOPs of a sequence, forward and backward, for load balancing.

    FLOPs = `per_token` x tokens + `per_square` x sum of the squared document lengths + `per_logit`
    x supervised tokens. Document lengths are squared one by one because attention does not cross
    documents; only supervised tokens have logits.
    """

    per_token: float
    per_square: float
    per_logit: float


def sequence_flops(cost: CostPerToken) -> SequenceFlops:
    """Coefficients of a sequence's model FLOPs, without recomputation.

    The backward pass of a frozen weight costs as much as its forward pass, since only the input
    needs a gradient. The backward pass of adapters and attention products costs twice as much as
    their forward pass, since both operands need a gradient.
    """
    return SequenceFlops(
        per_token=2 * cost.base_flops + 3 * cost.adapter_flops + cost.expert_gradient_flops,
        per_square=3 * cost.score_flops,
        per_logit=2 * cost.head_flops + cost.head_gradient_flops,
    )


class _Identity:
    """Cache key that compares shape and settings by identity.

    Both objects are immutable. The key keeps them alive, so that their ids stay unique.
    """

    def __init__(self, shape: ModelShape, settings: RunSettings) -> None:
        self.shape = shape
        self.settings = settings
        self._ids = (id(shape), id(settings))

    def __hash__(self) -> int:
        return hash(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other._ids == self._ids


@lru_cache(maxsize=16)
def _compute_cost(key: _Identity, training_dtype: str, *, is_joint: bool) -> CostPerToken:
    """The costs; `is_joint`: whether LoRA layers with the same input are computed together."""
    shape, settings = key.shape, key.settings
    num_weights, bytes_per_value = shape.linear_parameters, DTYPE_BYTES[training_dtype]
    quantised = 0.0
    if settings.is_quantised:
        quantised = (0.5 if settings.load_in_4bit else 1.0) * num_weights
    stored_linears = quantised or num_weights * bytes_per_value
    adapter, counts = adapter_counts(shape, settings), shape.counts()
    adapted = adapter.adapted_experts
    heads = sum(count * block.num_heads for block, count in counts)
    # Causal kernels skip the masked half of the scores (FlashAttention-2, arXiv 2307.08691 s.3.1),
    # PyTorch's SDPA too, because training passes it no mask (model/loss.py). Soft-capped scores
    # are materialised in full unless FlashAttention-2 computes them.
    is_materialised = has_scores(shape, settings)
    computes_head_gradient = has_head_gradient(shape, settings)
    token_values, backward_values = _token_values(shape, settings, is_joint=is_joint)
    kernels, backward_kernels = _num_kernels(shape, settings, is_joint=is_joint)
    return CostPerToken(
        trainable=trainable_parameters(shape, settings),
        base_flops=2 * sum(count * block.active_weights for block, count in counts),
        adapter_flops=2 * (adapter.parameters - adapter.expert_parameters),
        # Scores, and their product with V: 2 FLOPs each (PaLM, arXiv 2204.02311 app. B).
        scores=heads if is_materialised else heads / 2,
        score_flops=(4 if is_materialised else 2)
        # Values are padded to the width of keys (model/attention.py).
        * sum(count * block.num_heads * block.key_dim for block, count in counts),
        head_flops=2 * shape.vocab_size * shape.hidden_size,
        token_values=token_values,
        backward_values=backward_values,
        score_values=_SCORE_PASSES * heads if is_materialised else 0,
        linear_values=num_weights,
        expert_values=shape.expert_parameters,
        expert_share=max(block.experts_per_token for block in shape.blocks)
        / max(1, shape.num_experts),
        quantised_bytes=quantised,
        stored_bytes=stored_linears + (shape.parameters - num_weights) * bytes_per_value,
        kernels=kernels,
        backward_kernels=backward_kernels,
        document_kernels=_num_document_kernels(shape, settings),
        modules=_num_linears(shape),
        norm_flops=_norm_flops(shape, settings),
        norm_values=_norm_values(shape, settings),
        expert_gradient_flops=sum(
            2 * count * block.active_expert_weights for block, count in counts if adapted
        ),
        fold_flops=2 * settings.lora_r * adapted,
        fold_values=_FOLD_PASSES * adapted,
        head_gradient_flops=2 * shape.vocab_size * shape.hidden_size * computes_head_gradient,
        saved_values=saved_parameters(shape, settings),
    )


def _norm_flops(shape: ModelShape, settings: RunSettings) -> float:
    """FLOPs of DoRA's weight norms.

    peft computes B A as the output of the adapter for an identity matrix (d_in, d_in).
    """
    layers = adapted_layers(shape, settings) if settings.use_dora else ()
    return sum(
        2 * layer.r * layer.linear.d_in * (layer.linear.d_in + layer.linear.d_out)
        for layer in layers
    )


def _norm_values(shape: ModelShape, settings: RunSettings) -> float:
    """Values read or written for DoRA's weight norms, including the identity matrix."""
    layers = adapted_layers(shape, settings) if settings.use_dora else ()
    return sum(
        2 * layer.linear.d_in**2 + _WEIGHT_NORM_PASSES * layer.linear.d_in * layer.linear.d_out
        for layer in layers
    )


def _num_linears(shape: ModelShape) -> int:
    """Number of linear layers in all blocks."""
    return sum(count * len(block.linears) for block, count in shape.counts())


def _token_values(
    shape: ModelShape, settings: RunSettings, *, is_joint: bool
) -> tuple[float, float]:
    """Values read or written per token in a forward and in a backward pass, without scores."""
    layers = adapted_layers(shape, settings)
    groups = _input_groups(layers, is_joint=is_joint)
    dropout = _DROPOUT_PASSES if settings.lora_dropout > 0 else 0
    output_passes = _JOINT_OUT_PASSES if is_joint else _LORA_OUT_PASSES
    d_in = sum(group[0].linear.d_in for group in groups)
    d_out = sum(layer.linear.d_out for layer in layers)
    blocks = sum(count * _block_values(block, settings) for block, count in shape.counts())
    forward = blocks + (_LORA_IN_PASSES + dropout) * d_in + output_passes * d_out
    if not is_joint:
        return forward, TRAFFIC_BACKWARD * forward
    backward = (_JOINT_IN_BACKWARD + dropout) * d_in + _JOINT_OUT_BACKWARD * d_out
    backward += _JOINT_SUM_BACKWARD * sum(layer.linear.d_in for layer in layers)
    return forward, TRAFFIC_BACKWARD * blocks + backward


def _block_values(block: Block, settings: RunSettings) -> int:
    """Values read or written per token in one block, without its adapters."""
    queries, keys = block.query_width, block.key_width
    values = (
        _NORM_PASSES * block.norm_parameters
        + 2 * _RESIDUAL_PASSES * block.hidden_size
        + _ROTARY_PASSES * (queries + keys)
        + 2 * (queries + keys)  # attention reads q, k and v and writes its output
        + _GATE_PASSES * block.intermediate_size
        + sum(linear.d_in + linear.d_out for linear in block.linears)
        # the attention outputs of a pack's documents are concatenated
        + (2 * queries if attends_by_document(settings) else 0)
    )
    if block.num_experts:
        per_expert = (
            _EXPERT_HIDDEN_PASSES * block.hidden_size + _EXPERT_INNER_PASSES * block.expert_size
        )
        values += _ROUTING_PASSES * block.hidden_size + block.experts_per_token * per_expert
    return values


def _num_kernels(shape: ModelShape, settings: RunSettings, *, is_joint: bool) -> tuple[int, float]:
    """Kernel launches of a forward and of a backward pass, without those for each document."""
    per_linear = 1 + (_DEQUANTISE_KERNELS if settings.is_quantised else 0)
    expert_kernels = _EXPERTS_KERNELS
    if adapter_counts(shape, settings).adapted_experts:
        expert_kernels += _FOLD_KERNELS
    blocks = sum(
        count * (_BLOCK_KERNELS + (expert_kernels if block.num_experts else 0))
        for block, count in shape.counts()
    )
    base = blocks + per_linear * _num_linears(shape)
    layers = adapted_layers(shape, settings)
    groups = _input_groups(layers, is_joint=is_joint)
    dropouts = len(groups) if settings.lora_dropout > 0 else 0
    if not is_joint:
        forward = base + dropouts + _LORA_KERNELS * len(layers)
        return forward, _KERNELS_BACKWARD * forward
    backward = _KERNELS_BACKWARD * base + dropouts
    backward += _JOINT_LAYER_KERNELS_BACKWARD * len(layers)
    backward += _JOINT_INPUT_KERNELS_BACKWARD * len(groups)
    concatenations = sum(len(group) > 1 for group in groups)  # of the A matrices of a group
    products_with_a = len(groups)
    forward = base + dropouts + concatenations + products_with_a + _JOINT_KERNELS * len(layers)
    return forward, backward


def _input_groups(layers: Sequence[AdaptedLayer], *, is_joint: bool) -> list[list[AdaptedLayer]]:
    """Groups of adapted layers that share a product with A; without joint LoRA, single layers."""
    if not is_joint:
        return [[layer] for layer in layers]
    groups: defaultdict[str, list[AdaptedLayer]] = defaultdict(list)
    for layer in layers:
        groups[input_of(layer.name)].append(layer)
    return list(groups.values())


def _num_document_kernels(shape: ModelShape, settings: RunSettings) -> int:
    """Kernel launches in a forward pass for each document of a pack."""
    if not attends_by_document(settings):
        return 0
    return shape.num_layers * (_SCORES_KERNELS if has_scores(shape, settings) else 1)
