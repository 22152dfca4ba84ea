"""Bytes of activations: saved by blocks for their backward pass, and its working set.

Counted from what autograd saves in transformers 5.23's blocks with peft 0.21's adapters on torch
2.13, tensor by tensor; docs/memory.md compares the counts with measured peaks.

b: bytes of a value in the training dtype, h: hidden size, i: inner size of the MLP, q and k: widths
of all query and all key heads, r: lora_r, B: sequences of a micro-batch, T: tokens of a sequence.
Frozen weights make the difference: a linear layer saves its input only where an adapter reads it.
"""

from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import AdapterCounts, adapter_counts_by_kind
from pipeline.plan.given.block import Block
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import ModelShape

# Logits are computed in chunks of this many bytes of fp32 (model/loss.py).
LOGITS_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """Bytes of one block of a kind."""

    saved: int  # for backward, where the block is not checkpointed
    recomputed: int  # saved while a checkpointed block is recomputed, beside its input
    working: int  # beside that, at the worst moment of its backward pass


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on one rank for one micro-batch; `blocks` in the order of `ModelShape.blocks`."""

    boundary: int  # input of a block, all that a checkpointed block saves
    blocks: tuple[BlockActivations, ...]
    final_working: int  # in the backward pass of the last norm
    logits: int  # at the worst moment of the loss


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of block with its adapters, in a run."""

    block: Block
    count: int
    adapter: AdapterCounts  # of all `count` blocks
    shape: ModelShape
    settings: RunSettings
    b: int
    reach: int  # tokens that a token's attention covers
    mask_bytes: int  # of a value of a dropout mask

    @property
    def has_scores(self) -> bool:
        """Whether attention scores are materialised."""
        return has_scores(self.shape, self.settings)


def activations(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    sequences: SequenceProfile,
    *,
    is_cuda: bool,
) -> Activations:
    """Activations of micro-batches of such sequences."""
    b, h = layout.bytes_per_value, shape.hidden_size
    tokens = int(sequences.tokens)
    count = layout.micro_batch_size * tokens
    attended = None if sequences.attended is None else int(sequences.attended)
    supervised = int(sequences.supervised_share * count)
    is_rms = shape.blocks[0].norm_kind == "rms"
    boundary = count * h * b
    blocks = []
    adapters = adapter_counts_by_kind(shape, settings)
    for (block, layers), adapter in zip(shape.counts(), adapters, strict=True):
        kind = _Kind(
            block=block,
            count=layers,
            adapter=adapter,
            shape=shape,
            settings=settings,
            b=b,
            reach=tokens if attended is None else attended,
            mask_bytes=1 if is_cuda else b,
        )
        saved = count * _saved(kind)
        # The first norm saves the block's input itself, except for RMSNorm's fp32 copy of 16 bits.
        shares_input = not (is_rms and b < 4)
        blocks.append(
            BlockActivations(
                saved=saved,
                recomputed=saved - (boundary if shares_input else 0),
                working=_working(kind, count, count if attended is None else attended),
            )
        )
    return Activations(
        boundary=boundary,
        blocks=tuple(blocks),
        # RMSNorm in fp32 has five tensors of its width at once; LayerNorm is one kernel
        final_working=count * h * (b + (20 if is_rms else b)),
        logits=supervised * h * b + _logits(shape, supervised),
    )


def has_scores(shape: ModelShape, settings: RunSettings) -> bool:
    """Whether attention scores are materialised: only FlashAttention-2 fuses a soft-cap of them."""
    return shape.score_softcap and settings.use_flash_attention is not True


def is_by_document(settings: RunSettings) -> bool:
    """Whether each document of a pack is a separate attention call, with outputs concatenated.

    FlashAttention-2 takes all documents in one call.
    """
    return settings.packing and settings.use_flash_attention is not True


