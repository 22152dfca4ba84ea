"""Names of the files and folders that a run writes into its run folder. No torch."""

import os
import re
from pathlib import Path

from pipeline.errors import UserError

# Everything that a run may write; nothing else is ever removed from a run folder. The last two
# files are removed last, because they mark the folder as a run folder.
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
    """Raise UserError if a run could not use an entry of its folder; else a save fails hours later.

    Refused are a folder in the place of a file, a file in the place of a folder, a link to a
    missing target, an unreadable entry and, if `is_written`, an entry that cannot be written.
    """
    access, denied = os.R_OK | os.X_OK, "cannot be read"
    if is_written:
        access, denied = access | os.W_OK, "cannot be read and written"
    files = [folder / name for name in (*FILES, "stop", *(f"data/{name}" for name in _IN_DATA))]
    folders = [folder / name for name in (*FOLDERS, "logs")]
    for paths, is_kind, kind, mode in (
        ([folder, *folders], Path.is_dir, "a folder", access),
        (files, Path.is_file, "a file", os.R_OK),  # a file is replaced, not opened for writing
    ):
        for path in paths:
            if path.is_symlink() and not path.exists():
                problem = f"is a link to {path.readlink()}, which is missing"
            elif path.exists() and not is_kind(path):
                problem = f"is not {kind}"
            elif path.exists() and not os.access(path, mode):
                problem = "cannot be read" if kind == "a file" else denied
            else:
                continue
            raise UserError(f"output_dir: {path} {problem}; restore it or move it away")


def checkpoints_in(folder: Path, kind: str = "step") -> list[Path]:
    """Checkpoints (`step`) or best adapters (`best`), oldest first, including damaged ones.

    Copies to which a user gave other names, such as step-00000200-keep, are not included. A missing
    folder has no checkpoints. Raises OSError if the folder cannot be read.
    """
    pattern = re.compile(rf"{kind}-\d{{8}}")
    return sorted(path for path in _children(folder) if pattern.fullmatch(path.name))


def written_in(checkpoints: Path) -> list[Path]:
    """Everything in `checkpoints/` that a run wrote. Raises OSError if it cannot be read."""
    return [path for path in _children(checkpoints) if _WRITTEN.fullmatch(path.name)]


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())  # unlike glob, it raises if the folder may not be read
    except FileNotFoundError:
        return []
