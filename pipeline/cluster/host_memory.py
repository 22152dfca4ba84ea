"""Host memory that this process may use: the RAM of the node, or the limit of a cgroup."""

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class _GroupVersion:
    """Names of files in one version of Linux cgroups (control groups).

    `folder`: below /sys/fs/cgroup. `reclaimable_entry`: line of memory.stat with the page cache
    that the kernel can reclaim, in bytes.
    """

    folder: str
    limit_file: str
    usage_file: str
    reclaimable_entry: str


# Linux documentation, admin-guide/cgroup-v2 and admin-guide/cgroup-v1/memory.
_V2 = _GroupVersion("", "memory.max", "memory.current", "inactive_file")
_V1 = _GroupVersion(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Host memory in bytes.

    `limited_by`: folder of the cgroup that limits the memory; empty if no cgroup has a limit below
    the node's memory.
    """

    total: int
    free: int
    limited_by: str = ""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The memory of the node, or the smallest limit of a cgroup of this process.

    Cgroups form a tree. All cgroups from the one of this process up to the root are read, because
    Slurm sets the limit of a job on a cgroup below the root, and a container's limit is set on the
    root.
    """
    node = psutil.virtual_memory()
    total, free, limited_by = int(node.total), int(node.available), ""
    for folder, version in _cgroups(root):
        limit = _limit(folder, version)
        if limit is None:
            continue
        free = min(free, max(0, limit - _usage(folder, version)))
        if limit < total:
            total, limited_by = limit, str(folder)
    return HostMemory(total=total, free=free, limited_by=limited_by)


def _cgroups(root: Path) -> list[tuple[Path, _GroupVersion]]:
    """Folder and version of each cgroup of this process, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:  # such as `0::/user.slice` (version 2) or `4:memory:/slurm/job_1`
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version = _V2
        elif "memory" in controllers.split(","):
            version = _V1
        else:
            continue
        mount = root / "sys/fs/cgroup" / version.folder
        group = mount / path.strip("/")
        while group.is_relative_to(mount):
            groups.append((group, version))
            group = group.parent
    return groups


def _limit(folder: Path, version: _GroupVersion) -> int | None:
    """The group's memory limit in bytes; None if there is no limit or no such file."""
    limit = _content_or_empty(folder / version.limit_file).strip()
    return int(limit) if limit.isdigit() else None  # the text is "max" for no limit


def _usage(folder: Path, version: _GroupVersion) -> int:
    """Bytes in use by the group, without page cache that the kernel can reclaim."""
    usage = int(_content_or_empty(folder / version.usage_file).strip() or 0)
    lines = _content_or_empty(folder / "memory.stat").splitlines()
    statistics = dict(line.split() for line in lines)
    return max(0, usage - int(statistics.get(version.reclaimable_entry, 0)))


def _content_or_empty(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
