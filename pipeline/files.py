"""Atomic writes of files and folders, and JSON.

A reader sees the complete old file or the complete new one, because every write goes to a
temporary sibling that is then renamed. A durable write (`is_durable`) also survives a power cut:
the content is synced to the disk before the rename, and the parent folder after it.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_TEMPORARY = re.compile(r"\..+\..+-(?P<pid>\d+)\.tmp")  # names made by `temporary_sibling`
_BYTE_ORDER_MARK = "\ufeff"
_ABANDONED_AFTER_S = 24 * 3600


def dump_json(data: Any, *, indent: int | None = 2) -> str:
    """JSON text with a line break at its end; `indent=None` writes it in one line.

    Numbers that JSON does not have, NaN and infinity, become null. Non-ASCII characters are not
    escaped.
    """
    try:
        text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_with_null_for_nan(data), indent=indent, ensure_ascii=False)
    return text + "\n"


def _with_null_for_nan(data: Any) -> Any:
    """JSON data in which NaN and infinity are replaced by None."""
    if isinstance(data, dict):
        return {key: _with_null_for_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_with_null_for_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises OSError, or ValueError for other content."""
    text = path.read_text(encoding="utf-8")
    if text.startswith(_BYTE_ORDER_MARK):  # transformers does not read such a file either
        remedy = f"sed -i '1s/^\\xEF\\xBB\\xBF//' {shlex.quote(str(path))}"
        raise ValueError(f"it begins with a byte order mark; remove it: {remedy}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def require_json(path: Path, label: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing or damaged.

    `label`: text before the path in the message.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{label}{path}: not readable as a JSON object: {error}") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def closest_existing(folder: Path) -> Path:
    """The folder if it exists, else its closest parent that exists."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    return parent


def write_text(path: Path, text: str, *, is_durable: bool = False) -> None:
    """Replace a text file atomically.

    The text may contain file names with bytes that are not UTF-8. Such a byte is written as a JSON
    escape: `\\udcff` for 0xff.
    """
    with atomic_file(path, is_durable=is_durable) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def atomic_file(path: Path, *, is_durable: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary sibling, which the body writes; then rename it to `path`.

    If the body raises, `path` is unchanged and the temporary file is removed.
    """
    temporary = temporary_sibling(path)
    try:
        yield temporary
        if is_durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if is_durable:
        sync(path.parent)


@contextmanager
def atomic_folder(
    folder: Path, check: Callable[[Path], None], *, is_resumable: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder, which the body fills; it then replaces `folder`.

    Before the replacement the temporary folder is synced to the disk and passed to `check`, which
    may raise. If the body or the check raises, `folder` is unchanged. There is no portable atomic
    swap of two folders: if the process is killed between the two renames, `folder` is missing, and
    `recover_folder` restores the old one.

    `is_resumable`: if the body or the check raises, the temporary folder stays, and the next call
    yields it with its files.
    """
    folder = folder.resolve()  # if it is a link, the temporary folder must be on the target's disk
    recover_folder(folder)
    new, old = _new_sibling(folder), _old_sibling(folder)
    if not is_resumable:
        shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True, exist_ok=is_resumable)
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
        if not is_resumable:
            shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Restore the old folder if `atomic_folder` was killed between its two renames."""
    old = _old_sibling(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


def remove_unfinished_folders(parent: Path) -> None:
    """Remove temporary folders of `atomic_folder` calls in `parent` whose process was killed.

    No call of `atomic_folder` may be active in `parent`.
    """
    for path in parent.glob(".*.new"):
        shutil.rmtree(path, ignore_errors=True)


def user_cache() -> Path:
    """Cache folder shared by all runs of this user: $RANKZERO_CACHE or ~/.cache/rankzero."""
    return Path(os.environ.get("RANKZERO_CACHE") or Path.home() / ".cache" / "rankzero")


def temporary_sibling(path: Path) -> Path:
    """Path of a hidden file in the same folder; unique to this process and machine."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether the process that created a `temporary_sibling` has ended.

    A process on another machine cannot be checked. It counts as ended if it has written nothing
    for a day.
    """
    name = _TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if path.name.endswith(f".{socket.gethostname()}-{name['pid']}.tmp"):
        return not _is_running(int(name["pid"]))
    try:
        children = path.iterdir() if path.is_dir() else ()
        newest = max(file.stat().st_mtime for file in (path, *children))
    except OSError:
        return False  # a file was removed during this check, so the process is active
    return bool(time.time() - newest > _ABANDONED_AFTER_S)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_sibling(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _old_sibling(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
