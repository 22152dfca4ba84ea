"""Sequence parallelism changes no loss, gradient or weight: each run equals one on a single rank.

The gradients of the first step are compared too, because Adam's update does not depend on a
constant factor of the gradients.
"""

import numpy as np
import pytest

from pipeline.evaluate.heldout import held_out_loss
from tests.ranks import run_ranks
from tests.tiny import Documents, sequences_of
from tests.train_tiny import build_engine, distance, train_tiny

pytestmark = pytest.mark.engine

# Relative errors of the gradients of the first step, the losses, and the weights after 5 steps.
MAX_GRADIENT_ERROR = MAX_LOSS_ERROR = 1e-6
MAX_WEIGHT_ERROR = 1e-5
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
IN_GROUP_OF_FOUR = ON_FOUR_RANKS | {
    "zero 1, packs, checkpointed": (True, {"zero_stage": 1, "batch_size": 4} | CHECKPOINTED),
    "zero 2, documents, tiles, offload": (False, {"zero_stage": 2, "batch_size": 8} | LONG),
    "zero 3, packs, 4 bits": (True, {"zero_stage": 3, "batch_size": 8} | NF4 | CHECKPOINTED),
}
HELD_OUT = "held-out loss"  # a key of the results, in addition to the names of the runs
# World size, and number of ranks that share a sequence -> runs. The tiny model has only 2 key
# heads, so that 4 ranks which share a sequence replicate them.
GROUPS = {(2, 2): ON_TWO_RANKS, (4, 2): ON_FOUR_RANKS, (4, 4): IN_GROUP_OF_FOUR}


class Packed(Documents):
    """A split with packs of one to four documents.

    Sequence i has NUM_DOCUMENTS[i] documents, from document FIRSTS[i] of the split.
    """

    NUM_DOCUMENTS = (1, 4, 2, 3, 1, 2, 4, 3) * 2
    FIRSTS = np.cumsum((0, *NUM_DOCUMENTS))

    def __init__(self, count: int) -> None:
        super().__init__(count)
        spans = [
            range(first, first + number)
            for first, number in zip(self.FIRSTS, self.NUM_DOCUMENTS, strict=False)
        ]
        supervised = [self.supervised_counts[list(span)].sum() for span in spans]
        lengths = [self.lengths[list(span)].sum() for span in spans]
        self.sequences = sequences_of(lengths, supervised, are_packs=True)

    def sequence(self, i):
        """The documents of a pack."""
        return [self.document(self.FIRSTS[i] + k) for k in range(self.NUM_DOCUMENTS[i])]


def train_all(session, folder, runs, change):
    """Name of a run -> results of `train_tiny`, with changed settings; and HELD_OUT -> a loss."""
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
def on_one_rank(tiny_model, tmp_path_factory):
    """Results of `train_all` on one rank; the names of the runs are (is packed, is in 4 bits).

    Each forward pass has one sequence, so there is no padding.
    """
    runs = {
        (is_packed, is_4_bit): (is_packed, {"zero_stage": 2} | (NF4 if is_4_bit else {}))
        for is_packed in (False, True)
        for is_4_bit in (False, True)
    }
    folder = tmp_path_factory.mktemp("on_one_rank")
    return run_ranks(train_all, tiny_model, runs, {}, tmp_path=folder, world_size=1)[0]


@pytest.mark.parametrize(("world_size", "group_size"), GROUPS)
def test_ranks_that_share_sequences_have_the_losses_gradients_and_weights_of_one_rank(
    tiny_model, tmp_path, on_one_rank, world_size, group_size
):
    runs = GROUPS[world_size, group_size]
    change = {"sequence_parallel_size": group_size}
    results = run_ranks(
        train_all, tiny_model, runs, change, tmp_path=tmp_path, world_size=world_size
    )[0]
    for name, (is_packed, settings) in runs.items():
        expected, result = on_one_rank[is_packed, "load_in_4bit" in settings], results[name]
        assert result["losses"] == pytest.approx(expected["losses"], rel=MAX_LOSS_ERROR), name
        assert distance(result["gradients"], expected["gradients"]) < MAX_GRADIENT_ERROR, name
        assert distance(result["weights"], expected["weights"]) < MAX_WEIGHT_ERROR, name
    assert results[HELD_OUT] == pytest.approx(on_one_rank[HELD_OUT], rel=MAX_LOSS_ERROR)
