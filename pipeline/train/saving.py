"""Checkpoints written beside the training: rank 0 copies to host memory, a thread writes."""

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


class Saver:
    """At most one write in flight; the next one waits for it. Rank 0's, in its main thread.

    A failed write harms nothing: it is told, and the next save writes again. `restore_folder` is
    called before a write; it puts back what a run folder deleted meanwhile must hold.
    """

    def __init__(self, checkpoints: Checkpoints, restore_folder: Callable[[], None]) -> None:
        self._checkpoints, self._restore_folder = checkpoints, restore_folder
        self._thread: threading.Thread | None = None
        self._failures: dict[str, str] = {}  # of a checkpoint or a best that is not on the disk
        self._slowest = 0.0
        self._untold: SimpleQueue[tuple[str | None, float | None]] = SimpleQueue()
        self._best: tuple[Tensors, Progress] | None = None  # not on disk yet
        self.last_step: int | None = None

    def save(self, weights: Tensors, moments: Tensors, progress: Progress) -> None:
        """Begin to write a checkpoint; the tensors must not change any more."""
        progress = replace(progress)
        write = partial(self._write, weights, moments, progress)
        self._begin(write, "checkpoint", f"step {progress.step}")

    def keep_best(self, weights: Tensors, progress: Progress) -> None:
        """Begin to write the weights of the lowest held-out loss so far."""
        self.wait()
        self._best = (weights, replace(progress))
        self._begin(self._write_best, "best", f"the best adapter, of step {progress.step}")

    def best(self, progress: Progress) -> Tensors:
        """The weights of `keep_best`, from memory where the disk would not take them."""
        self.wait()
        return self._checkpoints.read_best(progress) if self._best is None else self._best[0]

    def wait(self) -> str | None:
        """Wait for the write in flight; why the latest checkpoint or best failed, or None."""
        if self._thread is not None:
            self._thread.join()
        return next(iter(self._failures.values()), None)

    def wait_at_most(self, seconds: float) -> None:
        """For a process that must end: give the write in flight a chance. From any thread."""
        if self._thread is not None:
            self._thread.join(seconds)

    def news(self) -> Iterator[tuple[str | None, float | None]]:
        """Of each write that ended since the last call: why it failed; its seconds, if a record."""
        while not self._untold.empty():
            yield self._untold.get()

    def require_written(self) -> None:
        """Raise RankZeroError unless the latest checkpoint and best are on the disk."""
        if failure := self.wait():
            raise RankZeroError(f"{failure}; what was written before is untouched")

    def _begin(self, write: Callable[[], None], kind: str, what: str) -> None:
        self.wait()

        def work() -> None:
            began, failure = time.perf_counter(), None
            try:
                self._restore_folder()
                write()
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                said = str(error) if isinstance(error, RankZeroError) else repr(error)
                failure = self._failures[kind] = f"{what} is not saved: {said}"
            else:
                self._failures.pop(kind, None)
            seconds = time.perf_counter() - began
            self._untold.put((failure, seconds if seconds > self._slowest else None))
            self._slowest = max(seconds, self._slowest)

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
