"""Fast paths: faster computations with the same results, and the conditions to use each.

Without a fast path a run uses the computation of transformers, peft or DeepSpeed.
"""

from pipeline.config.settings import RunSettings
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.saved_modules import trained_head
from pipeline.plan.given.shape import ModelShape

# The gradient of the loss is computed in the forward pass (model/loss_gradient.py).
LOSS_GRADIENT = "loss_gradient_in_forward"
# LoRA layers that read the same input multiply it by all of their A matrices at once
# (model/joint_lora.py).
JOINT_LORA = "joint_lora"
# Gradients are reduced over ranks once a step, not after each micro-batch (train/reduction.py).
ONE_REDUCTION = "one_reduction_a_step"
# bf16 tensors are multiplied in fp32 kernels (model/fp32_kernels.py).
FP32_KERNELS = "fp32_kernels"
# Then frozen weights are cast to fp32 in parts of this many values.
FP32_PART_VALUES = 2**20


def fast_paths(
    shape: ModelShape, settings: RunSettings, layout: Layout, hardware: Hardware
) -> dict[str, str]:
    """Name of each fast path -> the reason why it is off; an empty text if it is on."""
    reasons = {
        LOSS_GRADIENT: _without_loss_gradient(shape, settings, layout),
        JOINT_LORA: _without_joint_lora(settings, is_sharded=layout.is_sharded),
        ONE_REDUCTION: _without_one_reduction(layout),
        FP32_KERNELS: _without_fp32_kernels(layout, hardware),
    }
    if not settings.fast_paths:
        return dict.fromkeys(reasons, "fast_paths is false")
    return reasons


def has_loss_gradient(shape: ModelShape, settings: RunSettings, layout: Layout) -> bool:
    """Whether a run uses the fast path LOSS_GRADIENT."""
    return settings.fast_paths and not _without_loss_gradient(shape, settings, layout)


def has_one_reduction(settings: RunSettings, layout: Layout) -> bool:
    """Whether a run uses the fast path ONE_REDUCTION."""
    return settings.fast_paths and not _without_one_reduction(layout)


def has_fp32_kernels(settings: RunSettings, layout: Layout, hardware: Hardware) -> bool:
    """Whether a run uses the fast path FP32_KERNELS."""
    return settings.fast_paths and not _without_fp32_kernels(layout, hardware)


def has_joint_lora(settings: RunSettings, *, is_sharded: bool) -> bool:
    """Whether a run uses the fast path JOINT_LORA; `is_sharded`: whether it runs at ZeRO-3."""
    return settings.fast_paths and not _without_joint_lora(settings, is_sharded=is_sharded)


def _without_loss_gradient(shape: ModelShape, settings: RunSettings, layout: Layout) -> str:
    """The reason why LOSS_GRADIENT is off; empty if it is on."""
    if trained_head(shape, settings) is not None:
        return "modules_to_save: the head is trained, and its gradient needs the plain loss"
    if settings.new_tokens:
        return "new_tokens: rows of the head are trained, and their gradient needs the plain loss"
    if layout.training_dtype == "float16":
        return "in fp16 the loss is scaled before its backward pass, so that no gradient underflows"
    return ""


def _without_joint_lora(settings: RunSettings, *, is_sharded: bool) -> str:
    """The reason why JOINT_LORA is off; empty if it is on."""
    if settings.use_dora:
        return "use_dora: DoRA layers use peft's computation"
    if is_sharded and settings.deepspeed_json is not None:
        return "at ZeRO-3 a deepspeed_json may shard the adapter, which must be whole on each rank"
    return ""


def _without_one_reduction(layout: Layout) -> str:
    """The reason why ONE_REDUCTION is off; empty if it is on."""
    if layout.accumulation_steps == 1:
        return "a step has one micro-batch"
    if layout.world_size == 1:
        return "there is one rank"
    return ""


def _without_fp32_kernels(layout: Layout, hardware: Hardware) -> str:
    """The reason why FP32_KERNELS is off; empty if it is on."""
    if hardware.kind == "cuda":
        return "the ranks train on GPUs"
    if layout.training_dtype != "bfloat16":
        return f"the training dtype is {layout.training_dtype}"
    if not hardware.is_slow_in_bf16:
        return "this CPU multiplies in bf16 as fast as in fp32, or was not measured"
    return ""
