"""Activation memory: tensors that blocks save for backward, and temporary tensors of backward.

The formulas count the tensors that autograd saves in blocks of transformers 5.23 with adapters of
peft 0.21 on torch 2.13; docs/memory.md compares them with measured peaks. The backward pass of a
frozen linear layer does not need its input, so an input is saved only if an adapter reads it.

In the formulas b is the number of bytes per value in the training dtype; q and k are the total
widths of the query heads and of the key heads.
"""

from dataclasses import dataclass, replace
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import AdapterCounts, adapter_counts_by_kind
from pipeline.plan.given.block import Block
from pipeline.plan.given.fast_paths import has_fp32_kernels, has_joint_lora, has_loss_gradient
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.sequence_parallel import key_copies
from pipeline.plan.given.shape import ModelShape

# Logits are computed in chunks of this many bytes of fp32 (model/loss.py).
LOGITS_CHUNK_BYTES = 256 * 2**20
# Frozen weights are cast to fp32 in parts of this many values (model/fp32_kernels.py).
FP32_PART_VALUES = 2**20


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """Bytes of the activations of one block.

    `saved`: saved for backward if the block is not checkpointed. `recomputed`: saved while the
    checkpointed block is recomputed, in addition to its input. `working`: temporary tensors at the
    peak of its backward pass, in addition to saved ones.
    """

    saved: int
    recomputed: int
    working: int


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of activations on one rank for one micro-batch.

    `boundary`: input of one block, the only tensor that a checkpointed block saves. `blocks`: one
    entry for each kind of block, in the order of `ModelShape.blocks`. `final_working`: temporary
    tensors in the backward pass of the last norm. `logits`: tensors at the peak of the loss.
    """

    boundary: int
    blocks: tuple[BlockActivations, ...]
    final_working: int
    logits: int


@dataclass(frozen=True, kw_only=True)
class _BlockKind:
    """A kind of block with its adapters and the settings that change its activations.

    `count`: number of such blocks. `adapter`: sums over all of them. `reach`: number of tokens to
    which a token may attend, which is the length of its sequence, or of its document in a pack.
    `mask_bytes`: bytes per value of a dropout mask. `is_joint`: whether adapters are computed by
    the fast path JOINT_LORA. `group_size`: number of ranks that share each sequence. `num_tiles`:
    tiles of the MLP. `outside_mlp`: sums over the adapters of other layers. `has_fp32_kernels`:
    whether products and attention cast their tensors to fp32.
    """

    block: Block
    count: int
    adapter: AdapterCounts
    shape: ModelShape
    settings: RunSettings
    b: int
    reach: int
    mask_bytes: int
    is_joint: bool
    group_size: int
    num_tiles: int
    outside_mlp: AdapterCounts
    has_fp32_kernels: bool

    @property
    def key_copies(self) -> int:
        """Number of ranks of a group with the same key head."""
        return key_copies(self.block.num_kv_heads, self.group_size)

    @property
    def without_mlp(self) -> "_BlockKind":
        """The same block with an MLP that saves nothing."""
        block = replace(self.block, intermediate_size=0)
        return replace(self, block=block, adapter=self.outside_mlp)

    @property
    def has_scores(self) -> bool:
        """Whether attention scores are materialised."""
        return has_scores(self.shape, self.settings)


def activations(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    hardware: Hardware,
    sequences: SequenceProfile,
) -> Activations:
    """Activation memory of one micro-batch of `sequences`."""
    is_cuda = hardware.kind == "cuda"
    b, h = layout.bytes_per_value, shape.hidden_size
    tokens, group_size = int(sequences.tokens), layout.sequence_parallel_size
    count = layout.micro_batch_size * ceil(tokens / group_size)
    attended = None if sequences.attended is None else int(sequences.attended)
    supervised = int(sequences.supervised_share * count)
    is_rms = shape.blocks[0].norm_kind == "rms"
    boundary = count * h * b
    blocks = []
    adapters = adapter_counts_by_kind(shape, settings)
    outside_mlp = adapter_counts_by_kind(shape, settings, has_mlp=False)
    for (block, layers), adapter, outside in zip(
        shape.counts(), adapters, outside_mlp, strict=True
    ):
        kind = _BlockKind(
            block=block,
            count=layers,
            adapter=adapter,
            shape=shape,
            settings=settings,
            b=b,
            reach=tokens if attended is None else attended,
            mask_bytes=1 if is_cuda else b,
            is_joint=has_joint_lora(settings, is_sharded=layout.is_sharded),
            group_size=group_size,
            num_tiles=layout.mlp_tiles if block.has_tileable_mlp else 1,
            outside_mlp=outside,
            has_fp32_kernels=has_fp32_kernels(settings, layout, hardware),
        )
        per_token = _saved_per_token(kind)
        if kind.num_tiles > 1:  # only the MLP's input is saved
            per_token = _saved_per_token(kind.without_mlp) + block.hidden_size * b
        saved = count * per_token + _adapted_expert_bytes(kind) + _saved_weight_bytes(kind)
        # The first norm of a block saves the block's input itself, except that RMSNorm on 16-bit
        # values saves an fp32 copy.
        shares_input = not (is_rms and b < 4)
        blocks.append(
            BlockActivations(
                saved=saved,
                recomputed=saved - (boundary if shares_input else 0),
                working=_working_bytes(
                    kind, count, count if attended is None else ceil(attended / group_size)
                ),
            )
        )
    return Activations(
        boundary=boundary,
        blocks=tuple(blocks),
        # RMSNorm has five fp32 tensors of the hidden width at once, which are 20 bytes per value;
        # LayerNorm is one kernel.
        final_working=count * h * (b + (20 if is_rms else b)),
        logits=_loss_bytes(shape, settings, layout, supervised, is_cuda=is_cuda),
    )


def has_scores(shape: ModelShape, settings: RunSettings) -> bool:
    """Whether attention scores are materialised: soft-capped ones without FlashAttention-2."""
    return shape.score_softcap and settings.use_flash_attention is not True


def attends_by_document(settings: RunSettings) -> bool:
    """Whether each document of a pack is a separate attention call, with outputs concatenated.

    FlashAttention-2 takes all documents in one call.
    """
    return settings.packing and settings.use_flash_attention is not True


def _saved_per_token(kind: _BlockKind) -> int:
    """Bytes per token that a block saves for its backward pass."""
    block, adapter, settings, n, b = kind.block, kind.adapter, kind.settings, kind.count, kind.b
    if block.saved is None:
        saved = _norm_bytes(block, b) + _attention_bytes(kind) + _mlp_bytes(kind)
    else:
        values, other_bytes = block.saved
        saved = values * b + other_bytes + 2 * (kind.key_copies - 1) * block.key_width * b
    if attends_by_document(settings) or kind.group_size > 1:
        saved += _concatenated_bytes(kind)
    saved += adapter.inner_width * b // n  # the output of A, which B reads
    if settings.use_dora:  # the outputs of the base and of B, which the magnitude scales
        saved += 2 * adapter.output_width * b // n
    if adapter.adapted_experts:  # the gradient of an expert's weight needs the expert's input
        saved += _expert_inputs(block) * b
    if settings.load_in_8bit:  # every layer saves its input (bitsandbytes 0.50.2 MatMul8bitLt)
        saved += (2 * block.hidden_size + block.intermediate_size) * b
    shared_inputs = (
        adapter.blocks_reading_attention_input + adapter.blocks_reading_mlp_input
    ) * block.hidden_size
    if settings.lora_dropout > 0:  # adapters save their input after dropout, and the mask
        width = adapter.input_width
        if kind.is_joint:
            attention_output = adapter.blocks_reading_attention_output * block.query_width
            width = shared_inputs + attention_output + adapter.other_input_width
        return saved + width * (b + kind.mask_bytes) // n
    if settings.load_in_8bit:
        return saved  # adapters read the saved inputs
    # Adapters on the output projection read the attention output, which is already counted.
    return saved + (shared_inputs + adapter.other_input_width) * b // n


def _expert_inputs(block: Block) -> int:
    """Values per token that the projections of experts read.

    If the shape has no number counted on the model's class, the experts are assumed to be gated
    MLPs.
    """
    if block.saved_for_expert_adapters is not None:
        return block.saved_for_expert_adapters
    return block.experts_per_token * sum(tensor.d_in for tensor in block.experts)


def _adapted_expert_bytes(kind: _BlockKind) -> int:
    """Bytes of the adapted expert weights (weight + B A) that autograd saves in a block.

    peft 0.21.2 adds the adapter to each fused tensor in every forward pass (tuners/lora/layer.py
    _LoraFactorsProxy), and the matrix products of the experts save the sum.
    """
    return kind.adapter.adapted_experts * kind.b // max(1, kind.count)


def _saved_weight_bytes(kind: _BlockKind) -> int:
    """Bytes of dequantised weights that a block saves; they do not depend on the tokens.

    With dropout, peft's DoRA multiplies the input after dropout by the base weight once more. For
    this product it dequantises the weight, and autograd saves the dequantised copy (measured).
    """
    settings = kind.settings
    if not (settings.use_dora and settings.is_quantised and settings.lora_dropout > 0):
        return 0
    return kind.adapter.base_weights * kind.b // kind.count


def _norm_bytes(block: Block, b: int) -> int:
    """Bytes per token saved by norms.

    RMSNorm saves its input in fp32 (LlamaRMSNorm), LayerNorm saves it in the training dtype.
    """
    value_bytes = 4 if block.norm_kind == "rms" else b
    heads = block.query_width + block.key_width if block.has_head_norms else 0
    return (block.num_norms * block.hidden_size + heads) * value_bytes


def _concatenated_bytes(kind: _BlockKind) -> int:
    """Bytes per token of the concatenated attention outputs of a pack's documents, if saved.

    The output projection saves this tensor if an adapter reads it. With fused kernels it is an
    additional tensor, because each attention call saves its own output too (model/attention.py).
    The output that a group's second all-to-all returns is such a tensor too.
    The result is 0 in two cases in which `_attention_bytes` counts the tensor already: with
    materialised scores, where no call saves its output, and after a fused q-k-v layer, where the
    output is copied with or without packing.
    """
    block, settings = kind.block, kind.settings
    if kind.has_scores or block.has_fused_attention:
        return 0
    blocks = kind.adapter.blocks_reading_attention_output
    if settings.load_in_8bit:
        blocks = kind.count
    elif settings.lora_dropout > 0:
        blocks = 0
    return blocks * block.query_width * kind.b // kind.count


def _attention_bytes(kind: _BlockKind) -> int:
    """Bytes per token saved by attention: rotated q and k, v, the output and the log-sum-exp.

    FlashAttention saves no scores (arXiv 2205.14135 s.3). Without it, soft-capped attention saves
    the capped scores, and their softmax in fp32 and in the training dtype, each with `reach` values
    per token and head. It also saves keys and values repeated for every query head. If one layer
    computes q, k and v (GPT-NeoX, Phi-3), v is a view that keeps the whole output of this layer.
    Then the attention output also exists twice: by heads, and as a copy for the next layer
    (measured).
    """
    block, b = kind.block, kind.b
    q, k = block.query_width, block.key_width * kind.key_copies
    value = k
    if block.has_fused_attention:  # in a group v is received, not a view
        value = 2 * q + 2 * k if kind.group_size == 1 else k + q
    if kind.has_scores:
        return (4 * q + k + value) * b + block.num_heads * kind.reach * (2 * b + 4)
    return (2 * q + k + value) * b + 4 * block.num_heads


def _mlp_bytes(kind: _BlockKind) -> int:
    """Bytes per token saved by the MLP and by experts.

    A gated MLP saves the gate, the activated gate and the up projection; an MLP without a gate
    saves the input of its activation.
    """
    block, b = kind.block, kind.b
    tensors = 3 if block.is_gated else 1
    if kind.shape.has_composed_activation:  # its operators save three more tensors
        tensors += 3
    dense = block.intermediate_size * b * tensors
    if not block.num_experts:
        return dense
    # an expert also saves a copy of its token's hidden state, and its own output
    each = 3 * block.expert_size + 2 * block.hidden_size
    return dense + block.experts_per_token * each * b + 4 * block.num_experts


def _working_bytes(kind: _BlockKind, count: int, at_once: int) -> int:
    """Bytes of temporary tensors in a block's backward pass, for `count` tokens.

    With materialised scores, the gradients of softmax's input and output are in fp32. They exist
    for `at_once` tokens at a time: one document of a pack, or the whole micro-batch.
    """
    block, b = kind.block, kind.b
    inner = block.intermediate_size + block.experts_per_token * block.expert_size
    scores = block.num_heads * kind.reach * (8 - b) if kind.has_scores else 0
    gradient = kind.adapter.largest_expert_tensor * b  # of one adapted expert tensor
    exchanged = 0
    if kind.group_size > 1:  # gradients of q, k and v: by heads, sent, received and by tokens
        exchanged = count * 4 * (block.query_width + 2 * block.key_width * kind.key_copies) * b
    mlp = count * (2 * inner + 2 * block.hidden_size) * b
    if kind.num_tiles > 1:
        mlp = _tiled_working_bytes(kind, count)
    casts_in_mlp, in_attention = _cast_bytes(kind, count, at_once)
    return max(mlp + casts_in_mlp + gradient, at_once * scores, exchanged, in_attention)


def _cast_bytes(kind: _BlockKind, count: int, at_once: int) -> tuple[int, int]:
    """Bytes of fp32 tensors with the fast path FP32_KERNELS, in an MLP and in attention.

    In the backward pass of a linear layer they are its gradients and a part of its weight. In that
    of attention they are query, key, value and output with their gradients; then the tensors that
    the MLP saved are freed.
    """
    if not kind.has_fp32_kernels:
        return 0, 0
    block, tokens = kind.block, -(-count // kind.num_tiles)
    weight = block.intermediate_size * block.hidden_size
    of_linear = 0
    if not kind.settings.is_quantised:
        of_linear = tokens * 4 * (block.intermediate_size + block.hidden_size)
        of_linear += 4 * min(weight, FP32_PART_VALUES)
    freed = _saved_per_token(kind) - _saved_per_token(kind.without_mlp)
    of_attention = at_once * 16 * (block.query_width + block.key_width * kind.key_copies)
    return of_linear, of_attention - count * freed


def _tiled_working_bytes(kind: _BlockKind, count: int) -> int:
    """Bytes of temporary tensors in the backward pass of a block with a tiled MLP.

    In the MLP's backward pass they are the tensors of one tile, the gradients of the output and of
    the input for all tokens, and the gradients of the MLP's adapters in fp32. After it the norm
    before the MLP needs more than attention: an RMSNorm has five fp32 tensors and the gradient of
    its output.
    """
    block, b = kind.block, kind.b
    of_mlp = _saved_per_token(kind) - _saved_per_token(kind.without_mlp)
    tile = -(-count // kind.num_tiles)
    adapters = 4 * (kind.adapter.parameters - kind.outside_mlp.parameters) // max(1, kind.count)
    in_mlp = tile * (of_mlp + 2 * block.intermediate_size * b) + adapters
    in_norm = count * block.hidden_size * (20 + b) if block.norm_kind == "rms" else 0
    return max(2 * count * block.hidden_size * b + in_mlp, in_norm)


def _loss_bytes(
    shape: ModelShape, settings: RunSettings, layout: Layout, positions: int, *, is_cuda: bool
) -> int:
    """Bytes at the peak of the loss: hidden states, and logits-sized tensors of one chunk.

    The plain loss has three logits-sized tensors in fp32: the log-probabilities and two gradients.
    Soft-capped logits are a fourth. The gradient may also be computed in the forward pass
    (model/loss_gradient.py). Then only the log-probabilities are in fp32, the other logits-sized
    tensors are in the training dtype, and the gradient of the hidden states is added. On a CPU the
    operator of the log-probabilities also casts its input to fp32.
    """
    b = layout.bytes_per_value
    hidden = positions * shape.hidden_size * b
    logits = min(positions * shape.vocab_size, LOGITS_CHUNK_BYTES // 4)
    if not has_loss_gradient(shape, settings, layout):
        return hidden + logits * 4 * (4 if shape.logit_softcap else 3)
    graph = 2 * b if shape.logit_softcap else b
    cast = 0 if b == 4 else b if is_cuda else 4
    backward = 3 * b if shape.logit_softcap else b  # gradients of the logits that exist at once
    return 2 * hidden + logits * (graph + max(4 + cast, backward))
