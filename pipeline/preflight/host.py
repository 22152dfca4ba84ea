"""Host memory and shared memory of each machine. No torch."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.cluster.host_memory import host_memory
from pipeline.preflight.check import Finding, ProbeResults, fail, in_units, ok, warn
from pipeline.preflight.context import RankContext

_MIB = 2**20
_SHARED_MEMORY = Path("/dev/shm")
# What NVIDIA's and PyTorch's containers ask for (`--shm-size=1g`); Docker's default is 64 MiB.
_SHARED_BYTES = 2**30


def probe_host_memory(context: RankContext) -> dict[str, Any]:
    """Bytes that a node of the run needs, that are free, and that there are at most."""
    found = host_memory()
    total, limited_by = found.total, found.limited_by
    if (granted := granted_by_slurm(os.environ)) is not None and granted < total:
        total, limited_by = granted, "what Slurm granted (--mem)"
    return {
        "need": context.known_plan.memory.host_peak_bytes,
        "free": min(found.free, total),
        "total": total,
        "limited_by": limited_by,
    }


def granted_by_slurm(env: Mapping[str, str]) -> int | None:
    """Bytes of this node that are the job's; None where Slurm does not say or gave all of it.

    Slurm sets one of the three, in MiB (sbatch, output environment variables).
    """
    for name, count in (
        ("SLURM_MEM_PER_NODE", "1"),
        ("SLURM_MEM_PER_CPU", env.get("SLURM_CPUS_ON_NODE", "")),
        ("SLURM_MEM_PER_GPU", env.get("SLURM_GPUS_ON_NODE", "")),
    ):
        each = env.get(name, "")
        if each.isdigit() and count.isdigit() and int(each) > 0:  # 0: the whole node
            return int(each) * int(count) * _MIB
    return None


def assess_host_memory(seen: ProbeResults) -> Iterable[Finding]:
    """What the plan reckons with is there; part of that is assumed, so less free is a warning."""
    least = min(seen.answers.values(), key=lambda answer: answer["free"])
    is_good = True
    for rank, answer in seen.answers.items():
        need, free, total = (in_units(answer[name]) for name in ("need", "free", "total"))
        limit = f" (limit: {answer['limited_by']})" if answer["limited_by"] else ""
        text = f"{seen.hosts[rank]}: {free} of {total} free{limit}, the plan reckons"
        if answer["total"] < answer["need"]:
            is_good = False
            yield fail(
                f"{text} with {need}",
                "ask for more memory (--mem), or for fewer ranks a machine",
                [rank],
            )
        elif answer["free"] < answer["need"]:
            is_good = False
            yield warn(
                f"{text} with {need}",
                "end what else runs there, or ask for more memory (--mem)",
                [rank],
            )
    if is_good:
        yield ok(
            f"{in_units(least['free'])} or more free, the plan reckons with "
            f"{in_units(least['need'])}"
        )


def probe_shared_memory(context: RankContext) -> int | None:
    """Free bytes of /dev/shm, through which NCCL and data workers of one machine talk."""
    del context
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def assess_shared_memory(seen: ProbeResults) -> Iterable[Finding]:
    """A container's default is too small for either."""
    known = {rank: free for rank, free in seen.answers.items() if free is not None}
    short = {rank: free for rank, free in known.items() if free < _SHARED_BYTES}
    for rank, free in short.items():
        yield warn(
            f"{seen.hosts[rank]}: /dev/shm has {in_units(free)} free; data workers or NCCL "
            "may end with a bus error",
            "start the container with --shm-size=1g or more (or --ipc=host)",
            [rank],
        )
    if known and not short:
        yield ok(f"/dev/shm has {in_units(min(known.values()))} or more free")
