"""One run of tests/bench/data.py in a process of its own.

python -m tests.bench.data_case MODEL DATA RUN prepare|start
"""

import sys
import time
from pathlib import Path

from pipeline.data.prepare import check_first_rows, prepare


def main() -> None:
    """Prepare, or do what a start on prepared data does and print its seconds."""
    from tests.bench.data import settings_of

    model, data, run, what = sys.argv[1:]
    settings = settings_of(Path(model), Path(data), Path(run))
    if what == "prepare":
        prepare(settings, Path(run) / "data")
        return
    from pipeline.data.batches import build_batch
    from pipeline.data.order import epoch_order
    from pipeline.data.prepared import open_split

    begun = time.perf_counter()
    check_first_rows(settings)
    index = prepare(settings, Path(run) / "data")
    split = open_split(index.train)
    order = epoch_order(len(split), settings.seed, 0)
    build_batch(split, [int(i) for i in order[:4]])
    print(time.perf_counter() - begun)


if __name__ == "__main__":
    main()
