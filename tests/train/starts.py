"""Files that an earlier start left in a run folder, and settings of later starts in it."""

import json
from pathlib import Path

ACCEPTED = {"epochs": 2, "accept_changes": ["total_steps"]}
OTHER = {"lr": 0.5}


def leave_files(folder: Path, state: str, *, adapter: bool = True, checkpoint: bool = True) -> None:
    """Write the files of an earlier start, in addition to those of `open_run`."""
    fields = {"state": state, "host": "elsewhere", "heartbeat": 0, "pids": [1]}
    (folder / "status.json").write_text(json.dumps(fields))
    if checkpoint:
        (folder / "checkpoints/step-00000009").mkdir(parents=True, exist_ok=True)
    if adapter:
        (folder / "adapter").mkdir(exist_ok=True)


def has_results(folder: Path) -> bool:
    return (folder / "checkpoints/step-00000009").exists() or (folder / "adapter").exists()
