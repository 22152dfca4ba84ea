"""Find the snapshot of a hub model or data set in the local cache; nothing is downloaded.

The documentation of huggingface_hub describes the folders of the cache ("Understand caching").
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # org/name
# org/name:split or org/name@revision:split; the groups are name, revision and split.
_SPLIT = re.compile(rf"({_NAME.pattern})(?:@([\w.-]+))?:([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a hub data set; `revision` is a commit, branch or tag."""

    name: str
    split: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse `org/name:split` or `org/name@revision:split`.

        None if the text has another form or is the path of an existing file or folder.
        """
        match = _SPLIT.fullmatch(text)
        if match is None or os.path.exists(text):  # noqa: PTH110 - Path.exists raises for a long name
            return None
        name, revision, split = match.groups()
        return cls(name=name, split=split, revision=revision or "main")

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}:{self.split}"

    def snapshot(self, environment: Mapping[str, str] = os.environ) -> Path | None:
        """The snapshot folder in the local cache, named after the commit; None if not cached."""
        return snapshot_folder(self.name, environment, kind="datasets", revision=self.revision)


def lacks_split(text: str) -> bool:
    """Whether the text is a hub name without the split: `org/name` or `org/name@revision`."""
    return _SPLIT.fullmatch(f"{text}:train") is not None


def settings_of_snapshot(snapshot: str) -> dict[str, str]:
    """The settings `model` and `model_revision` that name a snapshot folder of a hub cache.

    Example of such a folder: .../models--ORG--NAME/snapshots/COMMIT. Empty for other paths.
    """
    match = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]+)/?$", snapshot)
    if match is None:
        return {}
    owner, name, commit = match.groups()
    return {"model": f"{owner}/{name}", "model_revision": commit}


def snapshot_folder(
    name: str,
    environment: Mapping[str, str] = os.environ,
    *,
    kind: Literal["models", "datasets"] = "models",
    revision: str = "main",
) -> Path | None:
    """Folder of the cached snapshot for a commit, branch or tag; None if not cached.

    A branch or tag resolves to the commit that was downloaded last.
    """
    if not _NAME.fullmatch(name):
        return None
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"{kind}--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
