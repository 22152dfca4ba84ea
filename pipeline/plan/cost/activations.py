"""Activation memory: tensors that blocks save for backward, and temporary tensors of backward.

The formulas count the tensors that autograd saves in blocks of transformers 5.23 with adapters of
peft 0.21 on torch 2.13. docs/memory.md compares them with measured peaks. The backward pass of a
frozen linear layer does not need the layer's input, so an input is saved only if an adapter reads
it.

In the formulas b is the number of bytes per value in the training dtype; q and k are the total
widths of the query heads and of the key heads. Attention scores are "materialised" if they are a
tensor in memory, which fused attention kernels avoid. A "group" is a sequence-parallel group: its
ranks share each sequence.
"""

from dataclasses import dataclass, replace
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.loss import loss_bytes
from pipeline.plan.given.adapter_counts import AdapterCounts, adapter_counts_by_kind
from pipeline.plan.given.block import Block
from pipeline.plan.given.fast_paths import FP32_PART_VALUES, has_fp32_kernels, has_joint_lora
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.sequence_parallel import key_copies
from pipeline.plan.given.shape import ModelShape

# Inputs of checkpointed blocks on the device if they are offloaded (model/host_activations.py).
INPUTS_ON_DEVICE = 2


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """Bytes of the activations of one block.

    `saved`: tensors saved for backward if the block is not checkpointed. `recomputed`: tensors
    saved while the block is recomputed, if it is checkpointed, in addition to its input. `working`:
    temporary tensors at the peak of its backward pass, in addition to saved ones; if the MLP is
    tiled, after the MLP's backward pass. `in_tiles`: temporary tensors in the backward pass of a
    tiled MLP; 0 without tiles.
    """

    saved: int
    recomputed: int
    working: int
    in_tiles: int


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of activations on one rank for one micro-batch.

    `of_tokens`: ids and labels of the whole sequences, positions of the tokens that predict a
    supervised one, and the positions and rotary embeddings of this rank's tokens. `block_input`:
    input of one block, the only tensor that a checkpointed block saves. `blocks`:
    one entry for each kind of block, in the order of `ModelShape.blocks`. `final_working`:
    temporary tensors in the backward pass of the model's last norm. `logits`: tensors at the peak
    of the loss.
    """

    of_tokens: int
    block_input: int
    blocks: tuple[BlockActivations, ...]
    final_working: int
    logits: int


@dataclass(frozen=True, kw_only=True)
class _BlockKind:
    """A kind of block with its adapters and the settings that change its activations.

    `count`: number of blocks of this kind. `adapter`: sizes of their adapters, summed over these
    blocks. `outside_mlp`: the same sums without the adapters in MLPs. `b`: bytes per value in the
    training dtype. `reach`: number of tokens to which a token may attend, which is the length of
    its sequence, or of its document in a pack. `mask_bytes`: bytes per value of a dropout mask.
    `is_joint`: whether adapters with the same input are computed together (model/joint_lora.py).
    `group_size`: number of ranks that share each sequence. `num_tiles`: number of tiles that the
    MLP computes one after another. `has_fp32_kernels`: whether matrix products and attention cast
    their bf16 tensors to fp32 (model/fp32_kernels.py). `is_reentrant`: see `_is_reentrant`.
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
    is_reentrant: bool

    @property
    def key_copies(self) -> int:
        """Number of ranks of a group that hold the same key head."""
        return key_copies(self.block.num_kv_heads, self.group_size)

    @property
    def without_mlp(self) -> "_BlockKind":
        """The same block as if its MLP and the MLP's adapters saved nothing."""
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
    num_tokens = layout.micro_batch_size * ceil(tokens / group_size)  # of a micro-batch on a rank
    attended = None if sequences.attended is None else int(sequences.attended)
    # Tokens whose attention scores exist at the same time, if scores are materialised.
    scored_tokens = num_tokens if attended is None else ceil(attended / group_size)
    is_rms = shape.blocks[0].norm_kind == "rms"
    block_input = num_tokens * max(block.input_width for block in shape.blocks) * b
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
            is_reentrant=_is_reentrant(layout),
        )
        per_token = _saved_per_token(kind)
        if kind.num_tiles > 1:  # of a tiled MLP, only the input is saved
            per_token = _saved_per_token(kind.without_mlp) + block.hidden_size * b
        saved = num_tokens * per_token + _adapted_expert_bytes(kind) + _saved_weight_bytes(kind)
        # The first norm of a block saves the block's input itself, except that RMSNorm on 16-bit
        # values saves an fp32 copy.
        shares_input = not (is_rms and b < 4)
        blocks.append(
            BlockActivations(
                saved=saved,
                recomputed=saved - (block_input if shares_input else 0),
                working=_working_bytes(kind, num_tokens, scored_tokens),
                in_tiles=_bytes_in_tiles(kind, num_tokens) if kind.num_tiles > 1 else 0,
            )
        )
    supervised = int(sequences.supervised_share * num_tokens)
    return Activations(
        of_tokens=8 * (2 * layout.micro_batch_size * tokens + supervised + num_tokens)
        + 2 * num_tokens * max(block.head_dim for block in shape.blocks) * b,
        block_input=block_input,
        blocks=tuple(blocks),
        # RMSNorm has five fp32 tensors of the hidden width at once, and in 16 bits the gradient
        # that is cast to fp32; LayerNorm is one kernel.
        final_working=num_tokens * h * ((20 + b * (b < 4)) if is_rms else 2 * b),
        logits=loss_bytes(shape, settings, layout, supervised, hardware),
    )


