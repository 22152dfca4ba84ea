"""Settings for long sequences do not change losses, gradients and weights.

`mlp_tiles` computes each MLP in that many parts of a sequence; `offload_activations` keeps the
saved layer inputs in host memory.
"""

import pytest

from tests.ranks import run_groups_once, run_ranks
from tests.train.test_equality import NF4, assert_same, reference
from tests.train_tiny import distance, train_each

pytestmark = pytest.mark.engine

TILES, OFFLOAD = {"mlp_tiles": 3}, {"offload_activations": True}
CHECKPOINTED = {"gradient_checkpointing": True}
# Name of a group -> quantisation of its base, number of ranks, and settings of the runs that these
# ranks train one after the other.
GROUPS = {
    "2 ranks": (
        {}, 2,
        [
            {"zero_stage": 1, "batch_size": 2} | TILES | CHECKPOINTED,
            {"zero_stage": 2, "batch_size": 4} | TILES | OFFLOAD,
            {"zero_stage": 3, "batch_size": 1} | TILES,
            {"zero_stage": 3, "batch_size": 2} | TILES | OFFLOAD,
            {"zero_stage": 3, "batch_size": 2, "sequence_parallel_size": 2} | TILES | OFFLOAD,
        ],
    ),
    "4 ranks": (
        {}, 4,
        [
            {"zero_stage": 3, "batch_size": 1} | TILES | CHECKPOINTED,
            {"zero_stage": 2, "batch_size": 2, "sequence_parallel_size": 4} | TILES | OFFLOAD,
            NF4 | {"zero_stage": 3, "batch_size": 2, "sequence_parallel_size": 4} | TILES | OFFLOAD,
        ],
    ),
    "nf4": (
        NF4, 2,
        [
            {"zero_stage": 1, "batch_size": 2} | TILES | OFFLOAD,
            {"zero_stage": 3, "batch_size": 2} | TILES | OFFLOAD,
        ],
    ),
}  # fmt: skip
RUNS = [(name, index) for name, (*_, runs) in GROUPS.items() for index in range(len(runs))]


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its runs; the ranks start once."""
    groups = {
        name: (world_size, [quantisation | run for run in runs])
        for name, (quantisation, world_size, runs) in GROUPS.items()
    }
    return run_groups_once(groups, train_each, tiny_model, tmp_path_factory)


@pytest.mark.parametrize(("group", "index"), RUNS)
def test_training_is_the_same_with_tiles_and_offload(
    tiny_model, tmp_path, results_of, group, index
):
    """The tiny documents have 3 to 23 tokens, so each of three tiles has one to eight."""
    quantisation, _, runs = GROUPS[group]
    is_4_bit = (quantisation | runs[index]).keys() & NF4.keys()
    assert_same(results_of(group)[index], reference(tiny_model, tmp_path, NF4 if is_4_bit else {}))


def test_dropout_masks_are_the_same_in_the_forward_and_in_the_recomputed_pass(tiny_model, tmp_path):
    settings = {"zero_stage": 2, "batch_size": 2, "lora_dropout": 0.3} | TILES
    runs = [settings, settings | CHECKPOINTED, settings | OFFLOAD]
    plain, *others = run_ranks(train_each, tiny_model, runs, 2, tmp_path=tmp_path)[0]
    for other in others:
        assert distance(other["gradients"], plain["gradients"]) == 0
        assert other["losses"] == plain["losses"]
