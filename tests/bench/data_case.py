"""One measurement of tests/bench/data.py in a separate process.

python -m tests.bench.data_case MODEL DATA RUN_FOLDER prepare|start
"""

import sys
import time
from pathlib import Path

from pipeline.data.prepare.prepare import check_first_rows, prepare_data


def main() -> None:
    """Prepare the data, or print the seconds to the first micro-batch on prepared data."""
    from tests.bench.data import settings_of

    model, data, run, action = sys.argv[1:]
    settings = settings_of(Path(model), Path(data), Path(run))
    if action == "prepare":
        prepare_data(settings, Path(run) / "data")
        return
    from pipeline.data.dataset.reader import open_split
    from pipeline.data.order.batches import build_batch
    from pipeline.data.order.order import BatchLayout, RankWork
    from pipeline.plan.cost.per_token import cost_per_token, sequence_flops
    from pipeline.plan.given.shape import read_shape

    flops = sequence_flops(cost_per_token(read_shape(model), settings, "bfloat16"))
    start_time = time.perf_counter()
    check_first_rows(settings)
    split = open_split(prepare_data(settings, Path(run) / "data").train)
    layout = BatchLayout(
        data_parallel_size=1, accumulation_steps=4, micro_batch_size=4, flops=flops
    )
    work = RankWork(split, layout, seed=42, rank=0, steps=range(10))
    build_batch(split, work[0].sequences)
    print(time.perf_counter() - start_time)


if __name__ == "__main__":
    main()
