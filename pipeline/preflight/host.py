"""Checks of a node: memory, disk, clock, and the run folder that all nodes share. No torch."""

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cluster.host_memory import host_memory
from pipeline.errors import UserError
from pipeline.files import closest_existing, write_text
from pipeline.plan.cost.memory import disk_bytes
from pipeline.preflight.check import Check, Finding, ProbeResults, fail, in_units, ok, warn
from pipeline.preflight.context import RankContext

_MIB = 2**20
_SHARED_MEMORY = Path("/dev/shm")  # used by NCCL and by DataLoader workers
_MIN_SHARED_BYTES = 2**30  # a container's default of 64 MiB is too small for both
# Seconds between the clocks of two nodes. A start considers the owner of a run folder dead if its
# heartbeat is older than 60 s by the clock of this node (train/owner.py).
_MAX_SKEW_S, _NOTABLE_SKEW_S = 30.0, 2.0
# A network file system may cache the attributes of files for up to 60 s (nfs(5): acdirmax). But it
# asks the server immediately for a name that was never requested before.
_VISIBLE_WITHIN_S = 10.0


def _probe_host_memory(context: RankContext) -> dict[str, Any]:
    """Host memory of this node in bytes: predicted need, free and total."""
    memory = host_memory()
    total, limited_by = memory.total, memory.limited_by
    if (allocated := slurm_memory(os.environ)) is not None and allocated < total:
        total, limited_by = allocated, "allocated by Slurm (--mem)"
    return {
        "need": context.known_plan.memory.host_peak_bytes,
        "free": min(memory.free, total),
        "total": total,
        "limited_by": limited_by,
    }


def slurm_memory(env: Mapping[str, str]) -> int | None:
    """Bytes of this node's memory that Slurm allocated to the job; None if there is no limit.

    Slurm sets one of the three variables, in MiB (sbatch manual, output environment variables).
    """
    for name, count in (
        ("SLURM_MEM_PER_NODE", "1"),
        ("SLURM_MEM_PER_CPU", env.get("SLURM_CPUS_ON_NODE", "")),
        ("SLURM_MEM_PER_GPU", env.get("SLURM_GPUS_ON_NODE", "")),
    ):
        mebibytes = env.get(name, "")
        # 0 means all memory of the node
        if mebibytes.isdigit() and count.isdigit() and int(mebibytes) > 0:
            return int(mebibytes) * int(count) * _MIB
    return None


def _assess_host_memory(results: ProbeResults) -> Iterable[Finding]:
    """Too little free memory is only a warning, because part of the plan's number is assumed."""
    is_enough = True
    for rank, memory in results.by_rank.items():
        need, free, total = (in_units(memory[name]) for name in ("need", "free", "total"))
        limit = f" (limit: {memory['limited_by']})" if memory["limited_by"] else ""
        text = f"{results.hosts[rank]}: {free} of {total} free{limit}, the plan needs {need}"
        if memory["total"] < memory["need"]:
            is_enough = False
            yield fail(text, "request more memory (--mem), or fewer ranks per node", [rank])
        elif memory["free"] < memory["need"]:
            is_enough = False
            yield warn(text, "end other processes there, or request more memory (--mem)", [rank])
    if is_enough:
        least = min(results.by_rank.values(), key=lambda memory: memory["free"])
        free, need = in_units(least["free"]), in_units(least["need"])
        yield ok(f"at least {free} free, the plan needs {need}")


def _probe_shared_memory(context: RankContext) -> int | None:
    """Free bytes of /dev/shm."""
    del context
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def _assess_shared_memory(results: ProbeResults) -> Iterable[Finding]:
    known = {rank: free for rank, free in results.by_rank.items() if free is not None}
    short = {rank: free for rank, free in known.items() if free < _MIN_SHARED_BYTES}
    for rank, free in short.items():
        yield warn(
            f"{results.hosts[rank]}: /dev/shm has {in_units(free)} free; DataLoader workers or "
            "NCCL may end with a bus error",
            "start the container with --shm-size=1g or more (or --ipc=host)",
            [rank],
        )
    if known and not short:
        yield ok(f"/dev/shm has at least {in_units(min(known.values()))} free")


def _probe_disk(context: RankContext) -> dict[str, int]:
    """Free bytes on the disk of the run folder, and the bytes that the run will write.

    Raises UserError if the folder is not writable or the disk has too little free space.
    """
    plan, folder = context.known_plan, context.folder
    require_writable(folder)
    parent = closest_existing(folder)
    predicted = disk_bytes(plan.shape, plan.settings)
    need = predicted["checkpoints"] + predicted["adapter"]
    # Checkpoints of an earlier start are part of the prediction and already on the disk. Copies
    # that a user made have other names; the run does not replace them.
    for kind in ("step", "best"):
        files = (folder / "checkpoints").glob(f"{kind}-{8 * '[0-9]'}/*")
        need -= sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"output_dir: {parent} has {free / _MIB:.0f} MiB free, but the run needs "
            f"{need / _MIB:.0f} MiB; free some space or lower save_total_limit"
        )
    return {"free": free, "need": max(0, need), "merged": predicted["merged"]}


