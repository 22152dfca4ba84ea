"""Memory of the loss: hidden states of supervised tokens, and logits, which exist in chunks."""

from pipeline.config.settings import RunSettings
from pipeline.plan.given.fast_paths import FP32_PART_VALUES, has_fp32_kernels, has_loss_gradient
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

# Logits are computed in chunks of this many bytes of fp32 (model/loss.py).
LOGITS_CHUNK_BYTES = 256 * 2**20


def loss_bytes(
    shape: ModelShape, settings: RunSettings, layout: Layout, positions: int, hardware: Hardware
) -> int:
    """Bytes at the peak of the loss: hidden states, and logits-sized tensors of one chunk.

    `positions`: number of tokens with labels; only these have logits. The loss is computed in
    chunks of positions.

    The plain loss has three logits-sized tensors in fp32: the log-probabilities and two gradients.
    Soft-capped logits are a fourth. If the fast path LOSS_GRADIENT is on, the gradient is computed
    in the forward pass (model/loss_gradient.py). Then only the log-probabilities are in fp32, the
    other logits-sized tensors are in the training dtype, and the gradient of the hidden states is
    added. On a CPU, log-softmax also casts its input to fp32.

    With the fast path FP32_KERNELS the head casts to fp32 in its backward pass: a part of its
    weight, the columns of the logits' gradient for this part, and the gradient of its input.
    """
    b, h, is_cuda = layout.bytes_per_value, shape.hidden_size, hardware.kind == "cuda"
    hidden = positions * h * b
    logits = min(positions * shape.vocab_size, LOGITS_CHUNK_BYTES // 4)
    head_casts = 0
    if has_fp32_kernels(settings, layout, hardware):
        in_chunk, rows = logits // shape.vocab_size, min(shape.vocab_size, FP32_PART_VALUES // h)
        head_casts = 4 * (rows * h + in_chunk * (rows + h))
    if not has_loss_gradient(shape, settings, layout):
        plain = logits * 4 * (4 if shape.has_logit_softcap else 3)
        return hidden + max(plain, b * logits + head_casts)
    # bytes per logit: tensors that autograd saves, the cast of log-softmax, gradients at one time
    saved = 2 * b if shape.has_logit_softcap else b
    cast = 0
    if b < 4:
        cast = b if is_cuda else 4
    gradients = 3 * b if shape.has_logit_softcap else b
    in_head = b * logits + head_casts
    return 2 * hidden + logits * saved + max(logits * (4 + cast), logits * gradients, in_head)
