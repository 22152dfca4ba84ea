"""CheckpointWriter: rank 0 copies to host memory, and a thread writes while training continues."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import torch

from pipeline.errors import RankZeroError
from pipeline.train.checkpoint import Checkpoints, Progress

Tensors = Mapping[str, torch.Tensor]


class CheckpointWriter:
    """At most one write in flight; the next one waits for it. Used by rank 0's main thread.

    A failed write is reported, and the next save writes again. `restore_folder` is called before a
    write; it writes again what a run folder that was deleted during the run must hold.
    """

    def __init__(self, checkpoints: Checkpoints, restore_folder: Callable[[], None]) -> None:
        self._checkpoints, self._restore_folder = checkpoints, restore_folder
        self._thread: threading.Thread | None = None
        self._failures: dict[str, str] = {}  # of a checkpoint or a best adapter not on the disk
        self._slowest_s = 0.0
        self._finished: SimpleQueue[tuple[str | None, float | None]] = SimpleQueue()
        self._best: tuple[Tensors, Progress] | None = None  # not on the disk yet
        self.last_step: int | None = None

    def save(self, weights: Tensors, moments: Tensors, progress: Progress) -> None:
        """Start to write a checkpoint; the tensors must not change any more."""
        progress = replace(progress)
        write = partial(self._write, weights, moments, progress)
        self._start(write, "checkpoint", f"step {progress.step}")

    def save_best(self, weights: Tensors, progress: Progress) -> None:
        """Start to write the weights with the lowest held-out loss so far."""
        self.wait()
        self._best = (weights, replace(progress))
        self._start(self._write_best, "best", f"the best adapter, of step {progress.step}")

    def best(self, progress: Progress) -> Tensors:
        """The weights of `save_best`, from memory where the disk did not take them."""
        self.wait()
        return self._checkpoints.read_best(progress) if self._best is None else self._best[0]

    def wait(self) -> str | None:
        """Wait for the write in flight; why the latest checkpoint or best failed, or None."""
        if self._thread is not None:
            self._thread.join()
        return next(iter(self._failures.values()), None)

    def wait_at_most(self, seconds: float) -> None:
        """Wait for the write in flight in a process that must end. From any thread."""
        if self._thread is not None:
            self._thread.join(seconds)

    def finished(self) -> Iterator[tuple[str | None, float | None]]:
        """(error, seconds) of each write finished since the last call.

        `seconds` only where the write is the slowest so far.
        """
        while not self._finished.empty():
            yield self._finished.get()

    def require_written(self) -> None:
        """Raise RankZeroError unless the latest checkpoint and best adapter are on the disk."""
        if failure := self.wait():
            raise RankZeroError(f"{failure}; what was written before is untouched")

    def _start(self, write: Callable[[], None], kind: str, what: str) -> None:
        self.wait()

        def work() -> None:
            started, failure = time.perf_counter(), None
            try:
                self._restore_folder()
                write()
            except Exception as error:  # noqa: BLE001 - training continues whatever it is
                text = str(error) if isinstance(error, RankZeroError) else repr(error)
                failure = self._failures[kind] = f"{what} is not saved: {text}"
            else:
                self._failures.pop(kind, None)
            seconds = time.perf_counter() - started
            self._finished.put((failure, seconds if seconds > self._slowest_s else None))
            self._slowest_s = max(seconds, self._slowest_s)

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def _write(self, weights: Tensors, moments: Tensors, progress: Progress) -> None:
        if self._best is not None:
            self._write_best()
        self._checkpoints.write(weights, moments, progress)
        self.last_step = progress.step

    def _write_best(self) -> None:
        assert self._best is not None
        self._checkpoints.write_best(*self._best)
        self._best = None
        self._failures.pop("best", None)
