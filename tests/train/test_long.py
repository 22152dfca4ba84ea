"""Tiled MLPs and offloaded activations do not change losses, gradients and weights."""

import pytest

from tests.ranks import run_ranks
from tests.train.test_equality import NF4, assert_same, reference
from tests.train_tiny import distance, train_tiny

pytestmark = pytest.mark.engine

TILES, OFFLOAD = {"mlp_tiles": 3}, {"offload_activations": True}
CKPT = {"gradient_checkpointing": True}
SPLITS = [
    ({}, 2, {"zero_stage": 1, "batch_size": 2} | TILES | CKPT),
    ({}, 2, {"zero_stage": 2, "batch_size": 4} | TILES | OFFLOAD),
    ({}, 2, {"zero_stage": 3, "batch_size": 1} | TILES),
    ({}, 2, {"zero_stage": 3, "batch_size": 2} | TILES | OFFLOAD),
    ({}, 4, {"zero_stage": 3, "batch_size": 1} | TILES | CKPT),
    ({}, 2, {"zero_stage": 3, "batch_size": 2, "sequence_parallel_size": 2} | TILES | OFFLOAD),
    (NF4, 2, {"zero_stage": 1, "batch_size": 2} | TILES | OFFLOAD),
    (NF4, 2, {"zero_stage": 3, "batch_size": 2} | TILES | OFFLOAD),
]


@pytest.mark.parametrize(("kind", "world_size", "split"), SPLITS)
def test_training_is_the_same_with_tiles_and_offload(tiny_model, tmp_path, kind, world_size, split):
    """The tiny documents have 3 to 23 tokens, so a tile has one token to eight."""
    expected = reference(tiny_model, tmp_path, kind)
    result = run_ranks(
        train_tiny, tiny_model, kind | split, tmp_path=tmp_path, world_size=world_size
    )
    assert_same(result[0], expected)


def test_dropout_is_the_same_in_the_forward_and_in_the_recomputed_pass(tiny_model, tmp_path):
    """Offload and checkpointing do not change the random numbers of a tiled run."""
    settings = {"zero_stage": 2, "batch_size": 2, "lora_dropout": 0.3} | TILES
    plain, checkpointed, offloaded = (
        run_ranks(train_tiny, tiny_model, settings | more, 2, tmp_path=tmp_path)[0]
        for more in ({}, CKPT, OFFLOAD)
    )
    for other in (checkpointed, offloaded):
        assert distance(other["gradients"], plain["gradients"]) == 0
        assert other["losses"] == plain["losses"]
