"""Memory of the gradients of modules that are trained in full (`modules_to_save`), within a step.

These modules are the embeddings and the head. A gradient is as large as the weight, and larger than
ZeRO's reduce bucket. The formulas follow the tensors that were alive at measured peaks
(`python -m tests.bench.memory saved --explain` lists them).
"""

from dataclasses import dataclass
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.loss import LOGITS_CHUNK_BYTES
from pipeline.plan.given.adapter_counts import trainable_parameters
from pipeline.plan.given.fast_paths import has_one_reduction
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.given.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class SavedModuleGradients:
    """Bytes of temporary gradients, in addition to those that a rank accumulates.

    `of_earlier_chunks`: gradient of the head, summed over earlier chunks of the loss. `of_head`: in
    the backward pass of the head. `until_embeddings`: gradient of a tied head, which autograd keeps
    until it adds the gradient of the embeddings. `of_embeddings`: in the backward pass of the
    embeddings. `in_early_reduction`: while gradients are reduced before the backward pass of the
    embeddings. `in_reduction`: while gradients are reduced after it.
    """

    of_earlier_chunks: int
    of_head: int
    until_embeddings: int
    of_embeddings: int
    in_early_reduction: int
    in_reduction: int


def saved_module_gradients(
    shape: ModelShape, settings: RunSettings, layout: Layout
) -> SavedModuleGradients:
    """Temporary gradients of the modules that are trained in full.

    If gradients are reduced once per step (fast path ONE_REDUCTION), autograd casts each gradient
    to fp32 before it is accumulated. If the loss has several chunks, the gradient of each chunk is
    added to that of the earlier ones; if head and embeddings are tied, their gradients are added.
    Then two gradients and their sum exist at the same time.
    """
    b = layout.bytes_per_value
    is_reduced_once = has_one_reduction(settings, layout)
    # bytes per value of a gradient: of one that is summed with others, and of a single one
    summed = 4 if is_reduced_once else b
    single = b + 4 if is_reduced_once and b < 4 else b
    modules = saved_modules(shape, settings)
    sizes = {module.is_head: module.parameters for module in modules}
    head, embeddings = sizes.get(True, 0), sizes.get(False, 0)
    is_tied = any(module.tied_name for module in modules)
    positions = layout.micro_batch_size * settings.max_length
    has_chunks = ceil(positions * shape.vocab_size * 4 / LOGITS_CHUNK_BYTES) > 1
    # Each rank owns a part of all gradients. DeepSpeed copies and reduces one part at a time.
    trainable = trainable_parameters(shape, settings)
    part = min(max(head, embeddings), trainable // layout.world_size)
    copies = 4 if is_reduced_once or b == 4 else 4 + b  # bytes per value of the copies of a part
    # A gradient waits in the bucket until it is reduced.
    waiting = 0 if is_reduced_once else b  # bytes per value
    is_reduced_early = not is_reduced_once and not is_tied
    early_reduction = waiting * head + copies * min(head, part) if is_reduced_early else 0
    return SavedModuleGradients(
        of_earlier_chunks=summed * head if has_chunks else 0,
        of_head=head * (3 * summed if has_chunks else single),
        until_embeddings=summed * head if is_tied else 0,
        of_embeddings=3 * summed * head if is_tied else single * embeddings,
        in_early_reduction=early_reduction,
        in_reduction=waiting * (head + embeddings) + copies * part,
    )
