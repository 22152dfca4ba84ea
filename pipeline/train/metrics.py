"""metrics.jsonl, one line per step, and the measurements in it: seconds and peak memory."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.files import atomic_file, write_text
from pipeline.train.live_bytes import LiveBytes

_Item = TypeVar("_Item")


class MetricsFile:
    """Appends lines. Lines of an earlier start stay up to the step that is resumed from."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._unwritten: list[bytes] = []

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it, for readers that follow the file.

        Lines that a full disk does not take are kept in memory and written with a later line.
        """
        self._unwritten.append(f"{json.dumps(line)}\n".encode())
        self.flush()

    def flush(self) -> None:
        """Write the lines that a full disk did not take; a deleted file is written again."""
        with suppress(OSError):
            self._restore_deleted()
            while self._unwritten:
                _write_whole(self._file, self._unwritten[0])
                del self._unwritten[0]

    def _restore_deleted(self) -> None:
        """Copy a deleted file, whose content stays readable while it is open, to a new one."""
        size = os.fstat(self._file.fileno()).st_size
        with suppress(FileNotFoundError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return
        with atomic_file(self._path) as temporary:
            temporary.write_bytes(os.pread(self._file.fileno(), size, 0))
        self._file.close()
        self._file = self._path.open("a+b", buffering=0)


def _write_whole(file: FileIO, data: bytes) -> None:
    """Write all of it or, with an OSError, nothing: the next line would be appended to a part."""
    size = os.fstat(file.fileno()).st_size
    try:
        written = 0
        while written < len(data):  # a disk that fills up takes a part first
            written += file.write(data[written:])
    except OSError:
        file.truncate(size)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a metrics file: a kill or a bad disk may have damaged others."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # also where the bytes are no UTF-8
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class InputWait:
    """Seconds that the consumer of an iterator waited for items."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def over(self, source: Iterable[_Item]) -> Iterator[_Item]:
        """The same items, with the wait for each of them counted."""
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
        """Seconds waited since the last lap."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class PeakBytes:
    """Peak bytes in live tensors; created before the model is loaded.

    CUDA counts them throughout the run. On a CPU every operator is intercepted, so only the first
    steps of a start are measured, and only on rank 0.
    """

    _WATCHED_STEPS = 2

    def __init__(self, device: torch.device, *, is_watched: bool) -> None:
        self._device = device
        self._steps_left = self._WATCHED_STEPS
        self._live = LiveBytes() if is_watched and device.type == "cpu" else None
        if self._live is not None:
            self._live.__enter__()  # type: ignore[no-untyped-call]

    def after_step(self) -> int | None:
        """The peak so far, in bytes; None on a CPU after the measured steps."""
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
