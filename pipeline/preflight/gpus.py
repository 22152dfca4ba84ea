"""Checks of the GPUs: one per rank, assigned by Slurm, equal, enough free memory. No torch."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cluster.devices import compute_capability, visible_handles
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

# GPUs of the Slurm step, else of the job (srun manual, output environment variables).
_GRANTED = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_INDICES = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?")
_REMEDY = "nvidia-smi shows what the driver sees"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as NVML shows it. `cuda`: newest CUDA version of the driver (13000 is 13.0)."""

    uuid: str
    name: str
    driver: str
    cuda: int
    capability: tuple[int, int]
    total: int
    free: int
    processes: tuple[int, ...]


def _probe(context: RankContext) -> dict[str, Any]:
    """This rank's GPU (without a launcher all GPUs), and whether Slurm assigned it to the job.

    Raises UserError for a rank without a GPU.
    """
    import pynvml

    if context.hardware.kind == "cpu":
        if context.missing_gpus is not None:
            raise UserError(
                f"{context.missing_gpus}, and the NVIDIA driver shows none of them; run "
                "nvidia-smi there, or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        return {"gpus": [], "visible": 0, "not_granted": None, "none_requested": False}
    pynvml.nvmlInit()
    try:
        handles = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        own = own_devices(context, len(handles))
        indices = [_index(pynvml, handles[i]) for i in own]
        count = int(pynvml.nvmlDeviceGetCount())
        return {
            "gpus": [asdict(_read(pynvml, handles[i])) for i in own],
            "visible": len(handles),
            "not_granted": not_granted(indices, count, os.environ),
            "none_requested": none_requested(os.environ),
        }
    finally:
        pynvml.nvmlShutdown()


def own_devices(context: RankContext, num_visible: int) -> list[int]:
    """The GPUs that this process uses, as indices into the visible GPUs."""
    place = context.placement
    if place.world_size == 1 and not context.is_training:
        return list(range(num_visible))
    # A scheduler may show each process only its own GPU, which is then index 0.
    index = 0 if num_visible == 1 and place.local_size > 1 else place.local_rank
    if index >= num_visible:
        raise UserError(
            f"this node shows {num_visible} GPUs and {place.local_size} ranks were started on "
            "it; start one rank per GPU"
        )
    return [index]


def not_granted(
    indices: Iterable[int | None], count: int, env: Mapping[str, str]
) -> dict[str, str] | None:
    """The GPUs in use and the GPUs that Slurm granted, if a GPU in use was not granted.

    `count`: GPUs that NVML shows. If Slurm hides the other GPUs with a control group, NVML numbers
    the granted ones from 0, so that indices cannot be compared; `count` is then at most the number
    granted.
    """
    name = next((name for name in _GRANTED if env.get(name)), None)
    if name is None:
        return None
    granted = indices_of(env[name])
    used = {index for index in indices if index is not None}
    if granted is None or count <= len(granted) or used <= granted:
        return None
    return {"used": str(sorted(used)), "granted": f"{name}={env[name]}"}


def none_requested(env: Mapping[str, str]) -> bool:
    """Whether this Slurm job requested no GPU; true too if the cluster allocates whole nodes."""
    names = (*_GRANTED, "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "SLURM_GPUS_ON_NODE")
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
    if not (gpus := _by_rank(results)):
        yield ok("CPU ranks; no GPU is used")
        return
    findings = [
        *_shared(results, gpus),
        *_foreign(results),
        *_unrequested(results),
        *_idle(results, gpus),
        *_mixed(results, gpus),
    ]
    if findings:
        yield from findings
        return
    first, total = next(iter(gpus.values()))[0], sum(len(own) for own in gpus.values())
    yield ok(f"{total} x {first['name']}, no two ranks use the same one")


def _shared(results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]) -> Iterable[Finding]:
    users: dict[str, list[int]] = {}
    for rank, own in gpus.items():
        for gpu in own:
            users.setdefault(gpu["uuid"], []).append(rank)
    for uuid, ranks in users.items():
        if len(ranks) > 1:
            yield fail(
                f"{results.where(ranks)} share one GPU ({uuid})",
                "start one rank per GPU; check CUDA_VISIBLE_DEVICES and the launcher's count",
                ranks,
            )


def _foreign(results: ProbeResults) -> Iterable[Finding]:
    for rank, result in results.by_rank.items():
        if (gpus := result["not_granted"]) is not None:
            yield fail(
                f"{results.where([rank])} uses GPU {gpus['used']}, Slurm granted {gpus['granted']}",
                "leave CUDA_VISIBLE_DEVICES as Slurm set it and start `deepspeed` without "
                "--num_gpus and --include, which overwrite it",
                [rank],
            )


def _unrequested(results: ProbeResults) -> Iterable[Finding]:
    if ranks := [rank for rank, result in results.by_rank.items() if result["none_requested"]]:
        yield warn(
            f"{results.where(ranks)}: the Slurm job requested no GPU, so another job may use it",
            "--gpus-per-node=N, unless this cluster allocates whole nodes",
            ranks,
        )


def _idle(results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]) -> Iterable[Finding]:
    """Nodes on which more GPUs are visible than the ranks use."""
    if len(results.hosts) == 1:
        return  # a single process is meant to use one GPU
    used = dict.fromkeys(results.hosts, 0)
    for rank, own in gpus.items():
        used[results.hosts[rank]] += len(own)
    ranks = [r for r in gpus if results.by_rank[r]["visible"] > used[results.hosts[r]]]
    if ranks:
        visible = results.by_rank[ranks[0]]["visible"]
        yield warn(
            f"{results.where(ranks)}: {visible} GPUs are visible on a node and "
            f"{used[results.hosts[ranks[0]]]} are used",
            "start one rank per GPU (in a pod: `torchrun launch/train.py RUN.yaml`), or hide the "
            "others with CUDA_VISIBLE_DEVICES",
            ranks,
        )


