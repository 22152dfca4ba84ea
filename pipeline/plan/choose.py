"""The search: every layout that the settings leave open, priced by memory and time of a step.

Each key that the user set is a constraint, each `auto` is free. What fits is ordered by predicted
seconds a step at the same global batch, in three classes: a base that fits on every device is
replicated, one that does not is sharded (ZeRO-3), and only one that does not fit there either lies
in host memory. A later class may be predicted a little faster, because what it saves is recomputed
blocks; but it waits for links that the prediction knows least of. Optimizer states are never
offloaded: an adapter's are small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from pipeline.config.settings import RunSettings
from pipeline.plan.batches import micro_batches
from pipeline.plan.cost.memory import Memory, memory
from pipeline.plan.cost.speed import Speed, step_seconds
from pipeline.plan.given.hardware import GIB, Hardware
from pipeline.plan.given.layout import Layout, Offload
from pipeline.plan.given.shape import ModelShape

_RESIDENT: list[Offload] = ["none"]
_HOST_SHARE = 0.9  # of a node's memory; the rest is the system's and the page cache's


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its price; `refusal` says why it was left out."""

    layout: Layout
    memory: Memory
    speed: Speed
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the ranks run on."""

    hardware: Hardware
    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def device_limit(self) -> int:
        """Bytes that a rank may use of its device."""
        return self.hardware.usable_bytes(self.ranks_per_node)

    @property
    def host_limit(self) -> int | None:
        """Bytes that the ranks of a node may use of its memory; None where it is not known."""
        return int(self.hardware.host_bytes * _HOST_SHARE) or None


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
        is_given_up = settings.bf16 is False
        return "float16", "bf16: false" if is_given_up else f"{hardware.name} has no bfloat16"
    return "float32", f"neither 16-bit type is both allowed and there on {hardware.name}"


def candidates(settings: RunSettings, shape: ModelShape, machines: Cluster) -> list[Candidate]:
    """Every layout that the settings allow: those that fit by speed, then those that do not.

    Raises UserError where the batch keys contradict each other.
    """
    found = [
        _with_fewest_checkpointed(settings, shape, machines, layout)
        for layout in _layouts(settings, shape, machines)
    ]
    return sorted(found, key=order)


def order(candidate: Candidate) -> tuple[bool, bool, bool, float]:
    """Key that sorts the best first; those that were left out come last, the least need first."""
    is_out, layout = candidate.refusal is not None, candidate.layout
    if is_out:
        return True, False, False, candidate.memory.device_need
    is_offloaded = layout.offload_param != "none"
    return False, layout.is_sharded, is_offloaded, candidate.speed.seconds_per_step


def _layouts(settings: RunSettings, shape: ModelShape, machines: Cluster) -> Iterator[Layout]:
    """Layouts without checkpointing, or with as much of it as the settings demand."""
    world, dtype = machines.world_size, training_dtype(settings, machines.hardware)[0]
    batches = micro_batches(settings, world)
    all_blocks = shape.num_layers if settings.gradient_checkpointing is True else 0
    for stage in _stages(settings, dtype, machines):
        is_sharded = stage == 3
        copies = _hpz_sizes(settings, machines) if is_sharded else [1]
        offloads = _offloads(settings, machines.hardware) if is_sharded else _RESIDENT
        for micro, accumulation in batches:
            for copy in copies:
                for offload in offloads:
                    yield Layout(
                        zero_stage=stage,
                        micro_batch_size=micro,
                        accumulation_steps=accumulation,
                        checkpointed_layers=all_blocks,
                        nodes=machines.nodes,
                        ranks_per_node=machines.ranks_per_node,
                        training_dtype=dtype,
                        hpz_partition_size=copy,
                        offload_param=offload,
                    )


def _stages(settings: RunSettings, dtype: str, machines: Cluster) -> list[int]:
    if settings.zero_stage != "auto":
        return [settings.zero_stage]
    # ZeRO-1 adds the gradients of micro-batches in the training dtype: exact in fp32 alone
    stages = [1, 2] if dtype == "float32" else [2]
    is_shardable = not settings.load_in_8bit  # rule 8bit-zero3
    can_leave_device = machines.hardware.kind == "cuda" and settings.offload_param != "none"
    if is_shardable and (machines.world_size > 1 or can_leave_device):
        stages.append(3)
    return stages


def _hpz_sizes(settings: RunSettings, machines: Cluster) -> list[int]:
    if settings.hpz_partition_size != "auto":
        return [settings.hpz_partition_size]
    is_worth = machines.nodes > 1 and machines.ranks_per_node > 1
    return [1, machines.ranks_per_node] if is_worth else [1]


def _offloads(settings: RunSettings, hardware: Hardware) -> list[Offload]:
    if settings.offload_param != "auto":
        return [settings.offload_param]
    return ["none", "cpu"] if hardware.kind == "cuda" else ["none"]


def _with_fewest_checkpointed(
    settings: RunSettings, shape: ModelShape, machines: Cluster, layout: Layout
) -> Candidate:
    """The layout with as few recomputed blocks as fit; with all of them if none does."""
    price = partial(_priced, settings, shape, machines)
    is_forced = layout.is_sharded and settings.load_in_4bit  # rule 4bit-zero3-reentrant
    if is_forced and settings.gradient_checkpointing is not False:
        return price(replace(layout, checkpointed_layers=shape.num_layers))
    first = price(layout)
    if first.refusal is None or settings.gradient_checkpointing != "auto":
        return first
    low, high = 1, shape.num_layers  # need falls with each, but for the last block's input
    while low < high:
        middle = (low + high) // 2
        if price(replace(layout, checkpointed_layers=middle)).refusal is None:
            high = middle
        else:
            low = middle + 1
    return price(replace(layout, checkpointed_layers=low))


def _priced(
    settings: RunSettings, shape: ModelShape, machines: Cluster, layout: Layout
) -> Candidate:
    hardware, tokens = machines.hardware, settings.max_length
    need = memory(shape, settings, layout, hardware, tokens)
    limit = machines.device_limit
    if settings.is_quantised and layout.is_sharded and need.load_peak_bytes > limit:
        layout = replace(layout, loads_through_host=True)
        need = memory(shape, settings, layout, hardware, tokens)
    return Candidate(
        layout=layout,
        memory=need,
        speed=step_seconds(shape, settings, layout, hardware, tokens),
        refusal=_too_large(need, limit, machines.host_limit),
    )


def _too_large(need: Memory, limit: int, host_limit: int | None) -> str | None:
    if need.device_need > limit:
        when = "while loading" if need.load_peak_bytes > need.peak_bytes else need.worst_moment
        return (
            f"needs {need.device_need / GIB:.1f} of {limit / GIB:.1f} GiB a rank "
            f"({when if when.startswith('while') else 'at ' + when})"
        )
    if host_limit is not None and need.host_peak_bytes > host_limit:
        found = f"needs {need.host_peak_bytes / GIB:.1f} of {host_limit / GIB:.1f} GiB"
        return f"{found} of a node's own memory"
    return None
