"""What `auto` becomes: the first candidate that fits, the fastest kind first.

A base that fits on every rank is replicated (ZeRO-2: the traffic is the adapter's alone); ZeRO-3
is for one that does not fit. Within a stage, activations are recomputed only where they must be,
and the micro-batch is as large as fits, at most 8.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.hardware import GIB, Hardware
from pipeline.plan.layout import Layout
from pipeline.plan.memory import load_peak_bytes, memory_per_rank
from pipeline.plan.shape import ModelShape

_DEFAULT_GLOBAL_BATCH = 16
_LARGEST_MICRO_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layout of a run and one line of why for each key that was free."""

    layout: Layout
    why: dict[str, str]


def training_dtype(settings: RunSettings, hardware: Hardware) -> tuple[str, str]:
    """The type that the run trains in, and why."""
    if settings.bf16 is True:
        return "bfloat16", "bf16: true"
    if settings.fp16 is True:
        return "float16", "fp16: true"
    if settings.bf16 is False and settings.fp16 is False:
        return "float32", "bf16 and fp16 are both false"
    capability = hardware.compute_capability
    has_bf16 = hardware.kind == "cpu" or (capability is not None and capability >= (8, 0))
    if settings.bf16 == "auto" and has_bf16:
        return "bfloat16", f"{hardware.name} has bfloat16"
    if settings.fp16 == "auto" and hardware.kind == "cuda":
        return "float16", f"{hardware.name} has no bfloat16, or bf16 is false"
    return "float32", f"neither 16-bit type is both allowed and there on {hardware.name}"


def choose(
    settings: RunSettings, shape: ModelShape, hardware: Hardware, *, nodes: int, ranks_per_node: int
) -> Choice:
    """The first layout that fits. Raises UserError where none does, with what would."""
    world_size = nodes * ranks_per_node
    dtype, why_dtype = training_dtype(settings, hardware)
    limit = hardware.usable_bytes(ranks_per_node)
    every = partial(Layout, nodes=nodes, ranks_per_node=ranks_per_node, training_dtype=dtype)
    candidates = list(_layouts(settings, world_size, shape.num_layers, every))
    for layout in candidates:
        if _need(shape, settings, layout) <= limit:
            why = _reasons(settings, shape, layout) | {"training_dtype": why_dtype}
            return Choice(layout=layout, why=why)
    raise UserError(_does_not_fit(settings, shape, candidates[-1], limit, hardware))


def _need(shape: ModelShape, settings: RunSettings, layout: Layout) -> int:
    training = sum(memory_per_rank(shape, settings, layout).values())
    return max(training, load_peak_bytes(shape, settings, layout))


def _layouts(
    settings: RunSettings, world_size: int, num_layers: int, layout: Callable[..., Layout]
) -> Iterator[Layout]:
    """Every layout that the settings allow, the one to prefer first."""
    stages = [2, 3] if settings.zero_stage == "auto" else [settings.zero_stage]
    if settings.zero_stage == "auto" and (world_size == 1 or settings.load_in_8bit):
        stages = [2]
    checkpointing = settings.gradient_checkpointing
    for stage in stages:
        options = [False, True] if checkpointing == "auto" else [checkpointing]
        if stage == 3 and settings.load_in_4bit:
            options = [True]  # rule 4bit-zero3-reentrant
        for is_checkpointed in options:
            for micro in _micro_batches(settings, world_size):
                yield layout(
                    zero_stage=stage,
                    micro_batch_size=micro,
                    accumulation_steps=_sequences_per_rank(settings, world_size) // micro,
                    checkpointed_layers=num_layers if is_checkpointed else 0,
                )


