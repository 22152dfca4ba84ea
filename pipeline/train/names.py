"""Names of the files and folders that a run writes into its run folder. No torch."""

import re
from pathlib import Path

# Everything that a run may write; nothing else is ever removed from a run folder. The last two
# files are removed last, because they mark the folder as a run folder.
FILES = (
    "run.yaml", "ds_config.json", "metrics.jsonl", "score.json", "report.html", "base.json",
    "plan.json", "status.json",
)  # fmt: skip
FOLDERS = ("data", "checkpoints", "adapter", "merged")
# Allowed in a folder before its first run: prepared data, Slurm's logs, a stop request.
BEFORE_A_RUN = ("data", "logs", "stop")
# Names in checkpoints/: complete checkpoints, damaged ones that were skipped, unfinished writes.
_WRITTEN = re.compile(r"(step|best)-\d{8}(-skipped-\d+|-passed-over-\d+)?|\.(step|best)-\d{8}\..*")


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
