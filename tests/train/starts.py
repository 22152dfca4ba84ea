"""A run folder as an earlier start left it, and further starts in it."""

import json
from pathlib import Path

ACCEPTED = {"epochs": 2, "accept_changes": ["total_steps"]}
OTHER = {"lr": 0.5}


def leave(folder: Path, state: str, *, adapter: bool = True, checkpoint: bool = True) -> None:
    """Files of an earlier start, in addition to those of open_run."""
    fields = {"state": state, "host": "elsewhere", "heartbeat": 0, "pids": [1]}
    (folder / "status.json").write_text(json.dumps(fields))
    if checkpoint:
        (folder / "checkpoints/step-00000009").mkdir(parents=True, exist_ok=True)
    if adapter:
        (folder / "adapter").mkdir(exist_ok=True)


def has_results(folder: Path) -> bool:
    return (folder / "checkpoints/step-00000009").exists() or (folder / "adapter").exists()
