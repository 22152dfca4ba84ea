"""Checks of GPUs: one per rank, allocated by Slurm, equal, with enough free memory. No torch."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cluster.devices import compute_capability, visible_handles
from pipeline.cluster.placement import device_index
from pipeline.errors import UserError
from pipeline.preflight.check import (
    Check,
    Finding,
    ProbeResults,
    fail,
    in_units,
    ok,
    ranks_by_value,
    warn,
)
from pipeline.preflight.context import RankContext

# Variables with the GPUs that Slurm allocated to the step or, if the first is not set, to the job
# (srun manual, output environment variables).
_ALLOCATED = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_INDICES = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?")
_REMEDY = "run nvidia-smi, which lists the GPUs that the driver detects"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as NVML describes it.

    `cuda`: newest CUDA version that the driver supports (13000 means 13.0). `total` and `free`:
    bytes of memory. `processes`: ids of the processes that use the GPU.
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
    """The GPU of this rank (without a launcher: all GPUs), compared with Slurm's allocation.

    Raises UserError for a rank without a GPU.
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
        own = own_devices(context, len(handles))
        indices = [_index_of(pynvml, handles[i]) for i in own]
        count = int(pynvml.nvmlDeviceGetCount())
        return {
            "gpus": [asdict(_gpu_of(pynvml, handles[i])) for i in own],
            "visible": len(handles),
            "unallocated_gpus": unallocated_gpus(indices, count, os.environ),
            "requests_no_gpu": requests_no_gpu(os.environ),
        }
    finally:
        pynvml.nvmlShutdown()


def own_devices(context: RankContext, num_visible: int) -> list[int]:
    """The GPUs that this process uses, as indices into the visible GPUs."""
    place = context.placement
    if place.world_size == 1 and not context.is_training:
        return list(range(num_visible))
    return [device_index(place, num_visible)]


def unallocated_gpus(
    indices: Iterable[int | None], count: int, env: Mapping[str, str]
) -> dict[str, str] | None:
    """The used and the allocated GPUs, if a GPU is used that Slurm did not allocate; else None.

    `indices`: GPUs that are used. `count`: number of GPUs that NVML lists. It is at most the number
    of allocated GPUs if Slurm hides all others with a control group. Then NVML numbers the
    allocated GPUs from 0, so their indices cannot be compared with Slurm's.
    """
    name = next((name for name in _ALLOCATED if env.get(name)), None)
    if name is None:
        return None
    allocated = indices_of(env[name])
    used = {index for index in indices if index is not None}
    if allocated is None or count <= len(allocated) or used <= allocated:
        return None
    return {"used": str(sorted(used)), "allocated": f"{name}={env[name]}"}


def requests_no_gpu(env: Mapping[str, str]) -> bool:
    """Whether this Slurm job requested no GPU, as is usual if the cluster allocates whole nodes."""
    names = (*_ALLOCATED, "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "SLURM_GPUS_ON_NODE")
    return "SLURM_JOB_ID" in env and not any(env.get(name) for name in names)


def indices_of(text: str) -> set[int] | None:
    """The indices in a list such as Slurm's `0,2` or `0-3`; None for any other text."""
    indices = set[int]()
    for entry in text.split(","):
        if (match := _INDICES.fullmatch(entry.strip())) is None:
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
    first, total = next(iter(gpus.values()))[0], sum(len(own) for own in gpus.values())
    yield ok(f"{total} x {first['name']}, each used by one rank")


def _shared_gpus(
    results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]
) -> Iterable[Finding]:
    users: dict[str, list[int]] = {}
    for rank, own in gpus.items():
        for gpu in own:
            users.setdefault(gpu["uuid"], []).append(rank)
    for uuid, ranks in users.items():
        if len(ranks) > 1:
            yield fail(
                f"{results.where(ranks)} use the same GPU ({uuid})",
                "start one rank per GPU; check CUDA_VISIBLE_DEVICES and the launcher's number of "
                "processes",
                ranks,
            )


