"""Bytes of activations: what blocks keep for their backward pass, and what it works with.

Counted from what autograd saves in transformers 5.23's blocks with peft 0.21's adapters on torch
2.13, tensor by tensor; docs/memory.md shows the count beside measured peaks.

b: bytes of a value in the training dtype, h: hidden size, i: inner size of the MLP, q and k: widths
of all query and all key heads, r: lora_r, B: sequences of a micro-batch, T: tokens of a sequence.
Frozen weights make the difference: a linear layer keeps its input only where an adapter reads it.
`attended`: tokens that a token's attention reaches over, those of its document in a pack, in the
mean; all T where it is None.
"""

from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

# Logits are made for this many bytes of fp32 at a time (model/loss.py).
LOGITS_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on one rank, for one micro-batch."""

    boundary: int  # what a checkpointed block keeps: its input
    block: int  # what a block keeps that is not checkpointed
    recomputed: int  # what it keeps while it is recomputed, beside its boundary
    block_working: int  # beside that, at the worst moment of its backward pass
    final_working: int  # of the backward pass of the last norm
    logits: int  # at the worst moment of the loss


def activations(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    tokens: int,
    supervised_share: float = 1.0,
    *,
    attended: int | None = None,
    is_cuda: bool,
) -> Activations:
    """Activations of micro-batches whose sequences have `tokens` tokens."""
    b, h = layout.bytes_per_value, shape.hidden_size
    count = layout.micro_batch_size * tokens
    inner = shape.intermediate_size + shape.experts_per_token * shape.expert_size
    # Beside the scores that are kept, softmax's gradient goes in and comes out in fp32; of a pack
    # one document at a time.
    reach, at_once = (tokens, count) if attended is None else (attended, attended)
    scores = shape.num_heads * reach * (8 - b) if has_scores(shape, settings) else 0
    boundary = count * h * b
    block = count * _kept(shape, settings, b, reach, mask_bytes=1 if is_cuda else b)
    # The first norm keeps the block's input itself, but for RMSNorm's copy of 16 bits in fp32.
    is_copied = shape.norm_kind == "rms" and b < 4
    return Activations(
        boundary=boundary,
        block=block,
        recomputed=block - (0 if is_copied else boundary),
        block_working=max(count * (2 * inner + 2 * h) * b, at_once * scores),
        # RMSNorm in fp32 has five tensors of its width at once; LayerNorm is one kernel
        final_working=count * h * (b + (20 if shape.norm_kind == "rms" else b)),
        logits=int(supervised_share * count) * h * b
        + _logits(shape, int(supervised_share * count)),
    )


def has_scores(shape: ModelShape, settings: RunSettings) -> bool:
    """Whether attention makes its scores: only FlashAttention-2 fuses a soft-cap of them."""
    return shape.score_softcap and settings.use_flash_attention is not True


def is_by_document(settings: RunSettings) -> bool:
    """Whether the documents of a pack are attended to one by one, and their outputs joined.

    FlashAttention-2 takes all of them at once.
    """
    return settings.packing and settings.use_flash_attention is not True


def _kept(shape: ModelShape, settings: RunSettings, b: int, reach: int, *, mask_bytes: int) -> int:
    """Bytes for one token that a block keeps until its backward pass."""
    adapter, n = adapter_counts(shape, settings), shape.num_layers
    kept = _norms(shape, b) + _attention(shape, settings, b, reach) + _mlp(shape, b)
    if is_by_document(settings):
        kept += _joined(shape, settings, b)
    kept += adapter.layers * settings.lora_r * b // n  # A's output, which B reads
    if settings.load_in_8bit:  # every layer keeps its input (bitsandbytes 0.50.2 MatMul8bitLt)
        kept += (2 * shape.hidden_size + shape.intermediate_size) * b
    if settings.lora_dropout > 0:  # each adapter has a dropped-out input of its own, and its mask
        return kept + adapter.input_width * (b + mask_bytes) // n
    if settings.load_in_8bit:
        return kept  # which is what the adapters read
    kept += adapter.blocks_reading_attention_input * shape.hidden_size * b // n
    kept += adapter.blocks_reading_mlp_input * shape.hidden_size * b // n
    # what the attention makes is kept by the attention itself
    return kept + adapter.product_width * b // n


def _norms(shape: ModelShape, b: int) -> int:
    """RMSNorm keeps its input in fp32 (transformers LlamaRMSNorm), LayerNorm as it is."""
    each = 4 if shape.norm_kind == "rms" else b
    heads = (shape.num_heads + shape.num_kv_heads) * shape.head_dim if shape.has_head_norms else 0
    return (shape.num_block_norms * shape.hidden_size + heads) * each


def _joined(shape: ModelShape, settings: RunSettings, b: int) -> int:
    """The outputs of a pack's documents joined into one tensor, where the next layer keeps it.

    Each attention keeps its own (model/attention.py); what made scores keeps no output, and that of
    a fused layer is copied with or without packs.
    """
    if has_scores(shape, settings) or shape.has_fused_attention:
        return 0
    blocks = adapter_counts(shape, settings).blocks_reading_attention_output
    if settings.load_in_8bit:
        blocks = shape.num_layers
    elif settings.lora_dropout > 0:
        blocks = 0
    return blocks * shape.num_heads * shape.head_dim * b // shape.num_layers


def _attention(shape: ModelShape, settings: RunSettings, b: int, reach: int) -> int:
    """Rotated q and k, v, the output and its normaliser.

    FlashAttention keeps no scores (arXiv 2205.14135 s.3). Where soft-capping needs the plain way,
    there are the capped scores, their softmax in fp32 and in the training dtype, for `reach` keys
    each, and keys and values repeated for every query head. Where one layer makes q, k and v
    (GPT-NeoX, Phi-3), v is a view of its whole output, and the attention's output is laid out by
    heads and copied for the next layer (measured).
    """
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    value = 2 * q + 2 * k if shape.has_fused_attention else k
    if has_scores(shape, settings):
        return (4 * q + k + value) * b + shape.num_heads * reach * (2 * b + 4)
    return (2 * q + k + value) * b + 4 * shape.num_heads


def _mlp(shape: ModelShape, b: int) -> int:
    """Gate, up and the activated gate; without a gate the input of the activation."""
    tensors = 3 if shape.is_gated else 1
    if shape.has_composed_activation:  # of several kernels, which keep three more
        tensors += 3
    dense = shape.intermediate_size * b * tensors
    if not shape.num_experts:
        return dense
    each = 3 * shape.expert_size + 2 * shape.hidden_size  # a token's copy in, and its answer
    return dense + shape.experts_per_token * each * b + 4 * shape.num_experts


def _logits(shape: ModelShape, positions: int) -> int:
    """Log-probabilities and two gradients in fp32; one tensor more under a soft-cap."""
    every = positions * shape.vocab_size * 4
    return min(every, LOGITS_CHUNK_BYTES) * (4 if shape.logit_softcap else 3)
