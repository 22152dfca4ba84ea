"""Keys of prepared splits: hashes of all inputs on which the documents depend.

A split is reused if its key is still the same.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings, settings_with_change
from pipeline.data.chat.template import read_template
from pipeline.data.chat.tokenizer import num_embeddings
from pipeline.errors import UserError
from pipeline.files import dump_json, file_sha256, read_json_or_empty, write_text
from pipeline.rows.content import detect_kind
from pipeline.rows.sources import Source

FINGERPRINTS = "fingerprints.json"
_FORMAT = 11  # version; raise it if the used rows, documents, files or their order change
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
    "generation_config.json",
)
_MIN_CACHED_BYTES = 2**20  # hashing a smaller file is faster than a look-up
# Two writes within one tick of the file system's clock leave the same times. Therefore a hash is
# cached only if the file has not changed for this many seconds.
_SETTLED_AFTER_S = 2.0


class Fingerprints:
    """SHA-256 of files, cached for large files by size, times and inode.

    With the cache, the time of a start on prepared data does not depend on the size of the data.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FINGERPRINTS
        # Path of a file -> {"stamp": its size, times and inode, "sha256": its hash}.
        self._cached = read_json_or_empty(self._path)
        self._used: dict[str, Any] = {}  # entries of the present run, in the same form
        self._stamps: dict[Path, list[int]] = {}  # of all files that were hashed or looked up

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file's content, in hex digits."""
        name, stamp, now = str(path.resolve()), _file_stamp(path), time.time()
        self._stamps[path] = stamp
        entry = self._cached.get(name)
        if isinstance(entry, dict) and entry.get("stamp") == stamp:
            self._used[name] = entry
            return str(entry["sha256"])
        digest = file_sha256(path)
        size, *times = stamp[:3]
        is_settled = now - max(times) / 1e9 > _SETTLED_AFTER_S
        if size >= _MIN_CACHED_BYTES and is_settled and stamp == _file_stamp(path):
            self._used[name] = {"stamp": stamp, "sha256": digest}
        return digest

    def require_unchanged(self) -> None:
        """Raise UserError if a file was changed since it was hashed."""
        for path, stamp in self._stamps.items():
            try:
                is_same = _without_change_time(_file_stamp(path)) == _without_change_time(stamp)
            except OSError:
                is_same = False
            if not is_same:
                raise UserError(
                    f"{path}: changed while it was read; start again when it no longer changes"
                )

    def save(self) -> None:
        """Write the hashes that were used to the cache file, and drop the others."""
        if self._used != self._cached:
            write_text(self._path, dump_json(self._used), is_durable=True)


def split_keys(
    settings: RunSettings,
    sources: list[Source],
    fingerprints: Fingerprints,
    *,
    held_out: float | int | None,
    limit: int | None,
) -> dict[str, str]:
    """Keys (16 hex digits) of the two splits of these sources: `held_out` rows, and `rest`.

    Parameter `held_out`: share or number of rows to hold out; None if all rows are in `rest`.
    `limit`: number of rows to use per split; None for all.
    """
    model = settings.model_folder
    patterns = (*_TOKENIZER_FILES, *(["*.py"] if settings.trust_remote_code else []))
    tokenizer = {path for pattern in patterns for path in model.glob(pattern) if path.is_file()}
    values = settings.model_dump(mode="json", include=set(settings_with_change("documents")))
    if settings.chat_template not in ("model", "chatml"):  # a file: its content, not its path
        read_template(settings.chat_template)  # raises UserError if it cannot be read
        values["chat_template"] = fingerprints.sha256(Path(settings.chat_template))
    inputs = {
        "format": _FORMAT,
        "data": [_source_inputs(source, fingerprints) for source in sources],
        "tokenizer": {
            str(path.relative_to(model)): fingerprints.sha256(path) for path in sorted(tokenizer)
        },
        "settings": values,
        "embeddings": num_embeddings(settings),
        **({"new_tokens": settings.new_tokens} if settings.new_tokens else {}),
        "held_out": held_out,
        "limit": limit,
    }
    return {
        split: hashlib.sha256(
            json.dumps({**inputs, "split": split}, sort_keys=True).encode()
        ).hexdigest()[:16]
        for split in ("rest", "held_out")
    }


def _source_inputs(source: Source, fingerprints: Fingerprints) -> dict[str, Any]:
    files = [[detect_kind(path), fingerprints.sha256(path)] for path in source.files]
    return {"files": files, "weight": source.weight, "limit": source.limit}


def _file_stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _without_change_time(stamp: list[int]) -> list[int]:
    """The stamp without the change time, which also changes with the file's mode and links."""
    size, modified, _, inode = stamp
    return [size, modified, inode]
