"""Content hashes of a base model: SHA-256 of every tensor and of config.json. No torch.

Hashes are computed in parallel threads and remembered in the user's cache for as long as a file
keeps its size, times and inode.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, user_cache, write_text
from pipeline.model.tensor_files import Entry, read_header, weight_files

logger = logging.getLogger(__name__)

VERSION = 2
RECORD = "base.json"  # in a run folder
_CONFIG = "config.json"
_BUFFER_BYTES = 2**22
_MAX_THREADS = 16
_NAMED = 3  # number of differing tensors in a message

# Version 1, up to and including release 0.1.0: samples of each file.
_SAMPLES = 16
_SAMPLE_BYTES = 65536


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 by tensor name; `config.json` is one of the names."""

    tensors: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """One SHA-256 over the version and all hashes."""
        text = json.dumps(sorted(self.tensors.items()))
        return f"{VERSION}:{hashlib.sha256(text.encode()).hexdigest()}"

    def as_json(self) -> dict[str, Any]:
        """The form in which trained_on.json and base.json store it."""
        return {"version": VERSION, "sha256": self.digest, "tensors": dict(self.tensors)}

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """The inverse of `as_json`. Raises UserError for anything else."""
        try:
            version = record["version"]
            tensors = {str(name): str(digest) for name, digest in record["tensors"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError("the recorded fingerprint of the base is damaged") from None
        if version != VERSION:
            raise UserError(
                f"the fingerprint of the base is of version {version}, this version of RankZero "
                f"reads version {VERSION}: use the version that wrote it"
            )
        return cls(tensors)


def base_fingerprint(folder: Path) -> Fingerprint:
    """Hash all weights of a model folder. Raises UserError for files that cannot be read."""
    start = time.perf_counter()
    memory = _Memory(folder)
    config = hashlib.sha256((folder / _CONFIG).read_bytes()).hexdigest()
    tensors, hashed = {_CONFIG: config}, 0
    for path in weight_files(folder):
        state = _state(path)  # before reading: the file may be written to during the read
        known = memory.recall(path.name, state)
        if known is None:
            known = _hash_file(path)
            hashed += state["size"]
            memory.remember(path.name, state, known)
        tensors |= known
    if hashed:
        memory.save()
        seconds = time.perf_counter() - start
        logger.info("base: %.1f GB hashed in %.1f s", hashed / 1e9, seconds)
    return Fingerprint(tensors)


def require_recorded_base(recorded: Any, folder: Path, remedy: str) -> None:
    """Raise UserError, naming tensors, unless a base equals the recorded one byte for byte.

    `recorded` is `Fingerprint.as_json()`, or the text of a fingerprint of version 1.
    """
    if is_sampled(recorded):
        if not is_same_by_samples(recorded, folder):
            raise UserError(f"base: {folder} is not the model that was trained on; {remedy}")
        return
    then, now = Fingerprint.from_json(recorded).tensors, base_fingerprint(folder).tensors
    names = sorted(then.keys() | now.keys())
    if different := [name for name in names if then.get(name) != now.get(name)]:
        more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
        raise UserError(
            f"base: {folder} is not the model that was trained on: {len(different)} of "
            f"{len(names)} tensors differ: {', '.join(different[:_NAMED])}{more}; {remedy}"
        )


def require_base_of_run(run_folder: Path, model_folder: Path) -> str:
    """Digest of the base, before it is loaded. Raises UserError if the run began with another."""
    record = run_folder / RECORD
    if record.is_file():
        remedy = "put it back, or accept it with accept_changes: [base], or set resume: never"
        require_recorded_base(_read_record(record), model_folder, remedy)
    return base_fingerprint(model_folder).digest


def record_base_of_run(run_folder: Path, model_folder: Path) -> None:
    """Write RUN/base.json, the base that this run trains on."""
    write_text(run_folder / RECORD, dump_json(base_fingerprint(model_folder).as_json()))


def base_of_run(run_folder: Path, model_folder: Path) -> Fingerprint:
    """Fingerprint of the base as recorded when the run was started."""
    record = run_folder / RECORD
    if record.is_file():
        return Fingerprint.from_json(_read_record(record))
    return base_fingerprint(model_folder)  # the run folder has been removed during the run


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a JSON object: {error}") from None


def is_sampled(recorded: Any) -> bool:
    """Whether a recorded fingerprint has version 1, which hashed only samples of the files."""
    return isinstance(recorded, str) and re.fullmatch("[0-9a-f]{64}", recorded) is not None


def sampled_fingerprint(folder: Path) -> str:
    """The fingerprint of version 1: SHA-256 over config.json and samples of every file."""
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_same_by_samples(recorded: str, folder: Path) -> bool:
    """Whether a base matches a version 1 fingerprint; logs that only samples were compared."""
    is_same = recorded == sampled_fingerprint(folder)
    if is_same:
        logger.warning(
            "base: %s was recorded by an earlier version of RankZero, as samples of its files: "
            "those are unchanged, all other bytes were not compared",
            folder,
        )
    return is_same


def _hash_file(path: Path) -> dict[str, str]:
    """SHA-256 of dtype, shape and bytes of every tensor in a file."""
    entries = read_header(path).entries
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    try:
        with ThreadPoolExecutor(threads) as pool:  # hashlib releases the GIL
            digests = pool.map(lambda entry: _hash_tensor(path, entry), entries.values())
            return dict(zip(entries, digests, strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _hash_tensor(path: Path, entry: Entry) -> str:
    digest = hashlib.sha256(f"{entry.dtype}{list(entry.shape)}".encode())
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, entry.end - entry.start)))
    with path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        remaining = entry.end - entry.start
        while remaining:
            count = file.readinto(buffer[:remaining])
            if not count:
                raise OSError("the file was truncated while it was read")
            digest.update(buffer[:count])
            remaining -= count
    return digest.hexdigest()


class _Memory:
    """Cache of hashes, valid for a file of the same size, times and inode.

    Also held in this process, in case the user's cache folder is not writable.
    """

    _of_this_process: ClassVar[dict[Path, dict[str, Any]]] = {}

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        self._path = user_cache() / "fingerprints" / f"{name}.json"
        self._files = self._of_this_process.setdefault(self._path, {})
        with suppress(OSError, ValueError):
            stored = read_json(self._path)
            if stored.get("version") == VERSION and isinstance(stored.get("files"), dict):
                self._files.update(stored["files"])

    def recall(self, name: str, state: Mapping[str, int]) -> dict[str, str] | None:
        """The cached hashes of a file in this state, or None."""
        stored = self._files.get(name)
        if not isinstance(stored, dict) or stored.get("state") != state:
            return None
        tensors = stored.get("tensors")
        return dict(tensors) if isinstance(tensors, dict) else None

    def remember(self, name: str, state: Mapping[str, int], tensors: Mapping[str, str]) -> None:
        """Store the hashes of a file."""
        self._files[name] = {"state": dict(state), "tensors": dict(tensors)}

    def save(self) -> None:
        """Write the cache file. If that fails, the next run computes the hashes again."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = dump_json({"version": VERSION, "files": self._files})
            write_text(self._path, text)
        except OSError as error:
            logger.info("base: its hashes cannot be remembered: %s", error)


def _state(path: Path) -> dict[str, int]:
    """File attributes that change with the content; ctime reveals a write with a reset mtime."""
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }
