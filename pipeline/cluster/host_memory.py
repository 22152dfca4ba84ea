"""Host memory that this process may use: the node's RAM, or the limit of a control group."""

from dataclasses import dataclass
from pathlib import Path

import psutil

# Folder, file with the limit, file with the usage, and the entry of memory.stat for page cache that
# the kernel can reclaim: cgroup version 2 and 1 (Linux, admin-guide/cgroup-v2, cgroup-v1/memory).
_V2 = ("", "memory.max", "memory.current", "inactive_file")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes. `limited_by` is the control group whose limit is below the node's memory."""

    total: int
    free: int
    limited_by: str = ""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The node's memory, or the tightest limit of the control groups of this process.

    Every group from that of this process up to the mounted root is read: the limit of a Slurm job
    is on a group below the root, the limit of a container on the root itself.
    """
    node = psutil.virtual_memory()
    total, free, limited_by = int(node.total), int(node.available), ""
    for folder, kind in _groups(root):
        limit, used = _limit_and_use(folder, kind)
        if limit is None:
            continue
        free = min(free, max(0, limit - used))
        if limit < total:
            total, limited_by = limit, str(folder)
    return HostMemory(total=total, free=free, limited_by=limited_by)


def _groups(root: Path) -> list[tuple[Path, tuple[str, str, str, str]]]:
    """Folder and version of each group of this process, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            kind = _V2
        elif "memory" in controllers.split(","):
            kind = _V1
        else:
            continue
        mount = root / "sys/fs/cgroup" / kind[0]
        own = mount / path.strip("/")
        groups += [(group, kind) for group in (own, *own.parents) if group.is_relative_to(mount)]
    return groups


def _limit_and_use(folder: Path, kind: tuple[str, str, str, str]) -> tuple[int | None, int]:
    _, limit_file, use_file, reclaimed = kind
    limit = _read(folder / limit_file).strip()
    if not limit.isdigit():  # "max", or the file does not exist
        return None, 0
    used = _read(folder / use_file).strip()
    statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(limit), max(0, int(used or 0) - int(statistics.get(reclaimed, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
