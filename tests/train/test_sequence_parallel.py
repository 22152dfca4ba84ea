"""A group of ranks that shares its sequences has the gradients and weights of ranks that do not.

First gradients are compared, because Adam hides a constant factor in the weights.
"""

import numpy as np
import pytest

from pipeline.evaluate.heldout import held_out_loss
from tests.ranks import run_ranks
from tests.tiny import Documents, sequences_of
from tests.train_tiny import build_engine, distance, train_tiny

pytestmark = pytest.mark.engine

FIRST_GRADIENTS = LOSSES = 1e-6
WEIGHTS_AFTER_5 = 1e-5
CHECKPOINTED = {"gradient_checkpointing": True}
NF4 = {"load_in_4bit": True}
LONG = {"mlp_tiles": 3, "offload_activations": True}
# (is packed, settings) of each run. The 8 sequences of a step are the same in all of them.
ON_TWO_RANKS = {
    "zero 1, documents": (False, {"zero_stage": 1, "batch_size": 2}),
    "zero 2, packs": (True, {"zero_stage": 2, "batch_size": 1}),
    "zero 2, packs, checkpointed": (True, {"zero_stage": 2, "batch_size": 2} | CHECKPOINTED),
    "zero 3, documents": (False, {"zero_stage": 3, "batch_size": 4}),
    "zero 3, packs, checkpointed": (True, {"zero_stage": 3, "batch_size": 2} | CHECKPOINTED),
    "zero 3, packs, tiles, offload": (True, {"zero_stage": 3, "batch_size": 2} | LONG),
    "zero 1, packs, 4 bits": (True, {"zero_stage": 1, "batch_size": 8} | NF4 | CHECKPOINTED),
    "zero 3, documents, 4 bits": (False, {"zero_stage": 3, "batch_size": 4} | NF4),
    "zero 2, documents, plain": (False, {"zero_stage": 2, "batch_size": 2, "fast_paths": False}),
}
ON_FOUR_RANKS = {
    "zero 2, packs": (True, {"zero_stage": 2, "batch_size": 2}),
    "zero 3, documents, checkpointed": (False, {"zero_stage": 3, "batch_size": 2} | CHECKPOINTED),
}
HELD_OUT = "held-out loss"
SIZES = [(2, 2), (4, 2), (4, 4)]  # ranks, and ranks of a group; groups of 4 replicate key heads


class Packed(Documents):
    """Packs of one to four documents: sequence i has the documents from FIRSTS[i] on."""

    SIZES = (1, 4, 2, 3, 1, 2, 4, 3) * 2
    FIRSTS = np.cumsum((0, *SIZES))

    def __init__(self, count: int) -> None:
        super().__init__(count)
        spans = [range(a, a + n) for a, n in zip(self.FIRSTS, self.SIZES, strict=False)]
        supervised = [self.supervised_counts[list(span)].sum() for span in spans]
        lengths = [self.lengths[list(span)].sum() for span in spans]
        self.sequences = sequences_of(lengths, supervised, are_packs=True)

    def sequence(self, i):
        """The documents of a pack."""
        return [self.document(self.FIRSTS[i] + k) for k in range(self.SIZES[i])]


def train_all(session, folder, runs, change):
    """The results of several runs, by name; the ranks start once for all of them."""
    results = {
        name: train_tiny(
            session, folder, settings | change, split=(Packed if is_packed else Documents)(40)
        )
        for name, (is_packed, settings) in runs.items()
    }
    plan, engine = build_engine(session, folder, {"batch_size": 4} | change)
    loss = held_out_loss(engine.evaluate, Packed(40), session, plan.layout)
    return results | {HELD_OUT: loss}


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory):
    """The runs on one rank, one sequence in a forward pass: without padding, groups and shards."""
    kinds = {(p, False): (p, {"zero_stage": 2}) for p in (False, True)}
    kinds |= {(p, True): (p, {"zero_stage": 2} | NF4) for p in (False, True)}
    folder = tmp_path_factory.mktemp("alone")
    return run_ranks(train_all, tiny_model, kinds, {}, tmp_path=folder, world_size=1)[0]


@pytest.mark.parametrize(("world_size", "size"), SIZES)
def test_a_group_has_the_losses_gradients_and_weights_of_one_rank(
    tiny_model, tmp_path, alone, world_size, size
):
    runs = ON_TWO_RANKS if world_size == 2 else ON_FOUR_RANKS
    change = {"sequence_parallel_size": size}
    results = run_ranks(
        train_all, tiny_model, runs, change, tmp_path=tmp_path, world_size=world_size
    )[0]
    for name, (is_packed, settings) in runs.items():
        expected, result = alone[is_packed, "load_in_4bit" in settings], results[name]
        assert result["losses"] == pytest.approx(expected["losses"], rel=LOSSES), name
        assert distance(result["gradients"], expected["gradients"]) < FIRST_GRADIENTS, name
        assert distance(result["weights"], expected["weights"]) < WEIGHTS_AFTER_5, name
    assert results[HELD_OUT] == pytest.approx(alone[HELD_OUT], rel=LOSSES)
