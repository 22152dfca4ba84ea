"""A CPU run at the predicted longest length stays within a byte limit, and one 5 % longer does not.

The limit is on live bytes: the tensors that exist at one time on a rank.
"""

from dataclasses import replace
from math import ceil

import pytest

from pipeline.plan.choose import Cluster
from pipeline.plan.given.catalogue import cpu_of
from pipeline.plan.length import longest_length
from tests.bench.memory import BASE, FullSequences, make_folder
from tests.ranks import run_ranks
from tests.tiny import make_plan
from tests.train_tiny import batches_of_step, build_engine

pytestmark = pytest.mark.engine

# Number of ranks -> limit of each. More ranks reach longer sequences, whose attention takes more
# CPU time. At 4 MiB, 5 % more length is too small a difference beside the base.
LIMIT_BYTES = {1: 8 * 2**20, 2: 5 * 2**20, 4: 5 * 2**20}
SEARCH_STEP = 2  # tokens to which the longest length is exact
SHAPE = BASE | {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 64,
    "dtype": "float32",
}  # fmt: skip
# All of these are set, so that a plan cannot choose different layouts for two lengths.
COMMON = {
    "lora_r": 4, "batch_size": 1, "global_batch_size": 1, "zero_stage": 2, "mlp_tiles": 1,
    "offload_activations": False, "gradient_checkpointing": True,
}  # fmt: skip
SAVED = {"gradient_checkpointing": False}
TILES, OFFLOAD, SHARDED = {"mlp_tiles": 8}, {"offload_activations": True}, {"zero_stage": 3}
# Number of ranks -> name of a run -> its settings in addition to COMMON.
CASES = {
    1: {
        "saved": SAVED,
        "checkpointed": {},
        "tiles": TILES,
        "saved, tiles": SAVED | TILES,
        "offload": OFFLOAD,
        "tiles, offload": TILES | OFFLOAD,
    },
    2: {
        "saved": SAVED,
        "checkpointed": {},
        "tiles, offload": TILES | OFFLOAD,
        "ZeRO-3": SHARDED,
        "ZeRO-3, tiles": SHARDED | TILES,
        "ZeRO-3, tiles, offload": SHARDED | TILES | OFFLOAD,
    },
    4: {"checkpointed": {}, "tiles": TILES, "ZeRO-3, tiles": SHARDED | TILES},
}


def limited_cluster(ranks):
    """CPU ranks that may each use LIMIT_BYTES[ranks]."""
    # The ranks share the memory of the CPU, and a plan leaves a part of it free.
    cpu = replace(cpu_of(num_cores=2, memory_bytes=2**40), host_bytes=0)
    usable_share = cpu.usable_bytes(ranks) / cpu.device_bytes
    hardware = replace(cpu, device_bytes=ceil(LIMIT_BYTES[ranks] / usable_share))
    return Cluster(hardware=hardware, nodes=1, ranks_per_node=ranks)


def peak_of_a_step(session, folder, settings):
    """Peak of live bytes of this rank, from before the base is loaded to the end of a step."""
    from pipeline.train.live_bytes import LiveBytes

    with LiveBytes() as live:
        plan, engine = build_engine(session, folder, settings, 8)
        split = FullSequences(8, settings["max_length"], plan.shape.vocab_size)
        engine.optimizer_step(*batches_of_step(plan, split, 0, session.placement.rank), 1e-3)
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
        longest = longest_length(plan.settings, plan.shape, cluster, SEARCH_STEP)
        assert longest is not None
        assert longest.best.layout == plan.layout
        runs[name, "longest"] = settings | {"max_length": longest.max_length}
        runs[name, "longer"] = settings | {"max_length": ceil(1.05 * longest.max_length)}
    peaks_of_ranks = run_ranks(peaks, folder, runs, tmp_path=tmp_path, world_size=ranks)
    shares_of_limit = {
        run: round(max(of_rank[run] for of_rank in peaks_of_ranks) / cluster.device_limit, 3)
        for run in runs
    }
    for name in CASES[ranks]:
        assert shares_of_limit[name, "longest"] <= 1 < shares_of_limit[name, "longer"], (
            shares_of_limit
        )
