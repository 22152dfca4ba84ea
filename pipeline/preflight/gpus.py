"""Checks of GPUs, without torch: use by one rank, Slurm allocation, model, driver, free memory."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cluster.devices import compute_capability, visible_handles
from pipeline.cluster.placement import device_index
from pipeline.commands import script
from pipeline.errors import UserError
from pipeline.preflight.check import (
    Check,
    Finding,
    ProbeResults,
    fail,
    format_bytes,
    ok,
    ranks_by_value,
    warn,
)
from pipeline.preflight.context import RankContext

# Variables with the indices of the GPUs that Slurm allocated to the job step. If the first is not
# set, the second has the GPUs of the whole job (srun manual, output environment variables).
_ALLOCATION_VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_INDEX_RANGE = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?")  # 2 or 0-3
_REMEDY = "run nvidia-smi, which lists the GPUs that the driver detects"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as NVML, the library behind nvidia-smi, describes it.

    `driver`: version of the NVIDIA driver. `cuda`: newest CUDA version that the driver supports;
    13000 means 13.0. `capability`: compute capability, such as (9, 0). `total` and `free`: bytes of
    memory. `processes`: ids of the processes that use the GPU.
    """

    uuid: str
    name: str
    driver: str
    cuda: int
    capability: tuple[int, int]
    total: int
    free: int
    processes: tuple[int, ...]


def _probe_gpus(context: RankContext) -> dict[str, Any]:
    """The GPU of this rank, or all GPUs of the node without a launcher, and Slurm's allocation.

    Raises UserError if this process should have GPUs and the driver detects none.
    """
    import pynvml

    if context.hardware.kind == "cpu":
        if context.missing_gpus is not None:
            raise UserError(
                f"{context.missing_gpus}, but the NVIDIA driver detects none of them; run "
                "nvidia-smi on this node, or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        return {"gpus": [], "visible": 0, "unallocated_gpus": None, "requests_no_gpu": False}
    pynvml.nvmlInit()
    try:
        handles = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        used = [handles[i] for i in used_gpu_indices(context, len(handles))]
        indices = [_nvml_index(pynvml, handle) for handle in used]
        num_listed = int(pynvml.nvmlDeviceGetCount())
        return {
            "gpus": [asdict(_describe_gpu(pynvml, handle)) for handle in used],
            "visible": len(handles),
            "unallocated_gpus": unallocated_gpus(indices, num_listed, os.environ),
            "requests_no_gpu": requests_no_gpu(os.environ),
        }
    finally:
        pynvml.nvmlShutdown()


def used_gpu_indices(context: RankContext, num_visible: int) -> list[int]:
    """The GPUs that this process uses, as indices into the visible GPUs."""
    if context.placement.world_size == 1 and not context.is_training:
        return list(range(num_visible))
    return [device_index(context.placement, num_visible)]


def unallocated_gpus(
    indices: Iterable[int | None], num_listed: int, env: Mapping[str, str]
) -> dict[str, str] | None:
    """The used and the allocated GPUs as texts, if a GPU is used that Slurm did not allocate.

    None if all used GPUs are allocated, or if this cannot be determined. `indices`: NVML indices of
    the used GPUs. `num_listed`: number of GPUs that NVML lists. If Slurm hides other jobs' GPUs
    with a cgroup, NVML lists only the allocated GPUs and numbers them from 0. Their indices
    then differ from Slurm's and cannot be compared.
    """
    name = next((name for name in _ALLOCATION_VARIABLES if env.get(name)), None)
    if name is None:
        return None
    allocated = parse_gpu_indices(env[name])
    if allocated is None or num_listed <= len(allocated):
        return None
    used = {index for index in indices if index is not None}
    if used <= allocated:
        return None
    return {"used": str(sorted(used)), "allocated": f"{name}={env[name]}"}


def requests_no_gpu(env: Mapping[str, str]) -> bool:
    """Whether this Slurm job requested no GPU, as is usual if the cluster allocates whole nodes."""
    names = (
        *_ALLOCATION_VARIABLES, "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "SLURM_GPUS_ON_NODE",
    )  # fmt: skip
    return "SLURM_JOB_ID" in env and not any(env.get(name) for name in names)


def parse_gpu_indices(text: str) -> set[int] | None:
    """The indices in a list such as Slurm's `0,2` or `0-3`; None for any other text."""
    indices = set[int]()
    for entry in text.split(","):
        if (match := _INDEX_RANGE.fullmatch(entry.strip())) is None:
            return None
        first, last = match["first"], match["last"] or match["first"]
        indices |= set(range(int(first), int(last) + 1))
    return indices


def _assess_gpus(results: ProbeResults) -> Iterable[Finding]:
    if not (gpus := _gpus_by_rank(results)):
        yield ok("CPU ranks; no GPU is used")
        return
    findings = [
        *_shared_gpus(results, gpus),
        *_unallocated_gpus(results),
        *_unrequested_gpus(results),
        *_unused_gpus(results, gpus),
        *_different_gpus(results, gpus),
    ]
    if findings:
        yield from findings
        return
    first_gpu = next(iter(gpus.values()))[0]
    num_gpus = sum(len(rank_gpus) for rank_gpus in gpus.values())
    yield ok(f"{num_gpus} x {first_gpu['name']}, each used by one rank")


def _shared_gpus(
    results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]
) -> Iterable[Finding]:
    """A failure for each GPU that several ranks use. `gpus`: the GPUs of each rank."""
    ranks_by_uuid: dict[str, list[int]] = {}
    for rank, rank_gpus in gpus.items():
        for gpu in rank_gpus:
            ranks_by_uuid.setdefault(gpu["uuid"], []).append(rank)
    for uuid, ranks in ranks_by_uuid.items():
        if len(ranks) > 1:
            yield fail(
                f"{results.name_ranks(ranks)} use the same GPU ({uuid})",
                "start one rank per GPU; check CUDA_VISIBLE_DEVICES and the launcher's number of "
                "processes",
                ranks,
            )


