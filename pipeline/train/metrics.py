"""metrics.jsonl: a line a step, written as it happens."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.train.live_bytes import LiveBytes

_Item = TypeVar("_Item")


class MetricsFile:
    """Appends lines; of an earlier start it keeps those up to the step that is resumed from."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        beside.replace(path)
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._unwritten: list[bytes] = []

    def write(self, line: dict[str, Any]) -> None:
        """One line, written at once: whoever follows the file sees each step.

        What a full disk does not take is kept, however much it is, and goes out with a later line.
        """
        self._unwritten.append(f"{json.dumps(line)}\n".encode())
        self.flush()

    def flush(self) -> None:
        """Write what a full disk did not take, to a file anew where that was deleted."""
        with suppress(OSError):
            self._put_back()
            while self._unwritten:
                _write_whole(self._file, self._unwritten[0])
                del self._unwritten[0]

    def _put_back(self) -> None:
        """A deleted file lives on while it is open: its lines go into a new one."""
        size = os.fstat(self._file.fileno()).st_size
        with suppress(FileNotFoundError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return
        beside = self._path.with_name(f".{self._path.name}.tmp")
        beside.write_bytes(os.pread(self._file.fileno(), size, 0))
        beside.replace(self._path)
        self._file.close()
        self._file = self._path.open("a+b", buffering=0)


def _write_whole(file: FileIO, data: bytes) -> None:
    """All of it or, with an OSError, nothing: a part would join the next line to itself."""
    size = os.fstat(file.fileno()).st_size
    try:
        written = 0
        while written < len(data):  # a disk that fills up takes a part, and refuses the rest
            written += file.write(data[written:])
    except OSError:
        file.truncate(size)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics file; the last may have been cut off by a kill."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


class Stopwatch:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class InputWait:
    """Seconds that whoever iterates has waited for the next item since it was last asked."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def over(self, source: Iterable[_Item]) -> Iterator[_Item]:
        """The same items."""
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
        """Seconds since the last lap."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class PeakBytes:
    """Most bytes in live tensors since it was made, from before the model is loaded.

    CUDA counts them for as long as the run lasts. On a CPU every operator is watched, so only the
    first steps of a start are, and on rank 0 alone.
    """

    _WATCHED_STEPS = 2

    def __init__(self, device: torch.device, *, is_watched: bool) -> None:
        self._device = device
        self._steps_left = self._WATCHED_STEPS
        self._live = LiveBytes() if is_watched and device.type == "cpu" else None
        if self._live is not None:
            self._live.__enter__()  # type: ignore[no-untyped-call]

    def after_step(self) -> int | None:
        """The peak so far, in bytes; None on a CPU that is not watched any more."""
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