@dataclass(frozen=True, kw_only=True)
class KeptActivations:
    """Bytes of activations that a rank keeps for its backward pass.

    `at_loss`: before the backward pass. `in_first_block`: in the backward pass of the last block,
    with which it begins, or of the last checkpointed one, which is recomputed. `in_later_block`: in
    that of the block before it. `input_of_tiles`: a tiled MLP's input, which is freed after the
    MLP's backward pass.
    """

    at_loss: int
    in_first_block: int
    in_later_block: int
    input_of_tiles: int


def kept_activations(
    shape: ModelShape, layout: Layout, acts: Activations, *, is_cuda: bool
) -> KeptActivations:
    """Activations at the moments of a backward pass.

    The backward pass may have its peak at its start, when all blocks that are not checkpointed hold
    their activations. Or it has its peak later, when these activations are freed and a checkpointed
    block is recomputed.
    """
    num_inputs = layout.checkpointed_layers
    if layout.offload_activations and is_cuda:
        # Also the input of the first block: it needs a gradient, so the graph keeps it.
        num_inputs = min(num_inputs, INPUTS_ON_DEVICE + 1)
    elif layout.offload_activations:  # a CPU has no other memory; one input is copied back
        num_inputs += 2
    inputs = acts.of_tokens + num_inputs * acts.block_input
    # number of blocks of each kind that are not checkpointed
    not_checkpointed = [count for _, count in shape.counts(start=layout.checkpointed_layers)]
    saved = sum(
        count * block.saved for count, block in zip(not_checkpointed, acts.blocks, strict=True)
    )
    output = acts.block_input if _is_reentrant(layout) else 0
    recomputed = [
        block.recomputed + output
        for (_, count), num_not_checkpointed, block in zip(
            shape.counts(), not_checkpointed, acts.blocks, strict=True
        )
        if count > num_not_checkpointed  # some blocks of this kind are checkpointed
    ]
    last, is_last_checkpointed = acts.blocks[shape.layer_kinds[-1]], not sum(not_checkpointed)
    later = max(saved - (0 if is_last_checkpointed else last.saved), *recomputed, 0)
    is_tiled = any(block.in_tiles for block in acts.blocks)
    return KeptActivations(
        at_loss=inputs + saved,
        in_first_block=inputs + max(saved, *recomputed, 0),
        in_later_block=inputs + later - (acts.block_input if is_last_checkpointed else 0),
        input_of_tiles=acts.block_input if is_tiled else 0,
    )


