"""Memory of the gradients of modules that are trained in full, at each moment of a step.

Their gradients are as large as their weights, and larger than ZeRO's buckets. The sizes below are
those of tensors at measured peaks (`python -m tests.bench.memory saved --explain`).
"""

from dataclasses import dataclass
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import LOGITS_CHUNK_BYTES
from pipeline.plan.given.adapter_counts import trainable_parameters
from pipeline.plan.given.fast_paths import has_one_reduction
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.given.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class SavedModuleGradients:
    """Bytes of temporary gradients, in addition to those that a rank accumulates."""

    of_earlier_chunks: int  # the head's gradients, summed over earlier chunks of the loss
    of_head: int  # in the backward pass of the head
    # Gradient of a tied head, which autograd keeps until the gradient of the embeddings is added.
    until_embeddings: int
    of_embeddings: int  # in the backward pass of the embeddings
    in_early_reduction: int  # during a reduction before the backward pass of the embeddings
    in_reduction: int  # during a reduction after it


def saved_module_gradients(
    shape: ModelShape, settings: RunSettings, layout: Layout
) -> SavedModuleGradients:
    """Temporary gradients of the modules that are trained in full.

    With one reduction a step, autograd casts each gradient to fp32 before it is accumulated. The
    sum of two gradients of one weight, from two chunks of the loss or from a tied head and its
    embeddings, is a third tensor.
    """
    b = layout.bytes_per_value
    is_reduced_once = has_one_reduction(settings, layout)
    summed = 4 if is_reduced_once else b
    alone = b + 4 if is_reduced_once and b < 4 else b
    modules = saved_modules(shape, settings)
    sizes = {module.is_head: module.parameters for module in modules}
    head, embeddings = sizes.get(True, 0), sizes.get(False, 0)
    is_tied = any(module.tied_name for module in modules)
    positions = layout.micro_batch_size * settings.max_length
    has_chunks = ceil(positions * shape.vocab_size * 4 / LOGITS_CHUNK_BYTES) > 1
    # DeepSpeed divides a gradient into the parts of the ranks, and reduces one part at a time, in a
    # copy. A gradient waits in the bucket until the gradient of the next parameter comes.
    trainable = trainable_parameters(shape, settings)
    part = min(max(head, embeddings), trainable // layout.world_size)
    copies = 4 if is_reduced_once or b == 4 else 4 + b
    waiting = 0 if is_reduced_once else b
    is_early = not is_reduced_once and not is_tied
    return SavedModuleGradients(
        of_earlier_chunks=summed * head if has_chunks else 0,
        of_head=head * (3 * summed if has_chunks else alone),
        until_embeddings=summed * head if is_tied else 0,
        of_embeddings=3 * summed * head if is_tied else alone * embeddings,
        in_early_reduction=waiting * head + copies * min(head, part) if is_early else 0,
        in_reduction=waiting * (head + embeddings) + copies * part,
    )