def _saved(kind: _Kind) -> int:
    """Bytes a token that a block saves until its backward pass."""
    block, adapter, settings, n, b = kind.block, kind.adapter, kind.settings, kind.count, kind.b
    if block.saved is None:
        saved = _norms(block, b) + _attention(kind) + _mlp(kind)
    else:
        values, other_bytes = block.saved
        saved = values * b + other_bytes
    if is_by_document(settings):
        saved += _concatenated(kind)
    saved += adapter.layers * settings.lora_r * b // n  # A's output, which B reads
    if settings.load_in_8bit:  # every layer saves its input (bitsandbytes 0.50.2 MatMul8bitLt)
        saved += (2 * block.hidden_size + block.intermediate_size) * b
    if settings.lora_dropout > 0:  # each adapter has its own dropped-out input, and a mask
        return saved + adapter.input_width * (b + kind.mask_bytes) // n
    if settings.load_in_8bit:
        return saved  # adapters read the saved inputs
    saved += adapter.blocks_reading_attention_input * block.hidden_size * b // n
    saved += adapter.blocks_reading_mlp_input * block.hidden_size * b // n
    # the output of attention is saved by attention itself
    return saved + adapter.product_width * b // n


def _norms(block: Block, b: int) -> int:
    """RMSNorm saves its input in fp32 (transformers LlamaRMSNorm), LayerNorm as it is."""
    each = 4 if block.norm_kind == "rms" else b
    heads = block.query_width + block.key_width if block.has_head_norms else 0
    return (block.num_norms * block.hidden_size + heads) * each


def _concatenated(kind: _Kind) -> int:
    """The concatenated outputs of a pack's documents, where the next layer saves them.

    Each attention call saves its own output (model/attention.py); with materialised scores none
    does, and that of a fused layer is copied with or without packs.
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


def _attention(kind: _Kind) -> int:
    """Rotated q and k, v, the output and its normaliser.

    FlashAttention saves no scores (arXiv 2205.14135 s.3). Soft-capped without it, there are the
    capped scores, their softmax in fp32 and in the training dtype, for `reach` keys each, and keys
    and values repeated for every query head. Where one layer makes q, k and v (GPT-NeoX, Phi-3), v
    is a view of its whole output, and the attention's output is laid out by heads and copied for
    the next layer (measured).
    """
    block, b = kind.block, kind.b
    q, k = block.query_width, block.key_width
    value = 2 * q + 2 * k if block.has_fused_attention else k
    if kind.has_scores:
        return (4 * q + k + value) * b + block.num_heads * kind.reach * (2 * b + 4)
    return (2 * q + k + value) * b + 4 * block.num_heads


def _mlp(kind: _Kind) -> int:
    """Gate, up and the activated gate; without a gate the input of the activation."""
    block, b = kind.block, kind.b
    tensors = 3 if block.is_gated else 1
    if kind.shape.has_composed_activation:  # several operators, which save three more
        tensors += 3
    dense = block.intermediate_size * b * tensors
    if not block.num_experts:
        return dense
    each = 3 * block.expert_size + 2 * block.hidden_size  # a token's copy in, and its output
    return dense + block.experts_per_token * each * b + 4 * block.num_experts


def _working(kind: _Kind, count: int, at_once: int) -> int:
    """Bytes of a block's backward pass beside what it saved, for `count` tokens.

    With materialised scores softmax's gradient is in fp32 at its input and output; for a pack one
    document (`at_once` tokens) at a time.
    """
    block, b = kind.block, kind.b
    inner = block.intermediate_size + block.experts_per_token * block.expert_size
    scores = block.num_heads * kind.reach * (8 - b) if kind.has_scores else 0
    return max(count * (2 * inner + 2 * block.hidden_size) * b, at_once * scores)


def _logits(shape: ModelShape, positions: int) -> int:
    """Log-probabilities and two gradients in fp32; one tensor more under a soft-cap."""
    logits = positions * shape.vocab_size * 4
    return min(logits, LOGITS_CHUNK_BYTES) * (4 if shape.logit_softcap else 3)