def _is_reentrant(layout: Layout) -> bool:
    """Whether checkpointing is re-entrant (train/engine.py).

    Then the output of a recomputed block and its gradient stay until the end of the block's
    backward pass (measured).
    """
    return layout.is_sharded and layout.checkpointed_layers > 0


def has_scores(shape: ModelShape, settings: RunSettings) -> bool:
    """Whether attention scores are materialised.

    Only soft-capped scores (Gemma 2) are, unless FlashAttention-2 computes them.
    """
    return shape.has_score_softcap and settings.use_flash_attention is not True


def attends_by_document(settings: RunSettings) -> bool:
    """Whether attention is called once for each document of a pack.

    The outputs of the calls are then concatenated. FlashAttention-2 takes all documents in one
    call.
    """
    return settings.packing and settings.use_flash_attention is not True


def _saved_per_token(kind: _BlockKind) -> int:
    """Bytes per token that a block saves for its backward pass."""
    block, adapter, settings, b = kind.block, kind.adapter, kind.settings, kind.b
    n = kind.count  # `adapter` has sums over n blocks
    if block.saved is None:
        saved = _norm_bytes(block, b) + _attention_bytes(kind) + _mlp_bytes(kind)
    else:  # derived from the model's class, for a group of one rank
        values, other_bytes = block.saved
        more_keys_and_values = (kind.key_copies - 1) * block.keys_and_values_width
        saved = (values + more_keys_and_values) * b + other_bytes
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
        if kind.is_joint:  # adapters with the same input share its dropout
            attention_output = adapter.blocks_reading_attention_output * block.query_width
            width = shared_inputs + attention_output + adapter.other_input_width
        return saved + width * (b + kind.mask_bytes) // n
    if settings.load_in_8bit:
        return saved  # adapters read the saved inputs
    # Adapters on the output projection read the attention output, which is already counted.
    return saved + (shared_inputs + adapter.other_input_width) * b // n


