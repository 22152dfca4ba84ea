"""Atomic writes and JSON: a reader sees the old file or folder or the new one, never a part of it.

Every writer of the project writes to a temporary sibling and renames it. A `durable` write also
survives a power cut: its content is synced before the rename, and the name after it.
"""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\..+-(?P<pid>\d+)\.tmp")
_ABANDONED_AFTER_S = 24 * 3600


def dump_json(data: Any) -> str:
    """JSON as every file of a run folder has it: indented, readable in any script."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError for anything but an object."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a text file atomically.

    A byte of a file's name that is not UTF-8 is escaped as JSON escapes it, `\\udcff` for 0xff.
    """
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling to write; it becomes `path` unless the body raises."""
    temporary = temporary_sibling(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


@contextmanager
def atomic_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty temporary sibling; synced and checked, it replaces `folder`. Durable.

    If the body or the check raises, `folder` is as it was. No portable call swaps two folders, so
    a kill can fall between the two renames; `recover_folder` undoes that half, here or later.
    """
    folder = folder.resolve()  # the temporary sibling must be on the disk that a link leads to
    recover_folder(folder)
    new, old = _new(folder), _old(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        check(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
    except BaseException:
        recover_folder(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a replacement by `atomic_folder` that was killed between its two renames."""
    old = _old(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


def remove_unfinished_folders(parent: Path) -> None:
    """Remove what killed `atomic_folder` calls left in `parent`; no writer may be active there."""
    for path in parent.glob(".*.new"):
        shutil.rmtree(path, ignore_errors=True)


def user_cache() -> Path:
    """Folder for what later runs of this user may reuse: $RANKZERO_CACHE or ~/.cache/rankzero."""
    return Path(os.environ.get("RANKZERO_CACHE") or Path.home() / ".cache" / "rankzero")


def temporary_sibling(path: Path) -> Path:
    """A hidden path in the same folder that no other process uses, on this machine or another."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether a `temporary_sibling` has no living writer, as far as this machine can tell.

    The writer on another machine counts as living if it wrote within the last day.
    """
    name = _TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if path.name.endswith(f".{socket.gethostname()}-{name['pid']}.tmp"):
        return not _is_running(int(name["pid"]))
    try:
        inside = path.iterdir() if path.is_dir() else ()
        newest = max(file.stat().st_mtime for file in (path, *inside))
    except OSError:
        return False  # its writer is changing it
    return bool(time.time() - newest > _ABANDONED_AFTER_S)


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
