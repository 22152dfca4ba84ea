"""The GPU of each rank: its own, granted by the scheduler, new enough, and free. By NVML, no torch.

Not measured on a GPU: the judgements are tested on made-up answers, the reading through a stand-in
for NVML.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cluster.devices import visible_handles
from pipeline.errors import UserError
from pipeline.preflight.check import Finding, ProbeResults, by_answer, fail, in_units, ok, warn
from pipeline.preflight.context import RankContext

# Numbers of the node's GPUs that Slurm gave to the step or the job (Slurm: srun, sbatch).
_GRANTED = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_NUMBERS = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as NVML shows it. `cuda` is the newest CUDA that the driver runs: 13000 is 13.0."""

    uuid: str
    name: str
    driver: str
    cuda: int
    capability: tuple[int, int]
    total: int
    free: int
    processes: tuple[int, ...]


def probe_gpus(context: RankContext) -> dict[str, Any]:
    """This rank's GPU, or without a launcher all of them; and whether the scheduler granted them.

    Raises UserError for a rank that has none.
    """
    import pynvml

    if context.hardware.kind == "cpu":
        if context.missing_gpus is not None:
            raise UserError(
                f"{context.missing_gpus}, and the driver shows none of them; look at nvidia-smi "
                "there, or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        return {"gpus": [], "stranger": None, "is_unasked": False}
    pynvml.nvmlInit()
    try:
        handles = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        own = own_devices(context, len(handles))
        indices = [_index(pynvml, handles[i]) for i in own]
        count = int(pynvml.nvmlDeviceGetCount())
        return {
            "gpus": [asdict(_read(pynvml, handles[i])) for i in own],
            "stranger": not_granted(indices, count, os.environ),
            "is_unasked": none_asked(os.environ),
        }
    finally:
        pynvml.nvmlShutdown()


def own_devices(context: RankContext, num_visible: int) -> list[int]:
    """Numbers, among the visible GPUs, of those that this process answers for."""
    place = context.placement
    if place.world_size == 1 and not context.is_training:
        return list(range(num_visible))
    # A scheduler may show every process its own GPU only, which is then number 0.
    index = 0 if num_visible == 1 and place.local_size > 1 else place.local_rank
    if index >= num_visible:
        raise UserError(
            f"this machine shows {num_visible} GPUs and {place.local_size} ranks were started on "
            "it; start one rank a GPU"
        )
    return [index]


def not_granted(
    indices: Iterable[int | None], count: int, env: Mapping[str, str]
) -> dict[str, str] | None:
    """What is used and what Slurm granted, where the first is not part of the second.

    A control group that hides all other GPUs leaves as many as were granted, numbered anew.
    """
    name = next((name for name in _GRANTED if env.get(name)), None)
    if name is None:
        return None
    granted = numbers_of(env[name])
    used = {index for index in indices if index is not None}
    if granted is None or count <= len(granted) or used <= granted:
        return None
    return {"used": str(sorted(used)), "granted": f"{name}={env[name]}"}


def none_asked(env: Mapping[str, str]) -> bool:
    """Whether this is a Slurm job that speaks of no GPU. Where nodes are given whole that is so."""
    names = (*_GRANTED, "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "SLURM_GPUS_ON_NODE")
    return "SLURM_JOB_ID" in env and not any(env.get(name) for name in names)


def numbers_of(listed: str) -> set[int] | None:
    """Numbers as Slurm lists them: `0,2` or `0-3`; None for what is no such list."""
    numbers = set[int]()
    for entry in listed.split(","):
        if (found := _NUMBERS.fullmatch(entry.strip())) is None:
            return None
        first, last = found["first"], found["last"] or found["first"]
        numbers |= set(range(int(first), int(last) + 1))
    return numbers


def assess_gpus(seen: ProbeResults) -> Iterable[Finding]:
    """One GPU a rank, each another one, of one kind, and granted."""
    if not (gpus := _by_rank(seen)):
        yield ok("CPU ranks; no GPU is used")
        return
    findings = [*_shared(seen, gpus), *_strangers(seen), *_unasked(seen), *_mixed(seen, gpus)]
    if findings:
        yield from findings
        return
    first, total = next(iter(gpus.values()))[0], sum(len(own) for own in gpus.values())
    yield ok(f"{total} x {first['name']}, each with a UUID of its own")


def _shared(seen: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]) -> Iterable[Finding]:
    users: dict[str, list[int]] = {}
    for rank, own in gpus.items():
        for gpu in own:
            users.setdefault(gpu["uuid"], []).append(rank)
    for uuid, ranks in users.items():
        if len(ranks) > 1:
            yield fail(
                f"{seen.where(ranks)} share one GPU ({uuid})",
                "start one rank a GPU; look at CUDA_VISIBLE_DEVICES and at the launcher's count",
                ranks,
            )


def _strangers(seen: ProbeResults) -> Iterable[Finding]:
    for rank, answer in seen.answers.items():
        if (found := answer["stranger"]) is not None:
            yield fail(
                f"{seen.where([rank])} uses GPU {found['used']}, Slurm granted {found['granted']}",
                "leave CUDA_VISIBLE_DEVICES as Slurm set it and start `deepspeed` without "
                "--num_gpus and --include, which forget it",
                [rank],
            )


def _unasked(seen: ProbeResults) -> Iterable[Finding]:
    if ranks := [rank for rank, answer in seen.answers.items() if answer["is_unasked"]]:
        yield warn(
            f"{seen.where(ranks)}: the Slurm job asked for no GPU, so another's may be used",
            "--gpus-per-node=N; unless this cluster gives nodes whole",
            ranks,
        )


def _mixed(seen: ProbeResults, gpus: Mapping[int, list[dict[str, Any]]]) -> Iterable[Finding]:
    names = by_answer({rank: gpu["name"] for rank, own in gpus.items() for gpu in own})
    if len(names) > 1:
        said = "; ".join(f"{name}: {seen.where(ranks)}" for name, ranks in names.items())
        yield warn(f"different GPUs: {said}", "the slowest sets the pace; ask for one kind")


def assess_drivers(seen: ProbeResults) -> Iterable[Finding]:
    """One driver and one compute capability."""
    gpus = _by_rank(seen)
    said = {
        rank: f"driver {own[0]['driver']}, CUDA up to {own[0]['cuda'] / 1000:.1f}, "
        f"compute capability {'.'.join(map(str, own[0]['capability']))}"
        for rank, own in gpus.items()
    }
    groups = by_answer(said)
    if len(groups) > 1:
        text = "; ".join(f"{what}: {seen.where(ranks)}" for what, ranks in groups.items())
        yield warn(text, "NCCL across drivers is not tested by NVIDIA; ask for machines alike")
    else:
        yield from (ok(text) for text in groups)


def assess_device_memory(seen: ProbeResults) -> Iterable[Finding]:
    """Free memory of every GPU holds what the plan needs."""
    gpus = _by_rank(seen)
    if not gpus or seen.plan is None:
        return
    need, least = seen.plan.memory.device_need, min(g["free"] for own in gpus.values() for g in own)
    short = {rank: gpu for rank, own in gpus.items() for gpu in own if gpu["free"] < need}
    for rank, gpu in short.items():
        pids = ", ".join(map(str, gpu["processes"])) or "not shown to this user"
        yield fail(
            f"{seen.where([rank])}: {in_units(gpu['free'])} of {in_units(gpu['total'])} free, "
            f"the plan needs {in_units(need)}; processes on it: {pids}",
            "end what holds it (nvidia-smi), or ask for GPUs of your own",
            [rank],
        )
    if not short:
        yield ok(f"{in_units(least)} or more free, the plan needs {in_units(need)}")


def _by_rank(seen: ProbeResults) -> dict[int, list[dict[str, Any]]]:
    return {rank: answer["gpus"] for rank, answer in seen.answers.items() if answer["gpus"]}


def _read(pynvml: Any, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    processes = []
    with suppress(pynvml.NVMLError):  # a container or a MIG slice may not be shown them
        processes = [int(p.pid) for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    return Gpu(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        driver=str(pynvml.nvmlSystemGetDriverVersion()),
        cuda=int(pynvml.nvmlSystemGetCudaDriverVersion()),
        capability=(int(major), int(minor)),
        total=int(memory.total),
        free=int(memory.free),
        processes=tuple(processes),
    )


def _index(pynvml: Any, handle: Any) -> int | None:
    with suppress(pynvml.NVMLError):  # a MIG slice has no number of its own
        return int(pynvml.nvmlDeviceGetIndex(handle))
    return None
