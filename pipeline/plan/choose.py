"""Search for the layout of a run: predict memory and time for each allowed layout, and rank them.

A layout (plan/given/layout.py) is a combination of ZeRO stage, micro-batch size, accumulation
steps, activation checkpointing, offload and sequence parallelism. A setting that the user gave is a
constraint; for a setting that is `auto`, all useful values are tried.

Layouts that fit in memory are ranked in this order: first those that keep the frozen base and the
activations on the devices, then those that offload activations to host memory, then those that
offload the base. Among these, layouts that replicate the base on every device come before layouts
that shard it (ZeRO-3). The rest is decided by the predicted seconds per sequence. (The time of a
step would not do: with `batch_size` alone, larger sequence-parallel groups have a smaller global
batch.) A layout that shards or offloads may be predicted to be a little faster, because it
checkpoints fewer blocks. It is still not preferred: its time depends on link rates, the least
certain part of the prediction. Optimizer states are never offloaded, because those of an adapter
are small.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil, prod
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.cost.memory import Memory, memory
from pipeline.plan.cost.speed import Speed, step_seconds
from pipeline.plan.given.class_proof import cached_proof
from pipeline.plan.given.hardware import GIB, Hardware
from pipeline.plan.given.layout import Layout, Offload, SequenceProfile
from pipeline.plan.given.sequence_parallel import (
    reason_against_split,
    require_groups,
    sizes_by_heads,
    sizes_by_ranks,
)
from pipeline.plan.given.shape import ModelShape

_DEFAULT_GLOBAL_BATCH = 16
_LARGEST_MICRO_BATCH = 64
# A tiled MLP computes a sequence in tiles, one after another. Tokens of a tile: enough to keep a
# GPU's matrix units busy.
_TILE_TOKENS = 4096
# Tiling is tried only if each rank has at least so many tokens of a sequence. For fewer tokens the
# time that tiling costs is too uncertain, and smaller micro-batches save as much memory.
MIN_TILED_TOKENS = 16_384
_HOST_SHARE = 0.9  # usable fraction of a node's memory; system and page cache need the rest


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its predicted memory and speed.

    `refusal`: why the layout cannot be used; None if it can.
    """

    layout: Layout
    memory: Memory
    speed: Speed
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster of a run: equal nodes with equal devices."""

    hardware: Hardware
    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def device_limit(self) -> int:
        """Bytes that a rank may use of its device."""
        return self.hardware.usable_bytes(self.ranks_per_node)

    @property
    def host_limit(self) -> int | None:
        """Bytes of a node's memory that its ranks may use together; None if it is not known."""
        return int(self.hardware.host_bytes * _HOST_SHARE) or None


def training_dtype(settings: RunSettings, hardware: Hardware) -> tuple[str, str]:
    """The training dtype and the reason for it."""
    if settings.bf16 is True:
        return "bfloat16", "bf16: true"
    if settings.fp16 is True:
        return "float16", "fp16: true"
    if settings.bf16 is False and settings.fp16 is False:
        return "float32", "bf16 and fp16 are both false"
    capability = hardware.compute_capability
    has_bf16 = hardware.kind == "cpu" or (capability is not None and capability >= (8, 0))
    if settings.bf16 == "auto" and has_bf16:
        return "bfloat16", f"{hardware.name} supports bfloat16"
    if settings.fp16 == "auto" and hardware.kind == "cuda":
        if settings.bf16 is False:
            return "float16", "bf16: false"
        return "float16", f"{hardware.name} has no bfloat16"
    return "float32", f"no 16-bit type is both allowed and supported on {hardware.name}"


