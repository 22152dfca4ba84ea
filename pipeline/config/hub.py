"""A model named as on the hub (`org/name`) -> the folder of its snapshot in the local cache.

Nothing is fetched. Layout of the cache: huggingface_hub, "Understand caching".
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def snapshot_folder(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The snapshot that `main` was last fetched as; None where there is none, or no such name."""
    if not _NAME.fullmatch(name):
        return None
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs/main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None
