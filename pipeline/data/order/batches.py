"""Micro-batches of sequences -> tensors.

B: sequences, T: tokens of the longest of them. A sequence is one document or, packed, several.
"""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data.order.order import MicroBatch
from pipeline.errors import OfOneRank

if TYPE_CHECKING:
    from pipeline.data.dataset.reader import Split

IGNORED = -100  # a label that does not count
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_IS_ITS_OWN = "Caught "  # how torch begins an error that a worker has met itself
_PADDING = 0  # any id would do: it is on the right, where causal attention never looks


@dataclass(frozen=True)
class Batch:
    """What the model is given.

    Padding is kept out by its place and its label, never by its token id: no position before it
    attends to it, and it counts in no loss. Of each document the first token never counts.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64: the token where it counts, else IGNORED
    documents: tuple[tuple[int, ...], ...]  # tokens of the documents of each row, in their order
    tokens: int  # useful ones: not padding

    @property
    def attended(self) -> int | None:
        """Tokens that a token's attention reaches over in the mean: of a pack, its document's.

        None where no row holds two documents.
        """
        if all(len(row) < 2 for row in self.documents):
            return None
        squares = sum(tokens**2 for row in self.documents for tokens in row)
        return ceil(squares / self.input_ids.numel())

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.documents,
            self.tokens,
        )


def build_batch(split: "Split", sequences: Sequence[int]) -> Batch:
    """Tensors of some sequences; of none, one padding token that counts for nothing."""
    found = [split.sequence(i) for i in sequences]
    documents = tuple(tuple(len(ids) for ids, _ in row) for row in found) or ((1,),)
    shape = (len(documents), max(sum(row) for row in documents))
    input_ids = np.full(shape, _PADDING, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, parts in enumerate(found):
        start = 0
        for ids, supervised in parts:
            assert not supervised[0], "a document's first token counts, which nothing predicts"
            end = start + len(ids)
            input_ids[row, start:end] = ids
            np.copyto(labels[row, start:end], ids, where=supervised)
            start = end
    tokens = sum(map(sum, documents)) if found else 0
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), documents, tokens)


class _RankBatches(Dataset[tuple[Batch, int]]):
    def __init__(self, split: "Split", work: Sequence[MicroBatch]) -> None:
        self._split, self._work = split, work

    def __len__(self) -> int:
        return len(self._work)

    def __getitem__(self, index: int) -> tuple[Batch, int]:
        micro_batch = self._work[index]
        return build_batch(self._split, micro_batch.sequences), micro_batch.first


def _leave_signals_to_the_rank(worker: int) -> None:
    """A launcher ends a rank's children with it, but a rank that is asked to stop needs them."""
    del worker
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches_of(
    split: "Split",
    work: Sequence[MicroBatch],
    *,
    num_workers: int = 0,
    prefetch_factor: int = 2,
) -> Iterator[tuple[Batch, int]]:
    """The batches of one rank's work, in order, each with its place in its global batch.

    They are built ahead, by a thread or by workers. Iterate inside `worker_deaths_reported`.
    """
    loader: DataLoader[tuple[Batch, int]] = DataLoader(
        _RankBatches(split, work),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_rank,
        prefetch_factor=prefetch_factor if num_workers else None,
        # Forking would copy the locks of DeepSpeed's, CUDA's and our own threads.
        multiprocessing_context="spawn" if num_workers else None,
    )
    resource_tracker.ensure_running()  # starting it would take signals out of the mask again
    # Workers inherit the mask, so that nothing ends them before they ignore the signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _while_workers_live(batches) if num_workers else _one_ahead(batches)


_Item = TypeVar("_Item")


def _one_ahead(batches: Iterator[_Item]) -> Iterator[_Item]:
    """The same, the next one made by a thread while a device or a library is at work."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        made = thread.submit(next, batches, None)
        while (batch := made.result()) is not None:
            made = thread.submit(next, batches, None)
            yield batch


def _while_workers_live(batches: Iterator[_Item]) -> Iterator[_Item]:
    """The same; one that a worker has begun to hand over cannot be had once it is dead."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            if _IS_ITS_OWN in str(error):
                raise
            raise _a_worker_died() from error
        yield batch


@contextmanager
def worker_deaths_reported() -> Iterator[None]:
    """Raise OfOneRank if a worker was killed: torch raises that from a signal handler, anywhere."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or _IS_ITS_OWN in str(error):
            raise
        raise _a_worker_died() from error


def _a_worker_died() -> OfOneRank:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would raise again, wherever we are
    return OfOneRank(
        "a process that builds batches was ended from outside, most likely for want of memory; "
        "dataloader_num_workers: 0 needs none"
    )
