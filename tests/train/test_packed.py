"""Packs give the losses and gradients of their documents at every stage and with checkpointing."""

from functools import partial

import pytest

from pipeline.adapter.gather import gather_weights
from pipeline.data.order.batches import build_batch
from pipeline.data.order.steps import SeededBatch
from tests.ranks import run_groups_once, run_ranks
from tests.tiny import Documents
from tests.train_tiny import build_engine, distance, full_gradients

pytestmark = pytest.mark.engine

# A step has 12 documents, or the same documents in 4 packs. Pack i of a step has SIZES[i] documents
# from document FIRSTS[i] of the step.
DOCUMENTS, PACKS, FIRSTS, SIZES = 12, 4, (0, 1, 6, 9), (1, 5, 3, 3)
STEPS = 3
# Name of a group -> number of ranks, and settings of the runs on packs that these ranks train one
# after the other.
GROUPS = {
    "1 rank": (1, [{"zero_stage": 2, "batch_size": 4}]),
    "2 ranks": (
        2,
        [
            {"zero_stage": 1, "batch_size": 1},
            {"zero_stage": 2, "batch_size": 2, "gradient_checkpointing": True},
            {"zero_stage": 3, "batch_size": 1},
            {"zero_stage": 3, "batch_size": 2, "gradient_checkpointing": True},
            {"zero_stage": 2, "batch_size": 2, "load_in_4bit": True},
            {"zero_stage": 3, "batch_size": 1, "load_in_4bit": True},
        ],
    ),
}
RUNS = [(name, index) for name, (_, runs) in GROUPS.items() for index in range(len(runs))]


class Packed(Documents):
    """A split with the same documents in packs of one to five."""

    def sequence(self, i):
        """The documents of pack i of the split."""
        step, pack = divmod(i, PACKS)
        first = step * DOCUMENTS + FIRSTS[pack]
        return [self.document(first + k) for k in range(SIZES[pack])]


def train(session, folder, settings, num_sequences):
    """Losses, gradients of the first step, final weights.

    `num_sequences` of a step: with PACKS the split has packs, with DOCUMENTS single documents.
    """
    split = (Packed if num_sequences == PACKS else Documents)(STEPS * DOCUMENTS)
    plan, engine = build_engine(session, folder, settings | {"global_batch_size": num_sequences})
    micro_batch_size, rank = plan.layout.micro_batch_size, session.placement.rank
    losses, gradients = [], {}
    for step in range(STEPS):
        of_step = range(step * num_sequences, (step + 1) * num_sequences)
        of_rank = of_step[rank :: plan.world_size]
        batches = [
            SeededBatch(build_batch(split, of_rank[first : first + micro_batch_size]), seed=first)
            for first in range(0, len(of_rank), micro_batch_size)
        ]
        supervised = split.supervised_counts[step * DOCUMENTS : (step + 1) * DOCUMENTS].sum()
        if step == 0:  # the gradients are read before the optimizer step
            engine.deepspeed.train()
            total, _ = engine.backward_passes(batches, int(supervised))
            gradients = full_gradients(engine)
            engine.deepspeed.step()
            loss_sum = float(total)
        else:
            loss_sum = engine.optimizer_step(batches, int(supervised), 1e-3).loss_sum
        losses.append(session.sum_over_ranks([loss_sum])[0] / supervised)
    weights = gather_weights(engine.parameters, keep=rank == 0)
    return {"losses": losses, "gradients": gradients, "weights": weights}


def train_each(session, folder, runs, num_sequences):
    """Results of `train` for several settings; the ranks start once for all of them."""
    return [train(session, folder, settings, num_sequences) for settings in runs]


@pytest.fixture(scope="module")
def documents_alone(tiny_model, tmp_path_factory):
    """Results on one rank with one document in a forward pass: of an fp32 and of a 4-bit base."""
    runs = [
        {"zero_stage": 2, "batch_size": 1, "load_in_4bit": is_4bit} for is_4bit in (False, True)
    ]
    arguments = (train_each, tiny_model, runs, DOCUMENTS)
    return run_ranks(*arguments, tmp_path=tmp_path_factory.mktemp("alone"), world_size=1)[0]


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its runs on packs; the ranks start once."""
    train_on_packs = partial(train_each, num_sequences=PACKS)
    return run_groups_once(GROUPS, train_on_packs, tiny_model, tmp_path_factory)


@pytest.mark.parametrize(("group", "index"), RUNS)
def test_packs_have_the_losses_gradients_and_weights_of_their_documents(
    documents_alone, results_of, group, index
):
    _, runs = GROUPS[group]
    in_fp32, in_4_bits = documents_alone
    expected = in_4_bits if "load_in_4bit" in runs[index] else in_fp32
    packed = results_of(group)[index]
    assert packed["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert distance(packed["gradients"], expected["gradients"]) < 1e-6
    assert distance(packed["weights"], expected["weights"]) < 1e-5
