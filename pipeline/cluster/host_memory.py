"""Host memory that this process may use: the RAM of the node, or the limit of a control group."""

from dataclasses import dataclass
from pathlib import Path

import psutil

# Control groups of version 2 and 1: folder, file with the limit, file with the usage, and the entry
# of memory.stat for page cache that the kernel can reclaim (Linux, admin-guide/cgroup-v2 and
# cgroup-v1/memory).
_V2 = ("", "memory.max", "memory.current", "inactive_file")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Host memory in bytes.

    `limited_by`: the control group that limits it; empty if the node's memory is the limit.
    """

    total: int
    free: int
    limited_by: str = ""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The memory of the node, or the smallest limit of a control group of this process.

    All groups are read, from the group of this process up to the mounted root: the limit of a Slurm
    job is set on a group below the root, the limit of a container on the root.
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
    """Folder and file names of each control group of this process, up to the root."""
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
    limit = _content_or_empty(folder / limit_file).strip()
    if not limit.isdigit():  # "max", or the file does not exist
        return None, 0
    used = _content_or_empty(folder / use_file).strip()
    statistics = dict(
        line.split() for line in _content_or_empty(folder / "memory.stat").splitlines()
    )
    return int(limit), max(0, int(used or 0) - int(statistics.get(reclaimed, 0)))


def _content_or_empty(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
