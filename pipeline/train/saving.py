"""Checkpoints written beside the training: rank 0 copies to host memory, a thread writes."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

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
        self._failure: str | None = None
        self._slowest = 0.0
        self._news: tuple[str | None, float | None] = (None, None)
        self._best: tuple[Tensors, Progress] | None = None  # not on disk yet
        self.last_step: int | None = None

    def save(self, weights: Tensors, moments: Tensors, progress: Progress) -> None:
        """Begin to write a checkpoint; the tensors must not change any more."""
        progress = replace(progress)
        self._begin(lambda: self._write(weights, moments, progress), f"step {progress.step}")

    def keep_best(self, weights: Tensors, progress: Progress) -> None:
        """Begin to write the weights of the lowest held-out loss so far."""
        self.wait()
        self._best = (weights, replace(progress))
        self._begin(self._write_best, f"the best adapter, of step {progress.step}")

    def best(self, progress: Progress) -> Tensors:
        """The weights of `keep_best`, from memory where the disk would not take them."""
        self.wait()
        return self._checkpoints.read_best(progress) if self._best is None else self._best[0]

    def wait(self) -> str | None:
        """Wait for the write in flight; why the latest one failed, or None."""
        if self._thread is not None:
            self._thread.join()
        return self._failure

    def wait_at_most(self, seconds: float) -> None:
        """For a process that must end: give the write in flight a chance. From any thread."""
        if self._thread is not None:
            self._thread.join(seconds)

    def news(self) -> tuple[str | None, float | None]:
        """Of a write that ended since the last call: why it failed; its seconds, if a record."""
        news, self._news = self._news, (None, None)
        return news

    def require_written(self) -> None:
        """Raise RankZeroError unless the latest write succeeded."""
        if failure := self.wait():
            raise RankZeroError(f"{failure}; what was written before is untouched")

    def _begin(self, write: Callable[[], None], what: str) -> None:
        self.wait()

        def work() -> None:
            began = time.perf_counter()
            try:
                self._restore_folder()
                write()
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                said = str(error) if isinstance(error, RankZeroError) else repr(error)
                self._failure = f"{what} is not saved: {said}"
            else:
                self._failure = None
            seconds = time.perf_counter() - began
            self._news = (self._failure, seconds if seconds > self._slowest else None)
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