def _unallocated_gpus(results: ProbeResults) -> Iterable[Finding]:
    for rank, result in results.by_rank.items():
        if (gpus := result["unallocated_gpus"]) is not None:
            yield fail(
                f"{results.name_ranks([rank])} uses GPU {gpus['used']}, but Slurm allocated "
                f"{gpus['allocated']}",
                "leave CUDA_VISIBLE_DEVICES as Slurm set it and start `deepspeed` without "
                "--num_gpus and --include, which overwrite it",
                [rank],
            )


def _unrequested_gpus(results: ProbeResults) -> Iterable[Finding]:
    if ranks := [rank for rank, result in results.by_rank.items() if result["requests_no_gpu"]]:
        yield warn(
            f"{results.name_ranks(ranks)}: the Slurm job requested no GPU, so other jobs may use "
            "the same GPUs",
            "request GPUs with --gpus-per-node=N, unless this cluster allocates whole nodes",
            ranks,
        )


def _unused_gpus(
    results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]
) -> Iterable[Finding]:
    """A warning if more GPUs are visible on a node than its ranks use."""
    if len(results.hosts) == 1:
        return  # a single process uses one GPU on purpose
    num_used = dict.fromkeys(results.hosts, 0)  # host name -> number of GPUs that its ranks use
    for rank, rank_gpus in gpus.items():
        num_used[results.hosts[rank]] += len(rank_gpus)
    ranks = [
        rank for rank in gpus if results.by_rank[rank]["visible"] > num_used[results.hosts[rank]]
    ]
    if ranks:
        visible = results.by_rank[ranks[0]]["visible"]
        yield warn(
            f"{results.name_ranks(ranks)}: {visible} GPUs are visible on a node, but only "
            f"{num_used[results.hosts[ranks[0]]]} are used",
            f"start one rank per GPU (in a pod: `torchrun {script('train')} RUN.yaml`), or hide "
            "the other GPUs with CUDA_VISIBLE_DEVICES",
            ranks,
        )


