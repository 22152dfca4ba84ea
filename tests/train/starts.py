"""Files that an earlier run left in its folder, and changed settings for a later start there."""

import json
from pathlib import Path

# A change of the number of steps, which these settings accept, and one that nothing accepts. The
# earlier run has epochs: 1 and lr: 0.001.
ACCEPTED = {"epochs": 2, "accept_changes": ["total_steps"]}
OTHER = {"lr": 0.5}


def leave_files(folder: Path, state: str, *, adapter: bool = True, checkpoint: bool = True) -> None:
    """Write the status and results of a run that has ended, in addition to the files of `open_run`.

    The checkpoint is an empty folder, the adapter a file of weights without tensors.
    """
    # Without a recent heartbeat, a process on another host counts as dead.
    status = {"state": state, "host": "elsewhere", "heartbeat": 0, "pids": [1]}
    (folder / "status.json").write_text(json.dumps(status))
    if checkpoint:
        (folder / "checkpoints/step-00000009").mkdir(parents=True, exist_ok=True)
    if adapter:
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter/adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")


def has_results(folder: Path) -> bool:
    """Whether the checkpoint or the adapter of `leave_files` is there."""
    return (folder / "checkpoints/step-00000009").exists() or (folder / "adapter").exists()