def _unallocated_gpus(results: ProbeResults) -> Iterable[Finding]:
    for rank, result in results.by_rank.items():
        if (gpus := result["unallocated_gpus"]) is not None:
            yield fail(
                f"{results.where([rank])} uses GPU {gpus['used']}, but Slurm allocated "
                f"{gpus['allocated']}",
                "leave CUDA_VISIBLE_DEVICES as Slurm set it and start `deepspeed` without "
                "--num_gpus and --include, which overwrite it",
                [rank],
            )


def _unrequested_gpus(results: ProbeResults) -> Iterable[Finding]:
    if ranks := [rank for rank, result in results.by_rank.items() if result["requests_no_gpu"]]:
        yield warn(
            f"{results.where(ranks)}: the Slurm job requested no GPU, so other jobs may use the "
            "same ones",
            "request GPUs with --gpus-per-node=N, unless this cluster allocates whole nodes",
            ranks,
        )


def _unused_gpus(
    results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]
) -> Iterable[Finding]:
    """A warning if more GPUs are visible on a node than its ranks use."""
    if len(results.hosts) == 1:
        return  # a single process uses one GPU on purpose
    used = dict.fromkeys(results.hosts, 0)
    for rank, own in gpus.items():
        used[results.hosts[rank]] += len(own)
    ranks = [r for r in gpus if results.by_rank[r]["visible"] > used[results.hosts[r]]]
    if ranks:
        visible = results.by_rank[ranks[0]]["visible"]
        yield warn(
            f"{results.where(ranks)}: {visible} GPUs are visible on a node, but only "
            f"{used[results.hosts[ranks[0]]]} are used",
            "start one rank per GPU (in a pod: `torchrun launch/train.py RUN.yaml`), or hide the "
            "other GPUs with CUDA_VISIBLE_DEVICES",
            ranks,
        )


def _different_gpus(
    results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]
) -> Iterable[Finding]:
    names = ranks_by_value({rank: gpu["name"] for rank, own in gpus.items() for gpu in own})
    if len(names) > 1:
        kinds = "; ".join(f"{name}: {results.where(ranks)}" for name, ranks in names.items())
        yield warn(
            f"different GPUs: {kinds}",
            "request GPUs of one kind; otherwise all ranks wait for the slowest",
        )


def _assess_drivers(results: ProbeResults) -> Iterable[Finding]:
    drivers = {
        rank: f"driver {own[0]['driver']}, CUDA up to {own[0]['cuda'] / 1000:.1f}, "
        f"compute capability {'.'.join(map(str, own[0]['capability']))}"
        for rank, own in _gpus_by_rank(results).items()
    }
    groups = ranks_by_value(drivers)
    if len(groups) > 1:
        text = "; ".join(f"{driver}: {results.where(ranks)}" for driver, ranks in groups.items())
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
    need = results.plan.memory.device_need
    short = {rank: gpu for rank, own in gpus.items() for gpu in own if gpu["free"] < need}
    for rank, gpu in short.items():
        pids = ", ".join(map(str, gpu["processes"])) or "not shown to this user"
        yield fail(
            f"{results.where([rank])}: {in_units(gpu['free'])} of {in_units(gpu['total'])} free, "
            f"the plan needs {in_units(need)}; processes on this GPU: {pids}",
            "end these processes (nvidia-smi), or request GPUs for this job alone",
            [rank],
        )
    if not short:
        least = min(gpu["free"] for own in gpus.values() for gpu in own)
        yield ok(f"at least {in_units(least)} free, the plan needs {in_units(need)}")


def _gpus_by_rank(results: ProbeResults) -> dict[int, list[dict[str, Any]]]:
    return {rank: result["gpus"] for rank, result in results.by_rank.items() if result["gpus"]}


def _gpu_of(pynvml: Any, handle: Any) -> Gpu:
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


def _index_of(pynvml: Any, handle: Any) -> int | None:
    with suppress(pynvml.NVMLError):  # a MIG instance has no index
        return int(pynvml.nvmlDeviceGetIndex(handle))
    return None


GPUS = Check("gpus", _probe_gpus, _assess_gpus, _REMEDY, needs="nothing")
DRIVERS = Check("drivers", _probe_gpus, _assess_drivers, _REMEDY, needs="nothing")
GPU_MEMORY = Check("gpu memory", _probe_gpus, _assess_memory, _REMEDY)