def _sequences_per_rank(settings: RunSettings, world_size: int) -> int:
    """Sequences that a rank does in one step. Raises UserError where the keys contradict."""
    total = settings.global_batch_size
    micro, accumulation = settings.batch_size, settings.gradient_accumulation_steps
    if total == "auto":
        if micro == "auto" and accumulation == "auto":
            return max(1, _DEFAULT_GLOBAL_BATCH // world_size)
        return (1 if micro == "auto" else micro) * (1 if accumulation == "auto" else accumulation)
    per_pass = world_size * (1 if micro == "auto" else micro)
    per_pass *= 1 if accumulation == "auto" else accumulation
    is_complete = micro != "auto" and accumulation != "auto"
    if total % per_pass or (is_complete and total != per_pass):
        parts = [f"{world_size} ranks"]
        parts += [] if micro == "auto" else [f"batch_size {micro}"]
        parts += [] if accumulation == "auto" else [f"gradient_accumulation_steps {accumulation}"]
        low = max(total // per_pass, 1) * per_pass
        near = str(per_pass) if is_complete else f"{low} or {low + per_pass}"
        raise UserError(
            f"global_batch_size: {total} is not {' x '.join(parts)}"
            f"{'' if is_complete else ' x a whole number'}; {near} would work"
        )
    return total // world_size


def _micro_batches(settings: RunSettings, world_size: int) -> list[int]:
    each = _sequences_per_rank(settings, world_size)
    if settings.batch_size != "auto":
        return [settings.batch_size]
    if settings.gradient_accumulation_steps != "auto":
        return [each // settings.gradient_accumulation_steps]
    return [n for n in range(min(each, _LARGEST_MICRO_BATCH), 0, -1) if each % n == 0]


def _reasons(settings: RunSettings, shape: ModelShape, chosen: Layout) -> dict[str, str]:
    why: dict[str, str] = {}
    kept = replace(chosen, checkpointed_layers=0)
    need = f"{_need(shape, settings, chosen) / GIB:.1f} GiB a rank"
    if settings.zero_stage == "auto":
        why["zero_stage"] = (
            "the base fits on every rank, so only the adapter's gradients travel"
            if chosen.zero_stage == 2
            else "the base does not fit on one rank, so it is sharded over all"
        )
    if settings.gradient_checkpointing == "auto":
        why["gradient_checkpointing"] = (
            f"on: without it {_need(shape, settings, kept) / GIB:.1f} GiB a rank would be needed"
            if chosen.checkpointed_layers
            else f"off: the activations fit ({need})"
        )
    if settings.batch_size == "auto":
        why["batch_size"] = f"the largest up to {_LARGEST_MICRO_BATCH} that fits ({need})"
    if settings.gradient_accumulation_steps == "auto":
        why["gradient_accumulation_steps"] = "what is left of the global batch"
    if settings.global_batch_size == "auto":
        why["global_batch_size"] = "batch_size x gradient_accumulation_steps x ranks"
    return why


def _does_not_fit(
    settings: RunSettings, shape: ModelShape, layout: Layout, limit: int, hardware: Hardware
) -> str:
    """What was tried last, and the smallest single change that would fit."""
    smaller = replace(layout, micro_batch_size=1)
    changes = [
        (
            "gradient_checkpointing: true",
            settings,
            replace(layout, checkpointed_layers=shape.num_layers),
        ),
        ("batch_size: 1", settings, smaller),
        ("zero_stage: 3", settings, replace(layout, zero_stage=3)),
        (
            "load_in_4bit: true",
            settings.model_copy(update={"load_in_4bit": True, "load_in_8bit": False}),
            layout,
        ),
        (
            "load_in_4bit: true, gradient_checkpointing: true and batch_size: 1",
            settings.model_copy(update={"load_in_4bit": True, "load_in_8bit": False}),
            replace(smaller, checkpointed_layers=shape.num_layers),
        ),
    ]
    found = (
        f"the run needs {_need(shape, settings, layout) / GIB:.1f} GiB a rank and "
        f"{hardware.name} gives {limit / GIB:.1f}"
    )
    for name, changed, tried in changes:
        need = _need(shape, changed, tried)
        if need <= limit:
            return f"{found}; with {name} it needs {need / GIB:.1f}"
    return f"{found}; no single change makes it fit: a larger GPU or more of them"