def _mixed(results: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]) -> Iterable[Finding]:
    names = ranks_by_value({rank: gpu["name"] for rank, own in gpus.items() for gpu in own})
    if len(names) > 1:
        kinds = "; ".join(f"{name}: {results.where(ranks)}" for name, ranks in names.items())
        yield warn(f"different GPUs: {kinds}", "the slowest sets the pace; request one kind")


def _assess_drivers(results: ProbeResults) -> Iterable[Finding]:
    drivers = {
        rank: f"driver {own[0]['driver']}, CUDA up to {own[0]['cuda'] / 1000:.1f}, "
        f"compute capability {'.'.join(map(str, own[0]['capability']))}"
        for rank, own in _by_rank(results).items()
    }
    groups = ranks_by_value(drivers)
    if len(groups) > 1:
        text = "; ".join(f"{driver}: {results.where(ranks)}" for driver, ranks in groups.items())
        yield warn(text, "NVIDIA does not test NCCL across drivers; request nodes of one kind")
    else:
        yield from (ok(text) for text in groups)


def _assess_memory(results: ProbeResults) -> Iterable[Finding]:
    gpus = _by_rank(results)
    if not gpus or results.plan is None:
        return
    need = results.plan.memory.device_need
    short = {rank: gpu for rank, own in gpus.items() for gpu in own if gpu["free"] < need}
    for rank, gpu in short.items():
        pids = ", ".join(map(str, gpu["processes"])) or "not shown to this user"
        yield fail(
            f"{results.where([rank])}: {in_units(gpu['free'])} of {in_units(gpu['total'])} free, "
            f"the plan needs {in_units(need)}; processes on it: {pids}",
            "end the processes on it (nvidia-smi), or request GPUs for this job alone",
            [rank],
        )
    if not short:
        least = min(gpu["free"] for own in gpus.values() for gpu in own)
        yield ok(f"{in_units(least)} or more free, the plan needs {in_units(need)}")


def _by_rank(results: ProbeResults) -> dict[int, list[dict[str, Any]]]:
    return {rank: result["gpus"] for rank, result in results.by_rank.items() if result["gpus"]}


def _read(pynvml: Any, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = []
    with suppress(pynvml.NVMLError):  # not shown in some containers, nor for a MIG instance
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


def _index(pynvml: Any, handle: Any) -> int | None:
    with suppress(pynvml.NVMLError):  # a MIG instance has no index
        return int(pynvml.nvmlDeviceGetIndex(handle))
    return None


GPUS = Check("gpus", _probe, _assess_gpus, _REMEDY, needs="nothing")
DRIVERS = Check("drivers", _probe, _assess_drivers, _REMEDY, needs="nothing")
GPU_MEMORY = Check("gpu memory", _probe, _assess_memory, _REMEDY)
