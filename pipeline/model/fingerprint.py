"""Fingerprint of a base model: the SHA-256 of every tensor and of config.json. No torch.

Hashes are computed in parallel threads. They are cached in the user's cache folder and reused as
long as a file's size, times and inode do not change.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline.cluster.progress import show_progress
from pipeline.errors import UserError, first_few
from pipeline.files import dump_json, read_json_or_empty, require_json, user_cache, write_text
from pipeline.model.tensor_files import Entry, read_header, weight_files

logger = logging.getLogger(__name__)

VERSION = 2
RECORD = "base.json"  # file of a run folder with the fingerprint of the run's base
_CONFIG = "config.json"
_BUFFER_BYTES = 2**22
_MAX_THREADS = 16
_one_at_a_time = threading.Lock()  # a second thread waits, and then finds the hashes in the cache

# Version 1 of fingerprints, used up to release 0.1.0, hashed only samples of each file.
_SAMPLES = 16
_SAMPLE_BYTES = 65536


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of a base: tensor name -> SHA-256. The name `config.json` stands for that file."""

    tensors: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """One SHA-256 over the version and all hashes."""
        text = json.dumps(sorted(self.tensors.items()))
        return f"{VERSION}:{hashlib.sha256(text.encode()).hexdigest()}"

    def as_json(self) -> dict[str, Any]:
        """The fingerprint as it is stored in trained_on.json and base.json."""
        return {"version": VERSION, "sha256": self.digest, "tensors": dict(self.tensors)}

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """Read the result of `as_json`. Raises UserError if `record` has another form."""
        try:
            version = record["version"]
            tensors = {str(name): str(digest) for name, digest in record["tensors"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError("the recorded fingerprint of the base is damaged") from None
        if version != VERSION:
            raise UserError(
                f"the fingerprint of the base has version {version}, but this version of RankZero "
                f"reads only version {VERSION}: use the version of RankZero that wrote it"
            )
        return cls(tensors)


def base_fingerprint(folder: Path) -> Fingerprint:
    """The fingerprint of a model folder. Raises UserError if a file cannot be read."""
    total = sum(path.stat().st_size for path in weight_files(folder))
    with show_progress(f"hashing {folder}", total=total) as work:
        return _fingerprint(folder, work.advance)


def start_hashing(folder: Path) -> None:
    """Compute the fingerprint of a model folder in a thread, for a later `base_fingerprint`.

    That call waits for the thread and finds the hashes in the cache. Errors are ignored here,
    because that call repeats them.
    """

    def compute() -> None:
        with suppress(OSError, UserError):
            _fingerprint(folder, lambda amount: None)

    # A daemon, because the process may end meanwhile.
    threading.Thread(target=compute, name="fingerprint", daemon=True).start()


def _fingerprint(folder: Path, advance: Callable[[int], None]) -> Fingerprint:
    """The fingerprint of a model folder. `advance` gets the size of each file that is done."""
    start = time.perf_counter()
    with _one_at_a_time:
        cache = _HashCache(folder)
        config = hashlib.sha256((folder / _CONFIG).read_bytes()).hexdigest()
        tensors, hashed_bytes = {_CONFIG: config}, 0
        for path in weight_files(folder):
            state = _file_state(path)  # before hashing, because the file may change meanwhile
            hashes = cache.get(path.name, state)
            if hashes is None:
                hashes = _hash_file(path)
                hashed_bytes += state["size"]
                cache.put(path.name, state, hashes)
            advance(state["size"])
            tensors |= hashes
        if hashed_bytes:
            cache.save()
            seconds = time.perf_counter() - start
            logger.debug("base: %.1f GB hashed in %.1f s", hashed_bytes / 1e9, seconds)
    return Fingerprint(tensors)


def require_recorded_base(recorded: Any, folder: Path, remedy: str) -> None:
    """Raise UserError, naming tensors that differ, if a base is not the recorded one.

    `recorded`: result of `Fingerprint.as_json()`, or a fingerprint of version 1, which is a text.
    `remedy`: end of the error message.
    """
    if is_sampled(recorded):
        if not is_same_by_samples(recorded, folder):
            raise UserError(f"base: {folder} is not the model that was trained on; {remedy}")
        return
    before, now = Fingerprint.from_json(recorded).tensors, base_fingerprint(folder).tensors
    names = sorted(before.keys() | now.keys())
    if different := [name for name in names if before.get(name) != now.get(name)]:
        raise UserError(
            f"base: {folder} is not the model that was trained on: {len(different)} of "
            f"{len(names)} tensors differ: {first_few(different)}; {remedy}"
        )


def require_base_of_run(run_folder: Path, model_folder: Path) -> str:
    """Digest of the base of a run. Raises UserError if the run was started with another base.

    If base.json is missing or damaged, only the digest in the checkpoint can be compared, and the
    caller does this.
    """
    if recorded := read_json_or_empty(run_folder / RECORD):
        remedy = (
            "restore the base, or accept the new one with accept_changes: [base], or set resume: "
            "never"
        )
        require_recorded_base(recorded, model_folder, remedy)
    return base_fingerprint(model_folder).digest


def record_base_of_run(run_folder: Path, model_folder: Path) -> str:
    """Write the fingerprint of the base of a run to base.json; returns its digest."""
    fingerprint = base_fingerprint(model_folder)
    write_text(run_folder / RECORD, dump_json(fingerprint.as_json()))
    return fingerprint.digest


def base_of_run(run_folder: Path, model_folder: Path) -> Fingerprint:
    """Fingerprint of the base that was recorded at the start of the run."""
    record = run_folder / RECORD
    if record.is_file():
        return Fingerprint.from_json(require_json(record))
    return base_fingerprint(model_folder)  # the record was removed during the run


def is_sampled(recorded: Any) -> bool:
    """Whether a recorded fingerprint has version 1, a hash of samples of the files."""
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
            "base: an earlier version of RankZero recorded only samples of the files of %s; these "
            "are unchanged, but all other bytes could not be compared",
            folder,
        )
    return is_same


def _hash_file(path: Path) -> dict[str, str]:
    """Tensor name -> SHA-256 of its dtype, shape and bytes, for all tensors of a file."""
    entries = read_header(path).entries
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    try:
        with ThreadPoolExecutor(threads) as pool:  # hashlib releases the GIL
            digests = pool.map(lambda entry: _hash_tensor(path, entry), entries.values())
            return dict(zip(entries, digests, strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _hash_tensor(path: Path, entry: Entry) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
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


class _HashCache:
    """Cache of the hashes of a model folder's files, in the user's cache folder.

    The hashes are also kept in the memory of this process, in case the folder is not writable.
    """

    _of_this_process: ClassVar[dict[Path, dict[str, Any]]] = {}

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        self._path = user_cache() / "fingerprints" / f"{name}.json"
        self._files = self._of_this_process.setdefault(self._path, {})
        stored = read_json_or_empty(self._path)
        if stored.get("version") == VERSION and isinstance(stored.get("files"), dict):
            self._files.update(stored["files"])

    def get(self, name: str, state: Mapping[str, int]) -> dict[str, str] | None:
        """The cached hashes of a file; None if there are none for this `_file_state`."""
        stored = self._files.get(name)
        if not isinstance(stored, dict) or stored.get("state") != state:
            return None
        tensors = stored.get("tensors")
        return dict(tensors) if isinstance(tensors, dict) else None

    def put(self, name: str, state: Mapping[str, int], tensors: Mapping[str, str]) -> None:
        """Add the hashes of a file to the cache."""
        self._files[name] = {"state": dict(state), "tensors": dict(tensors)}

    def save(self) -> None:
        """Write the cache file. If this fails, the next run computes the hashes again."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = dump_json({"version": VERSION, "files": self._files})
            write_text(self._path, text)
        except OSError as error:
            logger.info("base: its hashes cannot be cached: %s", error)


def _file_state(path: Path) -> dict[str, int]:
    """File attributes that change if the content changes.

    ctime also changes if a program writes the file and then resets mtime.
    """
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }
