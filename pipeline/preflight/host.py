"""Checks of a node, without torch: memory, disk, clock, and the run folder that all nodes share."""

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cluster.host_memory import host_memory
from pipeline.commands import command
from pipeline.errors import UserError
from pipeline.files import closest_existing, write_text
from pipeline.plan.cost.memory import disk_bytes
from pipeline.preflight.check import Check, Finding, ProbeResults, fail, format_bytes, ok, warn
from pipeline.preflight.context import RankContext

_MIB = 2**20
_SHARED_MEMORY = Path("/dev/shm")  # used by NCCL and by DataLoader workers
_MIN_SHARED_BYTES = 2**30  # a container's default of 64 MiB is too small for both
# Limits for the difference of a node's clock to that of rank 0's node. The process that trains in a
# run folder writes a heartbeat there; another start takes over the folder if the heartbeat is more
# than 60 s old by the clock of its own node (train/owner.py). So clocks must be closer than that.
_MAX_SKEW_S, _WARNING_SKEW_S = 30.0, 2.0
# Time within which a new file must be visible on all nodes. NFS may cache the attributes of known
# files for up to 60 s (nfs(5): acdirmax), but it asks the server at once for a name that it has
# never looked up.
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

    Slurm sets one of the three variables SLURM_MEM_PER_*, in MiB (sbatch manual, output environment
    variables). The value 0 means all memory of the node.
    """
    for name, num_units in (
        ("SLURM_MEM_PER_NODE", "1"),
        ("SLURM_MEM_PER_CPU", env.get("SLURM_CPUS_ON_NODE", "")),
        ("SLURM_MEM_PER_GPU", env.get("SLURM_GPUS_ON_NODE", "")),
    ):
        mib_per_unit = env.get(name, "")
        if mib_per_unit.isdigit() and num_units.isdigit() and int(mib_per_unit) > 0:
            return int(mib_per_unit) * int(num_units) * _MIB
    return None


def _assess_host_memory(results: ProbeResults) -> Iterable[Finding]:
    """Fail if a node has less total memory than the plan needs; warn if it has less free memory.

    Too little free memory is only a warning, because the plan's number contains assumptions.
    """
    is_enough = True
    for rank, memory in results.by_rank.items():
        need, free, total = (format_bytes(memory[name]) for name in ("need", "free", "total"))
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
        free, need = format_bytes(least["free"]), format_bytes(least["need"])
        yield ok(f"at least {free} free, the plan needs {need}")


def _probe_shared_memory(context: RankContext) -> int | None:
    """Free bytes of /dev/shm; None if this system has no such folder."""
    del context
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def _assess_shared_memory(results: ProbeResults) -> Iterable[Finding]:
    free_bytes = {rank: free for rank, free in results.by_rank.items() if free is not None}
    low = {rank: free for rank, free in free_bytes.items() if free < _MIN_SHARED_BYTES}
    for rank, free in low.items():
        yield warn(
            f"{results.hosts[rank]}: /dev/shm has {format_bytes(free)} free; DataLoader workers or "
            "NCCL may end with a bus error",
            "start the container with --shm-size=1g or more (or --ipc=host)",
            [rank],
        )
    if free_bytes and not low:
        yield ok(f"/dev/shm has at least {format_bytes(min(free_bytes.values()))} free")


def _probe_disk(context: RankContext) -> dict[str, int]:
    """Bytes on the disk of the run folder: free, needed by the run, needed by a merged model.

    Raises UserError if the folder is not writable or the disk has too little free space.
    """
    plan, folder = context.known_plan, context.run_folder
    require_writable(folder)
    parent = closest_existing(folder)
    predicted = disk_bytes(plan.shape, plan.settings)
    need = predicted["checkpoints"] + predicted["adapter"]
    # The prediction includes the checkpoints that an earlier start of this run has written, such as
    # step-00000200. The run replaces them, so they need no more space. Copies of checkpoints that a
    # user made have other names; the run does not replace those.
    for prefix in ("step", "best"):
        files = (folder / "checkpoints").glob(f"{prefix}-{8 * '[0-9]'}/*")
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
    free, need, merged = (format_bytes(disk[name]) for name in ("free", "need", "merged"))
    if disk["free"] < disk["need"] + disk["merged"]:
        yield warn(
            f"{free} free: enough for the run ({need}), but not for merging afterwards ({merged} "
            "more)",
            f"free some space before you run {command('merge')}, or merge on another disk",
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
    """Seconds by which this node's clock is ahead of rank 0's, plus the latency of a message."""
    session = context.session
    # The gather acts as a barrier, so that all ranks wait when rank 0 reads its clock.
    session.gather_objects(None)
    rank_zero_time = float(session.rank_zero_first(time.time))
    return 0.0 if session.is_rank_zero else time.time() - rank_zero_time


def _assess_clock(results: ProbeResults) -> Iterable[Finding]:
    skews = {rank: abs(ahead) for rank, ahead in results.by_rank.items()}
    largest = max(skews.values())
    if largest < _WARNING_SKEW_S:
        yield ok(f"less than {_WARNING_SKEW_S:.0f} s apart")
        return
    ranks = [rank for rank, skew in skews.items() if skew >= _WARNING_SKEW_S]
    text = (
        f"{results.name_ranks(ranks)}: clocks differ from that of rank 0 by up to {largest:.0f} s"
    )
    remedy = "synchronise the clocks (chronyd, or the administrator)"
    if largest < _MAX_SKEW_S:
        yield warn(text, remedy, ranks)
    else:
        yield fail(
            f"{text}; a second start in the run folder would consider this run dead", remedy, ranks
        )


def _probe_run_folder(context: RankContext) -> dict[str, Any]:
    """Whether this rank can read a file that rank 0 writes into the run folder.

    If the run folder does not exist yet, the closest parent that exists is used. Raises UserError
    on all ranks if rank 0 cannot write there.
    """
    session, token = context.session, uuid.uuid4().hex
    # Every rank makes a token, but all get the path and the token of rank 0.
    written = session.rank_zero_first(lambda: _write_probe_file(context.run_folder, token))
    path = Path(written["path"])
    is_visible = _is_visible(path, written["token"])
    context.beat("run folder, after reading")
    # The gather acts as a barrier, so that rank 0 removes the file after all ranks have read it.
    session.gather_objects(None)

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
            f"{results.name_ranks(cannot_read)}: a file that rank 0 wrote in {folder} was not "
            f"visible within {_VISIBLE_WITHIN_S:.0f} s",
            "put output_dir on a file system that all nodes share",
            cannot_read,
        )
    elif len(results.by_rank) == 1:
        yield ok(f"{folder} is writable")
    else:
        yield ok(f"{folder}: written by rank 0, read by all ranks")


def _write_probe_file(folder: Path, token: str) -> dict[str, str]:
    """Write a file that contains the token, in the same way as a checkpoint: synced and renamed."""
    require_writable(folder)
    path = closest_existing(folder) / f".preflight-{token}"
    try:
        write_text(path, token, is_durable=True)
    except OSError as error:
        raise UserError(
            f"output_dir: {path.parent}: {error.strerror}; free some space or set another folder"
        ) from None
    return {"path": str(path), "token": token}


def _is_visible(path: Path, token: str) -> bool:
    """Wait until the file contains the token; False if it does not within the time limit."""
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
    "check /proc/meminfo and the limit of the cgroup", runs_on="node",
)  # fmt: skip
SHARED_MEMORY = Check(
    "shared memory", _probe_shared_memory, _assess_shared_memory, "check `df /dev/shm`",
    runs_on="node",
)  # fmt: skip
DISK = Check("disk", _probe_disk, _assess_disk, "set another output_dir", runs_on="rank 0")
# The two probes below use collectives, so every rank runs them, in this order.
CLOCK = Check("clock", _probe_clock, _assess_clock, "check the node's clock")
RUN_FOLDER = Check("run folder", _probe_run_folder, _assess_run_folder, "set another output_dir")
