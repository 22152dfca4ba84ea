"""The longest length of a plan fits a limit of live bytes on CPU runs, and 5 % more do not."""

from dataclasses import replace
from math import ceil

import pytest

from pipeline.plan.choose import Cluster
from pipeline.plan.given.catalogue import cpu_of
from pipeline.plan.length import longest_length
from tests.bench.memory import BASE, FullSequences, make_folder
from tests.ranks import run_ranks
from tests.tiny import make_plan
from tests.train_tiny import build_engine, work

pytestmark = pytest.mark.engine

LIMIT = 8 * 2**20
STEP = 4  # tokens
SHAPE = BASE | {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 64,
    "dtype": "float32",
}  # fmt: skip
# Set, so that runs of two lengths have the same layout.
COMMON = {
    "lora_r": 4, "batch_size": 1, "global_batch_size": 1, "zero_stage": 2, "mlp_tiles": 1,
    "offload_activations": False, "gradient_checkpointing": True,
}  # fmt: skip
WHOLE = {"gradient_checkpointing": False}
TILES, OFFLOAD = {"mlp_tiles": 8}, {"offload_activations": True}
CASES = {
    1: {
        "saved": WHOLE,
        "checkpointed": {},
        "tiles": TILES,
        "saved, tiles": WHOLE | TILES,
        "offload": OFFLOAD,
        "tiles, offload": TILES | OFFLOAD,
    },
    2: {
        "saved": WHOLE,
        "checkpointed": {},
        "tiles, offload": TILES | OFFLOAD,
    },
    4: {"checkpointed": {}, "tiles": TILES},
}


def limited_cluster(ranks):
    """CPU ranks that may each use LIMIT bytes."""
    cores = replace(cpu_of(2, 2**40), host_bytes=0)
    usable = cores.usable_bytes(ranks) / cores.device_bytes
    hardware = replace(cores, device_bytes=ceil(LIMIT / usable))
    return Cluster(hardware=hardware, nodes=1, ranks_per_node=ranks)


def peak_of_a_step(session, folder, settings):
    """Peak of live bytes of this rank, from before the base is loaded to the end of a step."""
    from pipeline.train.live_bytes import LiveBytes

    with LiveBytes() as live:
        plan, engine = build_engine(session, folder, settings, 8)
        split = FullSequences(8, settings["max_length"], plan.shape.vocab_size)
        engine.optimizer_step(*work(plan, split, 0, session.placement.rank), 1e-3)
    return live.peak


def peaks(session, folder, runs):
    """The peak of each run, by its key; the ranks start once for all of them."""
    return {key: peak_of_a_step(session, folder, settings) for key, settings in runs.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("longest") / "model", SHAPE)


@pytest.mark.parametrize("ranks", CASES)
def test_the_longest_length_fits_and_five_percent_more_do_not(folder, tmp_path, ranks):
    cluster, runs = limited_cluster(ranks), {}
    for name, changes in CASES[ranks].items():
        settings = COMMON | {"sequence_parallel_size": ranks} | changes
        plan = make_plan(folder, ranks, **settings)
        longest = longest_length(plan.settings, plan.shape, cluster, STEP)
        assert longest is not None
        assert longest.best.layout == plan.layout
        lengths = {"fits": longest.max_length, "exceeds": ceil(1.05 * longest.max_length)}
        runs |= {(name, key): settings | {"max_length": n} for key, n in lengths.items()}
    results = run_ranks(peaks, folder, runs, tmp_path=tmp_path, world_size=ranks)
    within = {}
    for name in CASES[ranks]:
        fits, exceeds = (
            max(of_rank[name, key] for of_rank in results) / cluster.device_limit
            for key in ("fits", "exceeds")
        )
        within[name] = (runs[name, "fits"]["max_length"], round(fits, 3), round(exceeds, 3))
    assert all(fits <= 1 < exceeds for _, fits, exceeds in within.values()), within
