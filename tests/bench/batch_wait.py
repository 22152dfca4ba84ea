"""Time that a rank waits for its next micro-batch, for 0, 1 and 2 worker processes.

    python -m tests.bench.batch_wait

Shows the time that `dataloader_num_workers` can save. The data are memory-mapped packs of 1024
tokens, partitioned over eight ranks as in training.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.data.order.batches import batches_of
from pipeline.data.order.order import BatchLayout, RankWork
from pipeline.plan.cost.per_token import SequenceFlops
from tests.tiny import sequences_of

PACKS, TOKENS, DOCUMENTS = 200_000, 1024, 10  # packs of the data, and tokens and documents of each
MICRO_BATCH_SIZE, ACCUMULATION = 4, 2  # packs of a micro-batch; micro-batches of a rank in a step
BATCHES, WARMUP = 400, 50  # micro-batches, and the first of them, which are not measured


class MappedPacks:
    """Packs of documents of equal length in a memory-mapped file of 800 MB."""

    def __init__(self, path):
        self._ids = np.lib.format.open_memmap(path, mode="r")
        self._mask = np.arange(TOKENS // DOCUMENTS) > 0
        costs = np.random.default_rng(0).integers(TOKENS // 2, TOKENS + 1, PACKS)
        self.sequences = sequences_of(costs, costs - DOCUMENTS, are_packs=True)

    def sequence(self, i):
        """Token ids and label mask of each document of pack i."""
        length = TOKENS // DOCUMENTS
        return [
            (self._ids[i, start : start + length], self._mask)
            for start in range(0, DOCUMENTS * length, length)
        ]


def mean_wait_s(split, workers, busy_s=0.0):
    """Mean wait for a micro-batch; `busy_s`: seconds of computation between two micro-batches."""
    layout = BatchLayout(
        data_parallel_size=8,
        accumulation_steps=ACCUMULATION,
        micro_batch_size=MICRO_BATCH_SIZE,
        # Any cost that grows with the length: packs are divided over the ranks by it.
        flops=SequenceFlops(per_token=1.0, per_square=1e-3, per_logit=1.0),
    )
    # All ranks do the same work; rank 3 stands for them.
    work = RankWork(split, layout, seed=0, rank=3, steps=range(BATCHES // ACCUMULATION))
    waits, start = [], time.perf_counter()
    for _ in batches_of(split, work, num_workers=workers):
        waits.append(time.perf_counter() - start)
        if busy_s:
            time.sleep(busy_s)
        start = time.perf_counter()
    return sum(waits[WARMUP:]) / len(waits[WARMUP:])


def main():
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "ids.npy"
        ids = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(PACKS, TOKENS))
        ids[:] = np.arange(TOKENS, dtype=np.int32)
        split = MappedPacks(path)
        size = f"{MICRO_BATCH_SIZE} packs of {TOKENS} tokens, {DOCUMENTS} documents each"
        print(f"a micro-batch is {size}")
        for workers in (0, 1, 2):
            waits = [1e3 * mean_wait_s(split, workers, busy_s) for busy_s in (0.0, 0.02)]
            print(
                f"{workers} workers: {waits[0]:.3f} ms per micro-batch back to back, "
                f"{waits[1]:.3f} ms with 20 ms of computation between them"
            )


if __name__ == "__main__":
    main()