def _expert_inputs(block: Block) -> int:
    """Values per token that the projections of experts read.

    If the model's class was built to count its sizes, these values have been counted too. Otherwise
    an expert is a gated MLP, each projection of which reads `d_in` values.
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
    """Bytes per token of a second copy of the attention output that a block saves; 0 if none is.

    The outputs of attention for the documents of a pack are concatenated (model/attention.py). The
    output projection saves the concatenated tensor if an adapter reads it. Each call of a fused
    kernel saves its own output too. In a group, the output of the second all-to-all is such a
    second copy.

    `_attention_bytes` counts the concatenated tensor already in two cases: if scores are
    materialised, because then no call saves its output, and if one layer computes q, k and v,
    because then the output is always copied.
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

    Fused kernels save no scores (FlashAttention, arXiv 2205.14135 s.3). With materialised scores,
    attention saves the soft-capped scores, and their softmax in fp32 and in the training dtype,
    each with `reach` values per token and head. It also saves keys and values repeated for every
    query head.

    If one layer computes q, k and v (GPT-NeoX, Phi-3), v is a view, which keeps the whole output of
    this layer in memory. Then the attention output also exists twice: by heads, and as a copy for
    the next layer (measured).
    """
    block, b = kind.block, kind.b
    q, k = block.query_width, block.key_width * kind.key_copies
    value = k
    if block.has_fused_attention:  # in a group, v is the result of an all-to-all and no view
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
    # An expert also saves a copy of its token's hidden state, and its own output. The router saves
    # the fp32 scores of all experts.
    per_expert = 3 * block.expert_size + 2 * block.hidden_size
    return dense + block.experts_per_token * per_expert * b + 4 * block.num_experts


def _working_bytes(kind: _BlockKind, num_tokens: int, scored_tokens: int) -> int:
    """Bytes of temporary tensors in a block's backward pass, for `num_tokens` tokens.

    If scores are materialised, the gradients of softmax's input and output are in fp32. They exist
    for `scored_tokens` tokens at a time: one document of a pack, or the whole micro-batch.
    """
    block, b = kind.block, kind.b
    inner = block.intermediate_size + block.experts_per_token * block.expert_size
    scores = block.num_heads * kind.reach * (8 - b) if kind.has_scores else 0
    gradient = kind.adapter.largest_expert_tensor * b  # gradient of one adapted expert tensor
    mlp_per_token = _saved_per_token(kind) - _saved_per_token(kind.without_mlp)
    exchanged = 0
    if kind.group_size > 1:  # gradients of q, k and v: by heads, sent, received and by tokens
        keys_and_values = block.keys_and_values_width * kind.key_copies
        exchanged = 4 * (block.num_heads * block.key_dim + keys_and_values) * b
        # The tensors of attention and of the MLP are freed, the input of the norm before it and the
        # input of the output projection; gradients of the width of the residual are left.
        freed = (4 if block.norm_kind == "rms" else b) * block.hidden_size
        freed += _attention_bytes(kind) + _concatenated_bytes(kind)
        freed += 0 if kind.num_tiles > 1 else mlp_per_token
        gradients = 2 if kind.is_reentrant else 1  # of the residual and of the block's output
        exchanged = num_tokens * (exchanged + gradients * block.hidden_size * b - freed)
    # The gradients of the MLP's output, of the activated gate and of the up projection. A counted
    # class may slice or concatenate these, so that their gradients exist twice (measured: GLM 4,
    # gpt-oss), or have a norm after the MLP, whose backward pass needs no more.
    inner_gradients = 2 if block.saved is None else 4
    mlp = num_tokens * (inner_gradients * inner + block.input_width) * b
    if kind.num_tiles > 1:  # the norm before it: five fp32 tensors, and the residual's gradient
        mlp = num_tokens * block.hidden_size * (20 + b) if block.norm_kind == "rms" else 0
    casts_in_mlp, in_attention = _cast_bytes(kind, num_tokens, scored_tokens)
    return max(mlp + casts_in_mlp + gradient, scored_tokens * scores, exchanged, in_attention)


def _cast_bytes(kind: _BlockKind, num_tokens: int, attention_tokens: int) -> tuple[int, int]:
    """Bytes of fp32 tensors with the fast path FP32_KERNELS, in an MLP and in attention.

    In the backward pass of a linear layer these are the gradients of its input and output, and a
    part of its weight. In the backward pass of attention they are query, key, value and output with
    their gradients, for `attention_tokens` tokens at a time: one document of a pack, or the whole
    micro-batch. Then the tensors that the MLP saved are already freed.
    """
    if not kind.has_fp32_kernels:
        return 0, 0
    block, tile_tokens = kind.block, ceil(num_tokens / kind.num_tiles)
    weight = block.intermediate_size * block.hidden_size
    linear_bytes = 0
    if not kind.settings.is_quantised:
        linear_bytes = tile_tokens * 4 * (block.intermediate_size + block.hidden_size)
        linear_bytes += 4 * min(weight, FP32_PART_VALUES)
    freed = _saved_per_token(kind) - _saved_per_token(kind.without_mlp)
    heads_width = block.query_width + block.key_width * kind.key_copies
    return linear_bytes, attention_tokens * 16 * heads_width - num_tokens * freed


def _bytes_in_tiles(kind: _BlockKind, num_tokens: int) -> int:
    """Bytes of temporary tensors in the backward pass of a tiled MLP.

    They are the tensors of one tile, the gradients of the MLP's output and input for all tokens,
    and the gradients of the MLP's adapters in fp32.
    """
    block, b = kind.block, kind.b
    mlp_per_token = _saved_per_token(kind) - _saved_per_token(kind.without_mlp)
    tile_tokens = ceil(num_tokens / kind.num_tiles)
    tile = tile_tokens * (mlp_per_token + 2 * (block.intermediate_size + block.hidden_size) * b)
    output_and_input = 2 * num_tokens * block.hidden_size * b
    mlp_adapters = kind.adapter.parameters - kind.outside_mlp.parameters
    adapter_gradients = 4 * mlp_adapters // max(1, kind.count)
    casts = _cast_bytes(kind, num_tokens, 0)[0]
    return output_and_input + tile + adapter_gradients + casts
