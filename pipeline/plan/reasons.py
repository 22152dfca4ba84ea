"""Texts about a plan: the reason for each chosen value, and the remedy if a run does not fit.

The layout is the combination of ZeRO stage, micro-batch size, activation checkpointing and offload.
A candidate is a layout with its predicted memory and time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.commands import DOCS
from pipeline.config.settings import RunSettings, settings_by_trait
from pipeline.errors import UserError
from pipeline.plan.choose import (
    MIN_TILED_TOKENS,
    Candidate,
    Cluster,
    candidates,
    preference,
    training_dtype,
)
from pipeline.plan.cost.memory import memory
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.layout import Layout, SequenceProfile
from pipeline.plan.given.shape import ModelShape

# Field of Layout -> the setting that decides it, unless that setting is `auto`. The plan shows the
# reasons in this order.
_LAYOUT_SETTINGS = {
    key: name
    for key in Layout.__dataclass_fields__
    if (name := settings_by_trait("layout").get(key))
}
# Settings that the plan may use to save memory if they are `auto`. If a run does not fit, a change
# of each to `auto` is tried in this order.
_MEMORY_SETTINGS = (
    "zero_stage", "mlp_tiles", "sequence_parallel_size", "offload_activations", "offload_param",
)  # fmt: skip
# Fields of Layout with the value that means "not used"; such a value needs no reason.
_UNUSED = (("offload_activations", False), ("mlp_tiles", 1), ("sequence_parallel_size", 1))


def reasons(
    chosen: Candidate,
    ranked: Sequence[Candidate],
    settings: RunSettings,
    shape: ModelShape,
    cluster: Cluster,
) -> dict[str, str]:
    """The reason for each value that was `auto`, and for the training dtype.

    Keys are names of settings or of fields of Layout.
    """
    why: dict[str, str] = {}
    # Their reason is the memory of the same layout with less of it.
    with_less = {"checkpointed_layers": _checkpointing_reason, "mlp_tiles": _tiling_reason}
    for key, setting in _LAYOUT_SETTINGS.items():
        if getattr(settings, setting) != "auto":
            continue
        if key in ("hpz_partition_size", "offload_param") and not chosen.layout.is_sharded:
            continue  # these keys apply only to a sharded base
        if (key, getattr(chosen.layout, key)) in _UNUSED:
            if key == "mlp_tiles" and (untiled := _untiled_text(settings, shape)):
                why[key] = untiled
            continue
        if key == "hpz_partition_size" and cluster.nodes == 1:
            why[key] = "one node: gathers never use the network"
        elif key in with_less:
            why[key] = with_less[key](chosen, settings, shape, cluster)
        else:
            why[key] = _compare_with_alternative(key, chosen, ranked)
    ranks = "groups" if chosen.layout.sequence_parallel_size > 1 else "ranks"
    if settings.gradient_accumulation_steps == "auto":
        why["gradient_accumulation_steps"] = f"global batch / (micro-batch x {ranks})"
    if settings.global_batch_size == "auto":
        why["global_batch_size"] = f"micro-batch x accumulation x {ranks}"
    why["training_dtype"] = training_dtype(settings, cluster.hardware)[1]
    return why


def _untiled_text(settings: RunSettings, shape: ModelShape) -> str:
    """Why the MLPs of a model are not tiled, although sequences are long; empty if they may be."""
    is_short = settings.max_length < MIN_TILED_TOKENS
    if is_short or any(block.has_tileable_mlp for block in shape.blocks):
        return ""
    if any(block.experts for block in shape.blocks):
        return f"not tiled: blocks with experts never are ({DOCS}/long.md)"
    return f"not tiled: only MLPs of the model types in {DOCS}/models.md are ({DOCS}/long.md)"


def _compare_with_alternative(key: str, chosen: Candidate, ranked: Sequence[Candidate]) -> str:
    """The chosen candidate compared with the best one in which this field differs, as text."""
    chosen_value = getattr(chosen.layout, key)
    others = [each for each in ranked if getattr(each.layout, key) != chosen_value]
    if not others:
        return "the only value that the other settings and the hardware allow"
    best = min(others, key=preference)
    name = f"{key} {getattr(best.layout, key)}"
    if best.refusal is not None:
        return f"no alternative: {name} {best.refusal}"
    if best.layout.is_sharded and not chosen.layout.is_sharded:
        return "the base fits on each rank: only adapter gradients are communicated"
    if best.layout.offload_param != chosen.layout.offload_param:
        return "the sharded base fits on the devices"
    if best.layout.offload_activations and not chosen.layout.offload_activations:
        return f"no alternative: {name} would need offload_activations"
    # The candidates may have different global batches, so the times are for the chosen one.
    sequences = chosen.layout.global_batch_size
    chosen_time, best_time = (
        _seconds_text(each.speed.seconds_per_step * sequences / each.layout.global_batch_size)
        for each in (chosen, best)
    )
    if chosen_time == best_time:
        reason = f"no alternative is faster: predicted {chosen_time}/step, also for {name}"
    else:
        reason = (
            f"the fastest that fits: predicted {chosen_time}/step, and {best_time}/step with {name}"
        )
    return f"{reason} (for a global batch of {sequences} and sequences of max_length tokens)"


def _checkpointing_reason(
    chosen: Candidate, settings: RunSettings, shape: ModelShape, cluster: Cluster
) -> str:
    """Why this number of layers is checkpointed."""
    count, total = chosen.layout.checkpointed_layers, shape.num_layers
    if not count:
        return f"0 of {total} layers: all activations fit"
    if chosen.layout.is_sharded and settings.load_in_4bit:
        return f"all {total} layers: 4-bit layers at ZeRO-3 need it (rule 4bit-zero3-unchecked)"
    if settings.offload_activations is True and settings.gradient_checkpointing is not False:
        return f"all {total} layers: offload_activations is true"
    fewer = replace(chosen.layout, checkpointed_layers=count - 1)
    sequences = SequenceProfile(tokens=settings.max_length)
    need = memory(shape, settings, fewer, cluster.hardware, sequences).device_peak_bytes
    return (
        f"{count} of {total} layers, the fewest that fit: with {count - 1} a rank needs "
        f"{need / GIB:.1f} of {cluster.device_limit / GIB:.1f} GiB"
    )


def _tiling_reason(
    chosen: Candidate, settings: RunSettings, shape: ModelShape, cluster: Cluster
) -> str:
    """Why MLPs are tiled: the need of the same layout without tiles."""
    untiled = replace(chosen.layout, mlp_tiles=1)
    sequences = SequenceProfile(tokens=settings.max_length)
    need = memory(shape, settings, untiled, cluster.hardware, sequences).device_peak_bytes
    return (
        f"without tiles a rank needs {need / GIB:.1f} of {cluster.device_limit / GIB:.1f} GiB with "
        "as many layers checkpointed"
    )


@dataclass(frozen=True)
class _Change:
    """A change of the run file: `text` for the message, `values` for the settings."""

    text: str
    values: dict[str, Any]


def misfit_message(
    settings: RunSettings, shape: ModelShape, cluster: Cluster, ranked: Sequence[Candidate]
) -> str:
    """Message for a run that does not fit: the memory it needs, and a change that makes it fit.

    Changes of the run file are tried first, then more devices.
    """
    least = min(ranked, key=lambda candidate: candidate.memory.device_peak_bytes)
    need = (
        f"the run does not fit on {cluster.world_size} x {cluster.hardware.name}: with "
        f"ZeRO-{least.layout.zero_stage} and micro-batches of {least.layout.micro_batch_size} it "
        f"{least.refusal}"
    )
    for change in _changes(settings):
        best = _best_that_fits(settings.model_copy(update=change.values), shape, cluster)
        if best is not None:
            new_need, limit = best.memory.device_peak_bytes / GIB, cluster.device_limit / GIB
            return f"{need}; with {change.text} it needs {new_need:.1f} of {limit:.1f} GiB"
    for larger in _larger_clusters(cluster):
        if _best_that_fits(settings, shape, larger) is not None:
            nodes = f"{larger.nodes} nodes of " if larger.nodes > 1 else ""
            return f"{need}; it fits on {nodes}{larger.ranks_per_node} such devices"
    return f"{need}; no single change makes it fit: use GPUs with more memory"


def _changes(settings: RunSettings) -> Iterator[_Change]:
    """Changes of the run file to try. Those that keep the results of the run come first."""
    if settings.gradient_checkpointing is False:
        yield _Change("gradient_checkpointing: auto", {"gradient_checkpointing": "auto"})
    if settings.batch_size != "auto" and settings.batch_size > 1:
        yield _Change("batch_size: 1", {"batch_size": 1, "gradient_accumulation_steps": "auto"})
    for key in _MEMORY_SETTINGS:
        if getattr(settings, key) != "auto":
            yield _Change(f"{key}: auto", {key: "auto"})
    four_bit = {"load_in_4bit": True, "load_in_8bit": False}
    if not settings.load_in_4bit:
        yield _Change("load_in_4bit: true", four_bit)
    length = settings.max_length
    while length > 256:
        length //= 2
        yield _Change(f"max_length: {length}", {"max_length": length})
    if not settings.load_in_4bit:
        yield _Change(
            "load_in_4bit: true, gradient_checkpointing: true and batch_size: 1",
            four_bit
            | {"gradient_checkpointing": True, "batch_size": 1}
            | {"gradient_accumulation_steps": "auto"},
        )


def _larger_clusters(cluster: Cluster) -> Iterator[Cluster]:
    """Larger clusters of the same device: first up to eight devices per node, then more nodes."""
    if cluster.hardware.kind == "cpu":
        return  # more ranks do not help: all ranks of a machine share its memory
    for ranks in (2, 4, 8):
        if cluster.nodes == 1 and ranks > cluster.ranks_per_node:
            yield replace(cluster, ranks_per_node=ranks)
    for factor in (2, 4, 8, 16):
        yield replace(cluster, nodes=cluster.nodes * factor)
    if cluster.ranks_per_node < 8:
        for nodes in (2, 4, 8, 16):
            yield replace(cluster, nodes=nodes, ranks_per_node=8)


def _best_that_fits(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> Candidate | None:
    """The best candidate that fits; None if none fits or the batch keys contradict each other."""
    try:
        ranked = candidates(settings, shape, cluster)
    except UserError:
        return None
    return next((candidate for candidate in ranked if candidate.refusal is None), None)


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
