"""Micro-batches of documents -> tensors.

B: documents, T: tokens of the longest of them.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data.order import MicroBatch

if TYPE_CHECKING:
    from pipeline.data.prepared import Split

IGNORED = -100  # a label that does not count
_PADDING = 0  # any id would do: it is on the right, where causal attention never looks


@dataclass(frozen=True)
class Batch:
    """What the model is given.

    Padding is kept out by its place and its label, never by its token id: no position before it
    attends to it, and it counts in no loss.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64: the token where it counts, else IGNORED
    tokens: int  # useful ones: not padding

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.tokens,
        )


def build_batch(split: "Split", sequences: Sequence[int]) -> Batch:
    """Tensors of some sequences; of none, one padding token that counts for nothing."""
    found = [document for i in sequences for document in split.sequence(i)]
    longest = max((len(ids) for ids, _ in found), default=1)
    shape = (max(len(found), 1), longest)
    input_ids = torch.full(shape, _PADDING, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (ids, supervised) in enumerate(found):
        tokens = torch.from_numpy(ids.astype("int64"))
        input_ids[row, : len(ids)] = tokens
        labels[row, : len(ids)] = tokens.masked_fill(~torch.from_numpy(supervised.copy()), IGNORED)
    return Batch(input_ids, labels, sum(len(ids) for ids, _ in found))


class _RankBatches(Dataset[Batch]):
    def __init__(self, split: "Split", work: Sequence[MicroBatch]) -> None:
        self._split, self._work = split, work

    def __len__(self) -> int:
        return len(self._work)

    def __getitem__(self, index: int) -> Batch:
        return build_batch(self._split, self._work[index].sequences)


def _leave_signals_to_the_rank(worker: int) -> None:
    """A launcher ends a rank's children with it, but a rank that is asked to stop needs them."""
    del worker
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def batches_of(
    split: "Split",
    work: Sequence[MicroBatch],
    *,
    num_workers: int = 0,
    prefetch_factor: int = 2,
) -> Iterator[Batch]:
    """The batches of one rank's work, in order; built ahead where there are workers."""
    loader: DataLoader[Batch] = DataLoader(
        _RankBatches(split, work),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_rank,
        prefetch_factor=prefetch_factor if num_workers else None,
    )
    return iter(loader)