def _assess_disk(results: ProbeResults) -> Iterable[Finding]:
    disk = results.first
    free, need, merged = (in_units(disk[name]) for name in ("free", "need", "merged"))
    if disk["free"] < disk["need"] + disk["merged"]:
        yield warn(
            f"{free} free: enough for the run ({need}), but not for merging afterwards ({merged} "
            "more)",
            "free some space before you run launch/merge.py, or merge on another disk",
        )
    else:
        yield ok(f"{free} free; the run needs {need}, and merging {merged} more")


def require_writable(folder: Path) -> None:
    """Raise UserError unless the folder can be created and written to."""
    parent = closest_existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problem = "is not writable" if parent.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder}: {parent} {problem}; set another folder")


def _probe_clock(context: RankContext) -> float:
    """Seconds by which this clock is ahead of that of rank 0, plus the latency of a message."""
    session = context.session
    session.gather_objects(None)  # a barrier, so that all ranks wait when rank 0 reads its clock
    of_rank_0 = float(session.rank_zero_first(time.time))
    return 0.0 if session.is_rank_zero else time.time() - of_rank_0


def _assess_clock(results: ProbeResults) -> Iterable[Finding]:
    skews = {rank: abs(ahead) for rank, ahead in results.by_rank.items()}
    largest = max(skews.values())
    if largest < _NOTABLE_SKEW_S:
        yield ok(f"less than {_NOTABLE_SKEW_S:.0f} s apart")
        return
    ranks = [rank for rank, skew in skews.items() if skew >= _NOTABLE_SKEW_S]
    text = f"{results.where(ranks)}: clocks differ from that of rank 0 by up to {largest:.0f} s"
    remedy = "synchronise the clocks (chronyd, or the administrator)"
    if largest < _MAX_SKEW_S:
        yield warn(text, remedy, ranks)
    else:
        yield fail(
            f"{text}; a start would consider a running owner of the run folder dead", remedy, ranks
        )


def _probe_run_folder(context: RankContext) -> dict[str, Any]:
    """Whether this rank can read a file that rank 0 writes into the run folder.

    If the run folder does not exist yet, the closest parent that exists is used. Raises UserError
    on all ranks if rank 0 cannot write there.
    """
    session, token = context.session, uuid.uuid4().hex
    written = session.rank_zero_first(lambda: _write_probe_file(context.folder, token))
    path = Path(written["path"])
    is_visible = _is_visible(path, written["token"])
    context.beat("run folder, after reading")
    session.gather_objects(None)  # a barrier, so that rank 0 removes the file after all have read

    def remove() -> None:
        with suppress(OSError):
            path.unlink()

    session.rank_zero_first(remove)
    return {"is_visible": is_visible, "folder": str(path.parent)}


def _assess_run_folder(results: ProbeResults) -> Iterable[Finding]:
    cannot_read = [rank for rank, result in results.by_rank.items() if not result["is_visible"]]
    folder = results.first["folder"]
    if cannot_read:
        yield fail(
            f"{results.where(cannot_read)}: a file that rank 0 wrote in {folder} was not visible "
            f"within {_VISIBLE_WITHIN_S:.0f} s",
            "put output_dir on a file system that all nodes share",
            cannot_read,
        )
    elif len(results.by_rank) == 1:
        yield ok(f"{folder} is writable")
    else:
        yield ok(f"{folder}: written by rank 0, read by all ranks")


def _write_probe_file(folder: Path, token: str) -> dict[str, str]:
    """Write a file like a checkpoint: to a temporary sibling that is synced and renamed."""
    require_writable(folder)
    path = closest_existing(folder) / f".preflight-{token}"
    try:
        write_text(path, token, durable=True)
    except OSError as error:
        raise UserError(
            f"output_dir: {path.parent}: {error.strerror}; free some space or set another folder"
        ) from None
    return {"path": str(path), "token": token}


def _is_visible(path: Path, token: str) -> bool:
    end = time.monotonic() + _VISIBLE_WITHIN_S
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


HOST_MEMORY = Check(
    "host memory", _probe_host_memory, _assess_host_memory,
    "check /proc/meminfo and the limit of the control group", runs_on="node",
)  # fmt: skip
SHARED_MEMORY = Check(
    "shared memory", _probe_shared_memory, _assess_shared_memory, "check `df /dev/shm`",
    runs_on="node",
)  # fmt: skip
DISK = Check("disk", _probe_disk, _assess_disk, "set another output_dir", runs_on="rank 0")
# The probes below are collective: every rank calls them, in the same order.
CLOCK = Check("clock", _probe_clock, _assess_clock, "check the node's clock")
RUN_FOLDER = Check("run folder", _probe_run_folder, _assess_run_folder, "set another output_dir")
