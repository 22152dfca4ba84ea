"""Write beside, then rename.

A folder gets its name when it is complete and checked; what had the name before is there until
then.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Give a fresh folder to write in; synced and checked, it takes the place of `folder`.

    If the body or the check raises, `folder` is as it was. No portable call swaps two folders, so
    a kill can fall between the two renames; `recover` undoes that half, here or at the next start.
    """
    folder = folder.resolve()  # behind a link the space is where the link leads
    recover(folder)
    fresh, old = _fresh(folder), _old(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        check(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)
    except BaseException:
        recover(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back, or clear away, what a kill left between the renames of `replacing`."""
    old = _old(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


def clear_leftovers(parent: Path) -> None:
    """Remove folders that writes into `parent` left half done; nobody may be writing there."""
    for path in parent.glob(".*.new"):
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fresh(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
