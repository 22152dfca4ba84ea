"""Micro-batches -> tensors, which a thread or worker processes prefetch.

B: sequences, T: tokens of the longest one. A sequence is a document or a pack of documents.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.cluster.stop import STOP_SIGNALS
from pipeline.data.order.order import MicroBatch
from pipeline.errors import SingleRankError

if TYPE_CHECKING:
    from pipeline.data.dataset.reader import Split

IGNORED = -100  # label that PyTorch's cross entropy ignores
_RAISED_IN_WORKER = "Caught "  # in torch's message about an exception that a worker raised
_PADDING = 0  # no token predicts or attends to padding, so any token id can be used


@dataclass(frozen=True)
class SequencePart:
    """The part of each sequence whose tokens a rank has, in a group of `size` ranks.

    `rank`: index of this rank in its group, and of its part. The parts are equally long; the last
    one is padded. The default is the whole sequence.
    """

    size: int = 1
    rank: int = 0

    def offsets(self, rows: np.ndarray, columns: np.ndarray, length: int) -> np.ndarray:
        """Offsets in this rank's flattened part of those tokens of (B, length) that it has."""
        part_length = ceil(length / self.size)
        columns = columns - self.rank * part_length
        is_own = (columns >= 0) & (columns < part_length)
        offsets: np.ndarray = rows[is_own] * part_length + columns[is_own]
        return offsets


WHOLE = SequencePart()


@dataclass(frozen=True)
class Batch:
    """Input of the model. B: sequences, T: tokens, S: supervised tokens.

    Padding is at the end of a sequence, so causal attention hides it from all other tokens, and it
    has no label. The first token of a document has no label, because no token predicts it.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64: the token id if the token is supervised, else IGNORED
    # (S,) int64: index, in this rank's flattened part, of the token before each supervised one
    predicting: torch.Tensor
    documents: tuple[tuple[int, ...], ...]  # for each sequence the lengths of its documents
    tokens: int  # number of tokens without padding
    part: SequencePart = WHOLE  # of each sequence; input_ids and labels have the whole sequences

    @property
    def attended(self) -> int | None:
        """Mean over tokens of the length of the token's document; None without packs."""
        if all(len(lengths) < 2 for lengths in self.documents):
            return None
        squares = sum(length**2 for lengths in self.documents for length in lengths)
        return ceil(squares / self.input_ids.numel())

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. The copy is asynchronous if the batch is in pinned memory."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory. DataLoader calls this method."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            input_ids=copy(self.input_ids),
            labels=copy(self.labels),
            predicting=copy(self.predicting),
        )


def build_batch(split: "Split", sequences: Sequence[int], part: SequencePart = WHOLE) -> Batch:
    """Build the tensors of these sequences; for no sequences, one padding token without label.

    `part`: the part of each sequence that this rank has.
    """
    rows = [split.sequence(i) for i in sequences]
    documents = tuple(tuple(len(ids) for ids, _ in row) for row in rows) or ((1,),)
    shape = (len(documents), max(sum(row) for row in documents))
    input_ids = np.full(shape, _PADDING, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, contents in enumerate(rows):
        start = 0
        for ids, supervised in contents:
            assert not supervised[0], "no token predicts the first token of a document"
            end = start + len(ids)
            input_ids[row, start:end] = ids
            np.copyto(labels[row, start:end], ids, where=supervised)
            start = end
    tokens = sum(map(sum, documents)) if rows else 0
    supervised_rows, columns = np.nonzero(labels != IGNORED)
    predicting = part.offsets(supervised_rows, columns - 1, shape[1])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        predicting=torch.from_numpy(predicting),
        documents=documents,
        tokens=tokens,
        part=part,
    )


class _RankBatches(Dataset[tuple[Batch, int]]):
    """Map-style dataset: index of a rank's micro-batch -> its batch and MicroBatch.first."""

    def __init__(self, split: "Split", work: Sequence[MicroBatch], part: SequencePart) -> None:
        self._split, self._work, self._part = split, work, part

    def __len__(self) -> int:
        return len(self._work)

    def __getitem__(self, index: int) -> tuple[Batch, int]:
        micro_batch = self._work[index]
        return build_batch(self._split, micro_batch.sequences, self._part), micro_batch.first


def _ignore_signals(worker: int) -> None:
    """Ignore the stop signals, which a launcher sends to workers too.

    A rank that stops needs its workers until the end of the step.
    """
    del worker
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches_of(
    split: "Split",
    work: Sequence[MicroBatch],
    *,
    part: SequencePart = WHOLE,
    num_workers: int = 0,
    prefetch_factor: int = 2,
) -> Iterator[tuple[Batch, int]]:
    """The batches of one rank in order, each with the offset of its first sequence in its step.

    Without workers a thread prefetches one batch. Iterate inside `worker_deaths_reported`.
    """
    loader: DataLoader[tuple[Batch, int]] = DataLoader(
        _RankBatches(split, work, part),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
        prefetch_factor=prefetch_factor if num_workers else None,
        # Forking would copy the locks of DeepSpeed's, CUDA's and our own threads.
        multiprocessing_context="spawn" if num_workers else None,
    )
    # multiprocessing's resource tracker is started first, because its start unblocks all signals.
    resource_tracker.ensure_running()
    # Workers inherit the blocked signals, so that none ends them before `_ignore_signals` runs.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return _report_worker_death(batches) if num_workers else _prefetch_in_thread(batches)


_Item = TypeVar("_Item")


def _prefetch_in_thread(batches: Iterator[_Item]) -> Iterator[_Item]:
    """Build the next batch in a thread while the caller uses the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _report_worker_death(batches: Iterator[_Item]) -> Iterator[_Item]:
    """Raise SingleRankError if a worker was killed while it sent a batch."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            if _RAISED_IN_WORKER in str(error):
                raise
            raise _worker_death_error() from error
        yield batch


@contextmanager
def worker_deaths_reported() -> Iterator[None]:
    """Context manager that raises SingleRankError if a DataLoader worker is killed in its body.

    torch raises RuntimeError from a signal handler at that moment, at any point of the body.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or _RAISED_IN_WORKER in str(error):
            raise
        raise _worker_death_error() from error


def _worker_death_error() -> SingleRankError:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch's handler would raise again
    return SingleRankError(
        "a DataLoader worker was killed from outside, most likely because memory ran out; "
        "dataloader_num_workers: 0 builds batches without worker processes"
    )
