"""One run of tests/bench/data.py in a process of its own.

python -m tests.bench.data_case MODEL DATA RUN prepare|start|packs
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from pipeline.data.prepare.prepare import check_first_rows, prepare


def main() -> None:
    """Prepare, or do what a start on prepared data does and print its seconds."""
    from tests.bench.data import settings_of

    model, data, run, what = sys.argv[1:]
    if what == "packs":
        packs(model, data, run)
        return
    settings = settings_of(Path(model), Path(data), Path(run))
    if what == "prepare":
        prepare(settings, Path(run) / "data")
        return
    from pipeline.data.dataset.reader import open_split
    from pipeline.data.order.batches import build_batch
    from pipeline.data.order.order import BatchLayout, RankWork
    from pipeline.plan.cost.per_token import cost_per_token, sequence_flops
    from pipeline.plan.given.shape import read_shape

    flops = sequence_flops(cost_per_token(read_shape(model), settings, "bfloat16"))
    begun = time.perf_counter()
    check_first_rows(settings)
    split = open_split(prepare(settings, Path(run) / "data").train)
    shape = BatchLayout(world_size=1, accumulation_steps=4, micro_batch_size=4, flops=flops)
    work = RankWork(split, shape, seed=42, rank=0, steps=range(10))
    build_batch(split, work[0].sequences)
    print(time.perf_counter() - begun)


def packs(model: str, data: str, run: str) -> None:
    """Pack the documents of a file, or so many made-up lengths where `data` is a number."""
    from pipeline.data.dataset.packing import make_packs
    from pipeline.data.dataset.reader import open_split
    from tests.bench.data import settings_of

    max_length = 1024
    if data.isdigit():
        # Lognormal, as the lengths of chat rows are: median 250 tokens.
        drawn = np.random.default_rng(0).lognormal(np.log(250), 0.6, int(data))
        lengths = np.clip(drawn, 8, max_length).astype(np.int64)
    else:
        settings = settings_of(Path(model), Path(data), Path(run), max_length=max_length)
        lengths = open_split(prepare(settings, Path(run) / "data").train).lengths
    begun = time.perf_counter()
    _, offsets = make_packs(lengths, max_length)
    seconds, packs = time.perf_counter() - begun, len(offsets) - 1
    said = {
        "documents": len(lengths),
        "max_length": max_length,
        "packs": packs,
        "full": int(lengths.sum()) / (packs * max_length),
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
