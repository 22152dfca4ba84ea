"""Names of what a run writes into its folder. No torch."""

import re
from pathlib import Path

# Everything that a run may leave; nothing else is ever removed from a folder. The last two files
# are removed last: they mark the folder as one of a run.
FILES = (
    "run.yaml", "ds_config.json", "metrics.jsonl", "score.json", "report.html", "base.json",
    "plan.json", "status.json",
)  # fmt: skip
FOLDERS = ("data", "checkpoints", "adapter", "merged")
# Allowed in a folder before its first run: prepared data, Slurm's logs, a stop request.
BEFORE_A_RUN = ("data", "logs", "stop")
# In checkpoints/: complete ones, damaged ones that were set aside, and unfinished writes.
_WRITTEN = re.compile(r"(step|best)-\d{8}(-skipped-\d+|-passed-over-\d+)?|\.(step|best)-\d{8}\..*")


def checkpoints_in(folder: Path, kind: str = "step") -> list[Path]:
    """Checkpoints (`step`) or best adapters (`best`), oldest first; intact or not.

    Copies that a user named otherwise, such as step-00000200-keep, are not among them. Raises
    OSError where the folder cannot be read; one that is not there is empty.
    """
    pattern = re.compile(rf"{kind}-\d{{8}}")
    return sorted(path for path in _children(folder) if pattern.fullmatch(path.name))


def written_in(checkpoints: Path) -> list[Path]:
    """Everything in `checkpoints/` that a run wrote. Raises OSError like `checkpoints_in`."""
    return [path for path in _children(checkpoints) if _WRITTEN.fullmatch(path.name)]


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())  # glob would take a forbidden folder for an empty one
    except FileNotFoundError:
        return []
