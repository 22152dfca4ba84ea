"""CheckpointWriter: a thread of rank 0 that writes checkpoints while training continues."""

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
    """Writer of checkpoints and best adapters, used by the main thread of rank 0.

    Only one write is in flight; the next one waits for it. A failed write is reported, and the next
    save tries again. `restore_folder`: called before each write; it restores the files of a run
    folder that was deleted during the run. `on_saved`: called by the thread with the step of each
    checkpoint that is on the disk.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        restore_folder: Callable[[], None],
        on_saved: Callable[[int], None],
    ) -> None:
        self._checkpoints, self._restore_folder = checkpoints, restore_folder
        self._on_saved = on_saved
        self._thread: threading.Thread | None = None
        # "checkpoint" or "best" -> error message, if the last write of that kind failed.
        self._failures: dict[str, str] = {}
        self._slowest_s = 0.0
        self._finished: SimpleQueue[tuple[str | None, float | None]] = SimpleQueue()
        # The best adapter (its weights, and the progress at its step) until it is on the disk.
        self._best: tuple[Tensors, Progress] | None = None
        self.last_step: int | None = None

    def save(self, weights: Tensors, moments: Tensors, progress: Progress) -> None:
        """Start to write a checkpoint. The tensors must not be changed afterwards."""
        progress = replace(progress)
        write = partial(self._write_checkpoint, weights, moments, progress)
        self._start_thread(write, "checkpoint", f"step {progress.step}")

    def save_best(self, weights: Tensors, progress: Progress) -> None:
        """Start to write the best adapter: the weights with the lowest held-out loss."""
        self.wait()
        self._best = (weights, replace(progress))
        self._start_thread(self._write_best, "best", f"the best adapter (step {progress.step})")

    def best(self, progress: Progress) -> Tensors:
        """The weights of the best adapter, from the disk or, if a write failed, from memory."""
        self.wait()
        return self._checkpoints.read_best(progress) if self._best is None else self._best[0]

    def wait(self) -> str | None:
        """Wait for the write in flight.

        Returns the error message if the last write of a checkpoint or of a best adapter failed.
        """
        if self._thread is not None:
            self._thread.join()
        return next(iter(self._failures.values()), None)

    def wait_at_most(self, seconds: float) -> None:
        """Wait for the write in flight, but at most this long. May be called from any thread."""
        if self._thread is not None:
            self._thread.join(seconds)

    def finished_writes(self) -> Iterator[tuple[str | None, float | None]]:
        """For each write that has finished since the last call: error message and seconds.

        The message is None after a success. The seconds are None unless the write is the slowest
        so far.
        """
        while not self._finished.empty():
            yield self._finished.get()

    def require_written(self) -> None:
        """Raise RankZeroError unless the latest checkpoint and best adapter are on the disk."""
        if failure := self.wait():
            raise RankZeroError(f"{failure}; earlier checkpoints are unchanged")

    def _start_thread(self, write: Callable[[], None], kind: str, name: str) -> None:
        """Call `write` in a new thread. `kind`: key of `_failures`; `name`: for its message."""
        self.wait()

        def write_and_record() -> None:
            started, failure = time.perf_counter(), None
            try:
                self._restore_folder()
                write()
            except Exception as error:  # noqa: BLE001 - training continues after any error
                text = str(error) if isinstance(error, RankZeroError) else repr(error)
                failure = self._failures[kind] = f"{name} is not saved: {text}"
            else:
                self._failures.pop(kind, None)
            seconds = time.perf_counter() - started
            self._finished.put((failure, seconds if seconds > self._slowest_s else None))
            self._slowest_s = max(seconds, self._slowest_s)

        self._thread = threading.Thread(target=write_and_record, name="checkpoint")
        self._thread.start()

    def _write_checkpoint(self, weights: Tensors, moments: Tensors, progress: Progress) -> None:
        if self._best is not None:  # an earlier write of the best adapter failed
            self._write_best()
        self._checkpoints.write(weights, moments, progress)
        self.last_step = progress.step
        self._on_saved(progress.step)

    def _write_best(self) -> None:
        assert self._best is not None
        self._checkpoints.write_best(*self._best)
        self._best = None
        self._failures.pop("best", None)
