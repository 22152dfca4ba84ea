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

# A step has 12 documents, or the same documents in 4 packs. Pack i has SIZES[i] documents, and the
# first of them is FIRSTS[i].
DOCUMENTS, PACKS, FIRSTS, SIZES = 12, 4, (0, 1, 6, 9), (1, 5, 3, 3)
STEPS = 3
# Number of ranks, and the runs on packs that these ranks train one after the other.
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
RUNS = [(name, number) for name, (_, runs) in GROUPS.items() for number in range(len(runs))]


class Packed(Documents):
    """The same documents in packs of one to five."""

    def sequence(self, i):
        step, pack = divmod(i, PACKS)
        first = step * DOCUMENTS + FIRSTS[pack]
        return [self.document(first + k) for k in range(SIZES[pack])]


def train(session, folder, settings, sequences):
    """Losses, gradients of the first step, final weights.

    `sequences`: number of sequences in a step, which are packs if it is PACKS, else documents.
    """
    split = (Packed if sequences == PACKS else Documents)(STEPS * DOCUMENTS)
    plan, engine = build_engine(session, folder, settings | {"global_batch_size": sequences})
    micro, rank = plan.layout.micro_batch_size, session.placement.rank
    losses, gradients = [], {}
    for step in range(STEPS):
        of_rank = range(step * sequences, (step + 1) * sequences)[rank :: plan.world_size]
        batches = [
            SeededBatch(build_batch(split, of_rank[at : at + micro]), seed=at)
            for at in range(0, len(of_rank), micro)
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


def train_each(session, folder, runs, sequences):
    """Results of `train` for several settings; the ranks start once for all of them."""
    return [train(session, folder, settings, sequences) for settings in runs]


@pytest.fixture(scope="module")
def documents_alone(tiny_model, tmp_path_factory):
    """Runs on one rank with one document in a forward pass: in fp32, and in 4 bits."""
    runs = [{"zero_stage": 2, "batch_size": 1, "load_in_4bit": on} for on in (False, True)]
    arguments = (train_each, tiny_model, runs, DOCUMENTS)
    return run_ranks(*arguments, tmp_path=tmp_path_factory.mktemp("alone"), world_size=1)[0]


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its runs on packs; the ranks start once."""
    train = partial(train_each, sequences=PACKS)
    return run_groups_once(GROUPS, train, tiny_model, tmp_path_factory)


@pytest.mark.parametrize(("group", "number"), RUNS)
def test_packs_have_the_losses_gradients_and_weights_of_their_documents(
    documents_alone, results_of, group, number
):
    is_4bit = "load_in_4bit" in GROUPS[group][1][number]
    expected, packed = documents_alone[is_4bit], results_of(group)[number]
    assert packed["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert distance(packed["gradients"], expected["gradients"]) < 1e-6
    assert distance(packed["weights"], expected["weights"]) < 1e-5
