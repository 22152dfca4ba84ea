"""metrics.jsonl, with one line per step, and the measurements in it: seconds and peak memory."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.files import atomic_file, dump_json, write_text
from pipeline.train.live_bytes import LiveBytes

_Item = TypeVar("_Item")


class MetricsFile:
    """metrics.jsonl, to which lines are appended.

    If the run was resumed from the checkpoint of step `resumed_step`, the file has lines from
    before; those of later steps are removed, because these steps are repeated.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        write_text(path, "".join(dump_json(line, indent=None) for line in kept))
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._unwritten: list[bytes] = []

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and write it at once, so that other programs can follow the file.

        If the disk is full, the line is kept in memory and written together with a later line.
        """
        self._unwritten.append(dump_json(line, indent=None).encode())
        self.flush()

    def flush(self) -> None:
        """Write the lines that are kept in memory. If the file was deleted, create it again."""
        with suppress(OSError):
            self._restore_deleted()
            while self._unwritten:
                _append_atomically(self._file, self._unwritten[0])
                del self._unwritten[0]

    def _restore_deleted(self) -> None:
        """If the file was deleted, copy its content, which stays readable while it is open."""
        size = os.fstat(self._file.fileno()).st_size
        with suppress(FileNotFoundError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return
        with atomic_file(self._path) as temporary:
            temporary.write_bytes(os.pread(self._file.fileno(), size, 0))
        self._file.close()
        self._file = self._path.open("a+b", buffering=0)


def _append_atomically(file: FileIO, data: bytes) -> None:
    """Append all bytes, or none if an OSError is raised, so that no line stays incomplete."""
    size = os.fstat(file.fileno()).st_size
    try:
        written = 0
        while written < len(data):  # before a disk is full, a write may be incomplete
            written += file.write(data[written:])
    except OSError:
        file.truncate(size)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a metrics file. Lines damaged by a kill or a bad disk are skipped.

    A loss that was not finite is None, because JSON has no such number.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # also raised for bytes that are not UTF-8
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Stopwatch:
    """Stopwatch for the seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the last lap."""
        return time.perf_counter() - self._last

    def lap(self) -> float:
        """Seconds since the last lap, which ends here."""
        seconds = self.elapsed()
        self._last += seconds
        return seconds


class InputWait:
    """Stopwatch for the time that a consumer of an iterator waits for items."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def over(self, source: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the items of `source`, and add up the seconds until each of them is available."""
        iterator = iter(source)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - start
            yield item

    def lap(self) -> float:
        """Seconds of waiting since the last lap."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class PeakBytes:
    """Peak bytes of live tensors since before the model was loaded.

    PyTorch's CUDA allocator counts them throughout the run. On a CPU every operator must be
    intercepted, which is slow, so only the first steps of the process are measured, and only if
    `is_watched` is true (on rank 0).
    """

    _WATCHED_STEPS = 2

    def __init__(self, device: torch.device, *, is_watched: bool) -> None:
        self._device = device
        self._steps_left = self._WATCHED_STEPS
        self._live = LiveBytes() if is_watched and device.type == "cpu" else None
        if self._live is not None:
            self._live.__enter__()  # type: ignore[no-untyped-call]

    def after_step(self) -> int | None:
        """The peak so far, in bytes; None if it is not measured, on a CPU after the first steps."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        live = self._live
        if live is None:
            return None
        self._steps_left -= 1
        if not self._steps_left:
            live.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._live = None
        return live.peak
