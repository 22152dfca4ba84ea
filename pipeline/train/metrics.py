"""metrics.jsonl: a line a step, written as it happens."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class MetricsFile:
    """Appends lines; of an earlier start it keeps those up to the step that is resumed from."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        beside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """One line, flushed: whoever follows the file sees each step.

        What a full disk does not take stays in the buffer, and goes out with a later line.
        """
        self._file.write(json.dumps(line) + "\n")
        with suppress(OSError):
            self._file.flush()


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


def peak_device_bytes(device: torch.device) -> int | None:
    """Most bytes in tensors on a CUDA device so far; None on a CPU, where nothing counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