def micro_batches(
    settings: RunSettings, world_size: int, sequence_parallel_size: int = 1
) -> list[tuple[int, int]]:
    """Every allowed pair of micro-batch size and accumulation steps, largest micro-batch first.

    Raises UserError if the batch keys contradict each other or the number of ranks.
    """
    per_rank = _sequences_per_rank(settings, world_size, sequence_parallel_size)
    if settings.batch_size != "auto":
        return [(settings.batch_size, per_rank // settings.batch_size)]
    if settings.gradient_accumulation_steps != "auto":
        accumulation = settings.gradient_accumulation_steps
        return [(per_rank // accumulation, accumulation)]
    largest = min(per_rank, _LARGEST_MICRO_BATCH)
    return [(micro, per_rank // micro) for micro in range(largest, 0, -1) if per_rank % micro == 0]


def default_global_batch_size(data_parallel_size: int) -> int:
    """Sequences of a step over all ranks, if no batch key is set.

    It is the largest multiple of `data_parallel_size` that is at most 16. With more than 16 ranks,
    it is one sequence for each rank.
    """
    return max(1, _DEFAULT_GLOBAL_BATCH // data_parallel_size) * data_parallel_size


def _sequences_per_rank(settings: RunSettings, world_size: int, sequence_parallel_size: int) -> int:
    """Sequences of a step on each rank, or on each group of ranks that share sequences.

    Raises UserError if the batch keys contradict each other or the number of ranks.
    """
    num_groups = world_size // sequence_parallel_size
    keys = ("batch_size", "gradient_accumulation_steps")
    set_keys = {key: getattr(settings, key) for key in keys if getattr(settings, key) != "auto"}
    are_all_set = len(set_keys) == len(keys)
    per_group = prod(set_keys.values())  # 1 if neither key is set
    global_batch = settings.global_batch_size
    if global_batch == "auto":
        return per_group if set_keys else default_global_batch_size(num_groups) // num_groups
    smallest = num_groups * per_group  # the global batch must be a multiple of it
    is_possible = global_batch == smallest if are_all_set else global_batch % smallest == 0
    if not is_possible:
        unit = "ranks"
        if sequence_parallel_size > 1:
            unit = f"groups of {sequence_parallel_size} ranks (sequence_parallel_size)"
        terms = [f"{num_groups} {unit}", *(f"{key} {value}" for key, value in set_keys.items())]
        lower = max(global_batch // smallest, 1) * smallest
        possible = str(smallest) if are_all_set else f"{lower} or {lower + smallest}"
        raise UserError(
            f"global_batch_size: {global_batch} is not {' x '.join(terms)}"
            f"{'' if are_all_set else ' x a whole number'}; {possible} would work"
        )
    return global_batch // num_groups


def candidates(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> list[Candidate]:
    """A candidate for every layout that the settings allow, sorted by `preference`.

    If `sequence_parallel_size` is `auto`, sequences are split over ranks only if nothing else fits
    without offload. Raises UserError if the batch keys contradict each other.
    """
    result = _candidates_of_one_group_size(settings, shape, cluster)
    fits_without_offload = any(
        candidate.refusal is None
        and not candidate.layout.offload_activations
        and candidate.layout.offload_param == "none"
        for candidate in result
    )
    for size in [] if fits_without_offload else _group_sizes_to_try(settings, shape, cluster):
        changes: dict[str, Any] = {"sequence_parallel_size": size}
        if settings.batch_size == settings.gradient_accumulation_steps == "auto":
            changes["batch_size"] = 1  # a larger micro-batch needs more memory
            if settings.global_batch_size == "auto":
                changes["global_batch_size"] = default_global_batch_size(cluster.world_size)
        with suppress(UserError):  # batch keys that do not suit this number of groups
            result += _candidates_of_one_group_size(
                settings.model_copy(update=changes), shape, cluster
            )
    return sorted(result, key=preference)


def _candidates_of_one_group_size(
    settings: RunSettings, shape: ModelShape, cluster: Cluster
) -> list[Candidate]:
    """Candidates with the `sequence_parallel_size` of the settings, or with 1 if it is `auto`."""
    return [
        candidate
        for layout in _layouts(settings, shape, cluster)
        for candidate in _with_savings(settings, shape, cluster, layout)
    ]


def _group_sizes_to_try(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> list[int]:
    """Values above 1 of `sequence_parallel_size` to try if it is `auto`; groups are within a node.

    The list is empty on CPUs, and if the rules in plan/rules/sequence_parallel.py would refuse it.
    """
    if settings.sequence_parallel_size != "auto" or cluster.ranks_per_node == 1:
        return []
    has_attention_dropout = any(entry.startswith("att") for entry in shape.dropouts)
    if has_attention_dropout or settings.use_flash_attention is True:
        return []
    if cluster.hardware.kind == "cpu":
        return []
    if reason_against_split(shape, cached_proof(shape, settings)):
        return []
    by_ranks = sizes_by_ranks(1, cluster.ranks_per_node)
    return [size for size in sizes_by_heads(shape) if size > 1 and size in by_ranks]


def preference(candidate: Candidate) -> tuple[bool, bool, bool, bool, float]:
    """Sort key that puts the best candidate first, in the order that the module docstring explains.

    Refused candidates come last, sorted by the device memory that they need.
    """
    layout = candidate.layout
    if candidate.refusal is not None:
        return True, False, False, False, candidate.memory.device_peak_bytes
    is_offloaded = layout.offload_param != "none"
    seconds = candidate.speed.seconds_per_step / layout.global_batch_size
    return False, is_offloaded, layout.offload_activations, layout.is_sharded, seconds


def _layouts(settings: RunSettings, shape: ModelShape, cluster: Cluster) -> Iterator[Layout]:
    """All layouts that the settings allow, without tiled MLPs and offloaded activations.

    With `gradient_checkpointing: true` they checkpoint every block, else no block. `_with_savings`
    tries the other possibilities.
    """
    dtype = training_dtype(settings, cluster.hardware)[0]
    size = _sequence_parallel_size(settings, cluster)
    batches = micro_batches(settings, cluster.world_size, size)
    all_blocks = shape.num_layers if settings.gradient_checkpointing is True else 0
    not_offloaded: list[Offload] = ["none"]  # hpZ and offload of the base need ZeRO-3
    for stage in _allowed_stages(settings, dtype, cluster):
        hpz_sizes = _allowed_hpz_sizes(settings, cluster) if stage == 3 else [1]
        offloads = _allowed_offloads(settings, cluster.hardware) if stage == 3 else not_offloaded
        for (micro, accumulation), hpz_size, offload in product(batches, hpz_sizes, offloads):
            yield Layout(
                zero_stage=stage,
                micro_batch_size=micro,
                accumulation_steps=accumulation,
                checkpointed_layers=all_blocks,
                nodes=cluster.nodes,
                ranks_per_node=cluster.ranks_per_node,
                training_dtype=dtype,
                hpz_partition_size=hpz_size,
                offload_param=offload,
                sequence_parallel_size=size,
            )


def _sequence_parallel_size(settings: RunSettings, cluster: Cluster) -> int:
    """Ranks that share a sequence. Raises UserError if the ranks cannot be grouped like this."""
    if settings.sequence_parallel_size == "auto":
        return 1
    require_groups(settings.sequence_parallel_size, cluster.nodes, cluster.ranks_per_node)
    return settings.sequence_parallel_size


def _allowed_stages(settings: RunSettings, dtype: str, cluster: Cluster) -> list[int]:
    """ZeRO stages that the settings allow and that can be useful."""
    if settings.zero_stage != "auto":
        return [settings.zero_stage]
    # ZeRO-1 accumulates gradients in the training dtype. That is exact enough only in fp32.
    stages = [1, 2] if dtype == "float32" else [2]
    # An int8 base is not sharded by ZeRO-3 (rule 8bit-zero3 in docs/rules.md).
    is_shardable = not settings.load_in_8bit
    may_offload = cluster.hardware.kind == "cuda" and settings.offload_param != "none"
    if is_shardable and (cluster.world_size > 1 or may_offload):
        stages.append(3)
    return stages


def _allowed_hpz_sizes(settings: RunSettings, cluster: Cluster) -> list[int]:
    """Values of hpz_partition_size to try.

    A value above 1 is useful on several nodes: then ZeRO-3's gathers stay within a node.
    """
    if settings.hpz_partition_size != "auto":
        return [settings.hpz_partition_size]
    is_useful = cluster.nodes > 1 and cluster.ranks_per_node > 1
    return [1, cluster.ranks_per_node] if is_useful else [1]


def _allowed_offloads(settings: RunSettings, hardware: Hardware) -> list[Offload]:
    """Values of offload_param to try."""
    if settings.offload_param != "auto":
        return [settings.offload_param]
    return ["none", "cpu"] if hardware.kind == "cuda" else ["none"]


def _with_savings(
    settings: RunSettings, shape: ModelShape, cluster: Cluster, layout: Layout
) -> Iterator[Candidate]:
    """Candidates for a layout: as it is, with tiled MLPs, and with offloaded activations.

    If `mlp_tiles` is `auto`, tiling is tried if blocks have to be checkpointed, because tiling may
    cost less time. If `offload_activations` is `auto`, it is tried if nothing fits without it.
    """
    search = partial(_with_fewest_checkpointed, settings, shape, cluster)
    rank_tokens = settings.max_length / layout.sequence_parallel_size  # of one sequence
    num_tiles = ceil(layout.micro_batch_size * rank_tokens / _TILE_TOKENS)
    has_tileable_mlp = any(block.has_tileable_mlp for block in shape.blocks)
    is_tileable = has_tileable_mlp and rank_tokens >= MIN_TILED_TOKENS
    if settings.mlp_tiles != "auto":
        num_tiles = settings.mlp_tiles
        layout = replace(layout, mlp_tiles=num_tiles)
    may_tile = settings.mlp_tiles == "auto" and is_tileable and num_tiles > 1
    must_offload = settings.offload_activations is True
    if not must_offload or settings.gradient_checkpointing is False:
        untiled = search(layout)
        yield untiled
        fits = untiled.refusal is None
        if may_tile and untiled.layout.checkpointed_layers:
            tiled = search(replace(layout, mlp_tiles=num_tiles))
            yield tiled
            fits |= tiled.refusal is None
        may_offload = (
            settings.offload_activations == "auto"
            and cluster.hardware.kind == "cuda"
            and settings.gradient_checkpointing is not False
        )
        if fits or not may_offload:
            return
    layout = replace(layout, offload_activations=True)
    yield search(layout)
    if may_tile:
        yield search(replace(layout, mlp_tiles=num_tiles))


def _with_fewest_checkpointed(
    settings: RunSettings, shape: ModelShape, cluster: Cluster, layout: Layout
) -> Candidate:
    """The candidate with the fewest checkpointed blocks that fits.

    If none fits on the device, the candidate in which all blocks are checkpointed.
    """
    predict = partial(_predict_candidate, settings, shape, cluster)
    # At ZeRO-3, a 4-bit layer that is not checkpointed keeps its gathered weight until its backward
    # pass (rule 4bit-zero3-unchecked in docs/rules.md).
    keeps_4bit_gathered = layout.is_sharded and settings.load_in_4bit
    checkpoints_all = keeps_4bit_gathered or settings.offload_activations is True
    if checkpoints_all and settings.gradient_checkpointing is not False:
        return predict(replace(layout, checkpointed_layers=shape.num_layers))
    unchanged = predict(layout)
    if unchanged.refusal is None or settings.gradient_checkpointing != "auto":
        return unchanged
    # Bisection: the more blocks are checkpointed, the less device memory is needed. With offload of
    # activations the need of host memory grows, so the fewest blocks are best for the host too.
    low, high = 1, shape.num_layers
    while low < high:
        middle = (low + high) // 2
        need = predict(replace(layout, checkpointed_layers=middle)).memory.device_peak_bytes
        if need <= cluster.device_limit:
            high = middle
        else:
            low = middle + 1
    return predict(replace(layout, checkpointed_layers=low))


def _predict_candidate(
    settings: RunSettings, shape: ModelShape, cluster: Cluster, layout: Layout
) -> Candidate:
    """The candidate for a layout, with its predicted memory and speed."""
    hardware, sequences = cluster.hardware, SequenceProfile(tokens=settings.max_length)
    need = memory(shape, settings, layout, hardware, sequences)
    return Candidate(
        layout=layout,
        memory=need,
        speed=step_seconds(shape, settings, layout, hardware, sequences),
        refusal=_memory_refusal(need, cluster.device_limit, cluster.host_limit),
    )


def _memory_refusal(need: Memory, limit: int, host_limit: int | None) -> str | None:
    """Text about the memory limit that is exceeded, of the device or the host; None if none is."""
    if need.device_peak_bytes > limit:
        is_loading = need.load_peak_bytes > need.peak_bytes
        when = "while loading" if is_loading else f"at {need.worst_moment}"
        return f"needs {need.device_peak_bytes / GIB:.1f} of {limit / GIB:.1f} GiB a rank ({when})"
    if host_limit is not None and need.host_peak_bytes > host_limit:
        size = f"{need.host_peak_bytes / GIB:.1f} of {host_limit / GIB:.1f} GiB"
        return f"needs {size} of a node's host memory"
    return None