def _different_gpus(
    results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]
) -> Iterable[Finding]:
    """A warning if the ranks have GPUs with different model names."""
    names = {rank: gpu["name"] for rank, rank_gpus in gpus.items() for gpu in rank_gpus}
    groups = ranks_by_value(names)
    if len(groups) > 1:
        text = "; ".join(f"{name}: {results.name_ranks(ranks)}" for name, ranks in groups.items())
        yield warn(
            f"different GPUs: {text}",
            "request GPUs of one kind; otherwise all ranks wait for the slowest",
        )


def _assess_drivers(results: ProbeResults) -> Iterable[Finding]:
    drivers = {}
    for rank, rank_gpus in _gpus_by_rank(results).items():
        gpu = rank_gpus[0]
        capability = ".".join(map(str, gpu["capability"]))
        drivers[rank] = (
            f"driver {gpu['driver']}, CUDA up to {gpu['cuda'] / 1000:.1f}, compute capability "
            f"{capability}"
        )
    groups = ranks_by_value(drivers)
    if len(groups) > 1:
        text = "; ".join(
            f"{driver}: {results.name_ranks(ranks)}" for driver, ranks in groups.items()
        )
        yield warn(
            text,
            "request nodes with the same driver; NVIDIA does not test NCCL with different drivers",
        )
    else:
        yield from (ok(text) for text in groups)


def _assess_memory(results: ProbeResults) -> Iterable[Finding]:
    gpus = _gpus_by_rank(results)
    if not gpus or results.plan is None:
        return
    need = results.plan.memory.device_peak_bytes
    pairs = [(rank, gpu) for rank, rank_gpus in gpus.items() for gpu in rank_gpus]
    short_of_memory = {rank: gpu for rank, gpu in pairs if gpu["free"] < need}
    for rank, gpu in short_of_memory.items():
        pids = ", ".join(map(str, gpu["processes"])) or "not shown to this user"
        yield fail(
            f"{results.name_ranks([rank])}: {format_bytes(gpu['free'])} of "
            f"{format_bytes(gpu['total'])} free, the plan needs {format_bytes(need)}; processes on "
            f"this GPU: {pids}",
            "end these processes (nvidia-smi), or request GPUs for this job alone",
            [rank],
        )
    if not short_of_memory:
        least = min(gpu["free"] for _, gpu in pairs)
        yield ok(f"at least {format_bytes(least)} free, the plan needs {format_bytes(need)}")


def _gpus_by_rank(results: ProbeResults) -> dict[int, list[dict[str, Any]]]:
    """The GPUs of each rank that has some; each GPU is a `Gpu` as a dictionary."""
    return {rank: result["gpus"] for rank, result in results.by_rank.items() if result["gpus"]}


def _describe_gpu(pynvml: Any, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = []
    with suppress(pynvml.NVMLError):  # not available in some containers and for MIG instances
        processes = [int(p.pid) for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    return Gpu(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        driver=str(pynvml.nvmlSystemGetDriverVersion()),
        cuda=int(pynvml.nvmlSystemGetCudaDriverVersion()),
        capability=compute_capability(pynvml, handle),
        total=int(memory.total),
        free=int(memory.free),
        processes=tuple(processes),
    )


def _nvml_index(pynvml: Any, handle: Any) -> int | None:
    with suppress(pynvml.NVMLError):  # a MIG instance has no index
        return int(pynvml.nvmlDeviceGetIndex(handle))
    return None


GPUS = Check("gpus", _probe_gpus, _assess_gpus, _REMEDY, needs="nothing")
DRIVERS = Check("drivers", _probe_gpus, _assess_drivers, _REMEDY, needs="nothing")
GPU_MEMORY = Check("gpu memory", _probe_gpus, _assess_memory, _REMEDY)
