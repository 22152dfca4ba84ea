"""Why: one line for each key that the plan chose, and what would make a run fit that does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.settings import RunSettings, settings_by
from pipeline.errors import UserError
from pipeline.plan.choose import Candidate, Cluster, candidates, order, training_dtype
from pipeline.plan.cost.memory import memory
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape

# Key of the choice -> the setting that fixes it, in the order in which they are shown.
_SETTING_OF = {
    key: name for key in Layout.__dataclass_fields__ if (name := settings_by("layout").get(key))
}


def reasons(
    chosen: Candidate,
    ranked: Sequence[Candidate],
    settings: RunSettings,
    shape: ModelShape,
    machines: Cluster,
) -> dict[str, str]:
    """One line for each key that was free."""
    why: dict[str, str] = {}
    for key, setting in _SETTING_OF.items():
        if getattr(settings, setting) != "auto":
            continue
        if key in ("hpz_partition_size", "offload_param") and not chosen.layout.is_sharded:
            continue  # there is nothing of the base to lay elsewhere
        if key == "hpz_partition_size" and machines.nodes == 1:
            why[key] = "one node, so gathers stay inside it anyway"
        elif key == "checkpointed_layers":
            why[key] = _checkpointing(chosen, settings, shape, machines)
        else:
            why[key] = _alternative(key, chosen, ranked)
    if settings.gradient_accumulation_steps == "auto":
        why["gradient_accumulation_steps"] = "what is left of the global batch"
    if settings.global_batch_size == "auto":
        why["global_batch_size"] = "micro-batch x accumulation x ranks"
    why["training_dtype"] = training_dtype(settings, machines.hardware)[1]
    return why


def _alternative(key: str, chosen: Candidate, ranked: Sequence[Candidate]) -> str:
    """The chosen value against the best candidate that has another one."""
    mine = getattr(chosen.layout, key)
    others = [c for c in ranked if getattr(c.layout, key) != mine]
    if not others:
        return "what the other keys leave"
    best = min(others, key=order)
    name = f"{key} {getattr(best.layout, key)}"
    if best.refusal is not None:
        return f"the only one that can be: {name} {best.refusal}"
    own, seconds = (_seconds(c.speed.seconds_per_step) for c in (chosen, best))
    if best.layout.is_sharded and not chosen.layout.is_sharded:
        return "the base fits on every rank, so the adapter alone travels"
    if best.layout.offload_param != chosen.layout.offload_param:
        return "the base fits on the devices, so nothing waits for host memory"
    if own == seconds:
        return f"no other is faster: {own} a step of full sequences, as with {name}"
    return f"the fastest that fits: {own} a step of full sequences; {name} would take {seconds}"


def _checkpointing(
    chosen: Candidate, settings: RunSettings, shape: ModelShape, machines: Cluster
) -> str:
    count, of = chosen.layout.checkpointed_layers, shape.num_layers
    if not count:
        return f"none of {of} blocks: the activations of all fit"
    if chosen.layout.is_sharded and settings.load_in_4bit:
        return f"all {of} blocks: rule 4bit-zero3-reentrant"
    fewer = replace(chosen.layout, checkpointed_layers=count - 1)
    need = memory(shape, settings, fewer, machines.hardware, settings.max_length).device_need
    return (
        f"{count} of {of} blocks, the fewest that fit: with {count - 1} a rank needs "
        f"{need / GIB:.1f} of {machines.device_limit / GIB:.1f} GiB"
    )


@dataclass(frozen=True)
class _Change:
    """A change of the run file, and how it is said."""

    said: str
    values: dict[str, Any]


def misfit_message(
    settings: RunSettings, shape: ModelShape, machines: Cluster, ranked: Sequence[Candidate]
) -> str:
    """What was found, and the smallest change that would fit: in the run file, else in machines."""
    least = min(ranked, key=lambda candidate: candidate.memory.device_need)
    found = (
        f"the run does not fit on {machines.world_size} x {machines.hardware.name}: with "
        f"ZeRO-{least.layout.zero_stage} and micro-batches of {least.layout.micro_batch_size} it "
        f"{least.refusal}"
    )
    for change in _changes(settings):
        best = _best_after(change, settings, shape, machines)
        if best is not None:
            need = best.memory.device_need / GIB
            limit = machines.device_limit / GIB
            return f"{found}; with {change.said} it needs {need:.1f} of {limit:.1f} GiB"
    for more in _more(machines):
        if any(c.refusal is None for c in _tried(settings, shape, more)):
            nodes = f"{more.nodes} nodes of " if more.nodes > 1 else ""
            return f"{found}; it fits on {nodes}{more.ranks_per_node} of them"
    return f"{found}; no single change makes it fit: it takes GPUs with more memory"


def _changes(settings: RunSettings) -> Iterator[_Change]:
    """Changes to try, the smallest first: what is only how it runs, then what changes results."""
    if settings.gradient_checkpointing is False:
        yield _Change("gradient_checkpointing: auto", {"gradient_checkpointing": "auto"})
    if settings.batch_size != "auto" and settings.batch_size > 1:
        yield _Change("batch_size: 1", {"batch_size": 1, "gradient_accumulation_steps": "auto"})
    if settings.zero_stage != "auto":
        yield _Change("zero_stage: auto", {"zero_stage": "auto"})
    if settings.offload_param == "none":
        yield _Change("offload_param: auto", {"offload_param": "auto"})
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


def _more(machines: Cluster) -> Iterator[Cluster]:
    """More devices of the same kind: first in the node, up to eight, then nodes."""
    if machines.hardware.kind == "cpu":
        return  # ranks of a machine share its memory
    for ranks in (2, 4, 8):
        if machines.nodes == 1 and ranks > machines.ranks_per_node:
            yield replace(machines, ranks_per_node=ranks)
    for factor in (2, 4, 8, 16):
        yield replace(machines, nodes=machines.nodes * factor)
    if machines.ranks_per_node < 8:
        for nodes in (2, 4, 8, 16):
            yield replace(machines, nodes=nodes, ranks_per_node=8)


def _best_after(
    change: _Change, settings: RunSettings, shape: ModelShape, machines: Cluster
) -> Candidate | None:
    tried = _tried(settings.model_copy(update=change.values), shape, machines)
    return next((candidate for candidate in tried if candidate.refusal is None), None)


def _tried(settings: RunSettings, shape: ModelShape, machines: Cluster) -> list[Candidate]:
    try:
        return candidates(settings, shape, machines)
    except UserError:
        return []  # this change contradicts another key


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
