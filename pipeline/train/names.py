"""Names of the files and folders that a run writes into its run folder. No torch."""

import os
import re
from pathlib import Path

from pipeline.errors import UserError

# All that a run writes into its folder; no file or folder with another name is ever removed. The
# last two files are removed last, because they mark the folder as a run folder.
FILES = (
    "run.yaml", "ds_config.json", "metrics.jsonl", "score.json", "report.html", "base.json",
    "init_adapter.json", "plan.json", "status.json",
)  # fmt: skip
FOLDERS = ("data", "checkpoints", "adapter", "merged", "tracking", "score-answers", "score-tasks")
# Allowed in a folder before its first run: prepared data, Slurm's logs, a stop request.
BEFORE_A_RUN = ("data", "logs", "stop")
_IN_DATA = ("index.json", "audit.json", "rejects.jsonl", "fingerprints.json")
# Names in checkpoints/: complete checkpoints, skipped ones ("-passed-over-" in earlier versions)
# and unfinished writes.
_WRITTEN = re.compile(r"(step|best)-\d{8}(-skipped-\d+|-passed-over-\d+)?|\.(step|best)-\d{8}\..*")


def require_usable_entries(folder: Path, *, is_written: bool) -> None:
    """Raise UserError if a run cannot use its folder or an entry in it.

    Otherwise the first save would fail, hours later. Refused are a folder in the place of a file, a
    file in the place of a folder, a link to a missing target, an unreadable entry and, if
    `is_written`, a folder that cannot be written to.
    """
    access = os.R_OK | os.X_OK | (os.W_OK if is_written else 0)
    for path in (folder, *(folder / name for name in (*FOLDERS, "logs"))):
        _require_usable_entry(path, is_folder=True, access=access)
    for name in (*FILES, "stop", *(f"data/{name}" for name in _IN_DATA)):
        # Write access to a file is not needed, because a new file replaces it.
        _require_usable_entry(folder / name, is_folder=False, access=os.R_OK)


def _require_usable_entry(path: Path, *, is_folder: bool, access: int) -> None:
    """Raise UserError if a path exists and a run cannot use it. `access`: a mode of os.access."""
    if path.is_symlink() and not path.exists():
        problem = f"is a link to {path.readlink()}, which is missing"
    elif not path.exists():
        return
    elif not (path.is_dir() if is_folder else path.is_file()):
        problem = "is not a folder" if is_folder else "is not a file"
    elif not os.access(path, access):
        problem = "cannot be read and written" if access & os.W_OK else "cannot be read"
    else:
        return
    raise UserError(f"output_dir: {path} {problem}; restore it or move it away")


def checkpoints_in(folder: Path, kind: str = "step") -> list[Path]:
    """Checkpoints (kind `step`) or best adapters (kind `best`) in a folder, oldest first.

    Damaged ones are included. Copies to which a user gave other names, such as step-00000200-keep,
    are not. A missing folder has no checkpoints. Raises OSError if the folder cannot be read.
    """
    pattern = re.compile(rf"{kind}-\d{{8}}")
    return sorted(path for path in _children(folder) if pattern.fullmatch(path.name))


def written_in(checkpoints: Path) -> list[Path]:
    """The entries of the folder `checkpoints/` that a run wrote.

    Raises OSError if the folder cannot be read.
    """
    return [path for path in _children(checkpoints) if _WRITTEN.fullmatch(path.name)]


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())  # unlike glob, it raises if the folder may not be read
    except FileNotFoundError:
        return []
