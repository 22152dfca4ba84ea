"""What prepared data is made from -> the key that it lies under."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings, settings_with
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, write_text
from pipeline.rows.content import kind_of
from pipeline.rows.sources import Source

FINGERPRINTS = "fingerprints.json"
_FORMAT = 5  # of documents, their files and their order: raise it when one of them changes
_TOKENIZER_FILES = (
    "tokenizer*",
    "*chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_REMEMBERED_BYTES = 2**20  # smaller files are quicker hashed than looked up
# A file that is written to within the same tick of the file system's clock as before keeps its
# times; what was already this old when it was hashed cannot be.
_SETTLED_AFTER_S = 2.0


class Fingerprints:
    """SHA-256 of files; of large ones remembered in a folder by size, times and inode.

    So that a start on prepared data takes no longer for a gigabyte than for a kilobyte.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FINGERPRINTS
        self._known: dict[str, Any] = {}
        self._used: dict[str, Any] = {}
        self._stamps: dict[Path, list[int]] = {}
        try:
            self._known = read_json(self._path)
        except (OSError, ValueError):
            return  # not there yet, or not ours: everything is hashed

    def sha256(self, path: Path) -> str:
        """Of the content of a file, as hex digits."""
        name, stamp, now = str(path.resolve()), _stamp(path), time.time()
        self._stamps[path] = stamp
        known = self._known.get(name)
        if isinstance(known, dict) and known.get("stamp") == stamp:
            self._used[name] = known
            return str(known["sha256"])
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size, *times = stamp[:3]
        is_settled = now - max(times) / 1e9 > _SETTLED_AFTER_S
        if size >= _REMEMBERED_BYTES and is_settled and stamp == _stamp(path):
            self._used[name] = {"stamp": stamp, "sha256": digest}
        return digest

    def require_unchanged(self) -> None:
        """Raise UserError where a file is no longer what was hashed for the key."""
        for path, stamp in self._stamps.items():
            try:
                is_same = _without_change_time(_stamp(path)) == _without_change_time(stamp)
            except OSError:
                is_same = False
            if not is_same:
                raise UserError(
                    f"{path}: changed while it was read; start again when nothing writes to it"
                )

    def save(self) -> None:
        """Remember what was asked for since; files that nobody asked for are forgotten."""
        if self._used != self._known:
            write_text(self._path, dump_json(self._used), durable=True)


def split_keys(
    settings: RunSettings,
    sources: list[Source],
    fingerprints: Fingerprints,
    *,
    held_out: float | int | None,
    limit: int | None,
) -> dict[str, str]:
    """16 hex digits of all that documents are made from: of the rest, and of what is held out."""
    model = Path(settings.model)
    patterns = (*_TOKENIZER_FILES, *(["*.py"] if settings.trust_remote_code else []))
    tokenizer = {path for pattern in patterns for path in model.glob(pattern) if path.is_file()}
    values = settings.model_dump(mode="json", include=set(settings_with("documents")))
    made_from = {
        "format": _FORMAT,
        "data": [_source(source, fingerprints) for source in sources],
        "tokenizer": {
            str(path.relative_to(model)): fingerprints.sha256(path) for path in sorted(tokenizer)
        },
        "settings": values,
        "held_out": held_out,
        "limit": limit,
    }
    return {
        split: hashlib.sha256(
            json.dumps({**made_from, "split": split}, sort_keys=True).encode()
        ).hexdigest()[:16]
        for split in ("rest", "held_out")
    }


def _source(source: Source, fingerprints: Fingerprints) -> dict[str, Any]:
    files = [[kind_of(path), fingerprints.sha256(path)] for path in source.files]
    return {"files": files, "weight": source.weight, "limit": source.limit}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _without_change_time(stamp: list[int]) -> list[int]:
    """That one changes with a file's mode or a link to it, too."""
    size, modified, _, inode = stamp
    return [size, modified, inode]
