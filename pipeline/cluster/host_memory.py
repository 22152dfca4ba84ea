"""Host memory that this process may use: the machine's, or what a control group leaves of it."""

from dataclasses import dataclass
from pathlib import Path

import psutil

# Folder, file of the limit, file of the use, and what of the use is given back when it is needed:
# control groups of version 2 and 1 (Linux, admin-guide/cgroup-v2 and cgroup-v1/memory).
_V2 = ("", "memory.max", "memory.current", "inactive_file")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes. `limited_by` is the control group whose limit is below the machine's memory."""

    total: int
    free: int
    limited_by: str = ""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The machine's memory, or the tightest limit of a group that this process is in.

    A Slurm job's limit is on a group below the one that is mounted at the top, a container's on
    the top itself: every group from this process upwards counts.
    """
    machine = psutil.virtual_memory()
    total, free, limited_by = int(machine.total), int(machine.available), ""
    for folder, kind in _groups(root):
        limit, used = _limit_and_use(folder, kind)
        if limit is None:
            continue
        free = min(free, max(0, limit - used))
        if limit < total:
            total, limited_by = limit, str(folder)
    return HostMemory(total=total, free=free, limited_by=limited_by)


def _groups(root: Path) -> list[tuple[Path, tuple[str, str, str, str]]]:
    """Folders of the groups of this process, from its own to the top."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            kind = _V2
        elif "memory" in controllers.split(","):
            kind = _V1
        else:
            continue
        top = root / "sys/fs/cgroup" / kind[0]
        own = top / path.strip("/")
        found += [(group, kind) for group in (own, *own.parents) if group.is_relative_to(top)]
    return found


def _limit_and_use(folder: Path, kind: tuple[str, str, str, str]) -> tuple[int | None, int]:
    _, limit_file, use_file, reclaimed = kind
    limit = _read(folder / limit_file).strip()
    if not limit.isdigit():  # "max", or no such group here
        return None, 0
    used = _read(folder / use_file).strip()
    statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(limit), max(0, int(used or 0) - int(statistics.get(reclaimed, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
