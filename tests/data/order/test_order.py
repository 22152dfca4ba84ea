"""Each sequence is trained as often as its weight says, for every global batch and layout."""

from collections import Counter
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.dataset.packing import make_packs
from pipeline.data.dataset.sequences import Segment, Sequences
from pipeline.data.order.order import (
    BatchLayout,
    RankWork,
    epoch_order,
    evaluation_work,
    forward_seed,
    global_batch,
    partition,
)
from pipeline.plan.cost.per_token import SequenceFlops
from tests.bench.gsm8k import LENGTHS
from tests.tiny import sequences_of

pytestmark = pytest.mark.tensor

# FLOPs per token of SmolLM2-135M, and of a model in which attention dominates.
SMALL = SequenceFlops(per_token=4.7e8, per_square=1.0e5, per_logit=1.1e8)
ATTENTIVE = SequenceFlops(per_token=1.0, per_square=1.0, per_logit=0.0)
LAYOUTS = st.builds(
    BatchLayout,
    data_parallel_size=st.integers(1, 64),
    accumulation_steps=st.integers(1, 4),
    micro_batch_size=st.integers(1, 4),
    flops=st.just(SMALL),
)


@st.composite
def any_sequences(draw):
    """Sequences of one to four sources with one to three repeats in an epoch."""
    sources = draw(
        st.lists(st.tuples(st.integers(1, 150), st.integers(1, 3)), min_size=1, max_size=4)
    )
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    lengths = random.integers(1, draw(st.sampled_from([1, 3, 500])) + 1, sum(n for n, _ in sources))
    supervised = random.integers(1, lengths + 1)
    return sequences_of(lengths, supervised, sources, are_packs=draw(st.booleans()))


def gsm8k(*, packing: bool) -> Sequences:
    """The GSM8K training set with max_length 1024; 58 % of its tokens are supervised."""
    supervised = (0.58 * LENGTHS).astype(int)
    if not packing:
        return sequences_of(LENGTHS, supervised)
    documents, offsets = make_packs(LENGTHS, 1024)

    def sums(values):
        """The sum of the values of the documents of each pack."""
        return np.add.reduceat(values[documents], offsets[:-1])

    return Sequences(
        segments=(Segment(source=0, start=0, end=len(offsets) - 1, repeats=1),),
        offsets=offsets,
        tokens=sums(LENGTHS),
        squares=sums(LENGTHS**2),
        supervised=sums(supervised),
        are_packs=True,
    )


def steps_of(sequences, layout):
    """Number of steps of an epoch."""
    return ceil(sequences.per_epoch / layout.global_batch_size)


def work_of(sequences, layout, rank, *, seed=0, epochs=1):
    steps = steps_of(sequences, layout) * epochs
    split = SimpleNamespace(sequences=sequences)
    return RankWork(split, layout, seed=seed, rank=rank, steps=range(steps))


@given(any_sequences(), LAYOUTS, st.integers(0, 2**31), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_each_sequence_is_seen_as_often_as_its_segment_repeats_with_equally_many_micro_batches(
    sequences, layout, seed, epochs
):
    """The last, shorter step is neither dropped nor filled with repeated sequences."""
    steps, accumulation = steps_of(sequences, layout) * epochs, layout.accumulation_steps
    assume(steps * layout.data_parallel_size < 130)  # the work of every rank is computed here
    ranks = range(layout.data_parallel_size)
    work = [work_of(sequences, layout, rank, seed=seed, epochs=epochs) for rank in ranks]
    assert {len(mine) for mine in work} == {steps * accumulation}
    seen = Counter()
    for step in range(steps):
        micro = [mine[step * accumulation + i] for mine in work for i in range(accumulation)]
        of_step = Counter(i for batch in micro for i in batch.sequences)
        assert all(len(batch.sequences) <= layout.micro_batch_size for batch in micro)
        assert len({batch.first for batch in micro}) == len(micro)  # it seeds dropout
        # The denominator of the loss is the same on every rank: the sum over all ranks.
        sizes = {mine.size_of(step) for mine in work}
        assert len(sizes) == 1
        supervised = sum(int(sequences.supervised[i]) * n for i, n in of_step.items())
        assert sizes.pop().supervised_tokens == supervised
        seen += of_step
    expected = Counter(sequences.of_epoch().tolist())
    assert seen == Counter({i: n * epochs for i, n in expected.items()})


@given(any_sequences(), LAYOUTS, st.integers(1, 60), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_run_that_ends_within_an_epoch_resumes_with_the_same_work(
    sequences, layout, total, share
):
    """Within the last epoch, some sequences have been seen in one epoch less than others."""
    assume(total * layout.data_parallel_size < 130)
    split = SimpleNamespace(sequences=sequences)
    first = int(share * total)
    ranks = range(layout.data_parallel_size)
    whole, resumed = (
        [RankWork(split, layout, seed=7, rank=rank, steps=range(start, total)) for rank in ranks]
        for start in (0, first)
    )
    for uninterrupted, later in zip(whole, resumed, strict=True):
        assert list(uninterrupted)[first * layout.accumulation_steps :] == list(later)
    epochs, steps = divmod(total, steps_of(sequences, layout))
    seen = Counter(i for work in whole for micro in work for i in micro.sequences)
    for i, repeats in Counter(sequences.of_epoch().tolist()).items():
        assert epochs * repeats <= seen[i] <= (epochs + (steps > 0)) * repeats
    of_last_epoch = min(steps * layout.global_batch_size, sequences.per_epoch)
    assert seen.total() == epochs * sequences.per_epoch + of_last_epoch


@given(any_sequences(), st.integers(0, 2**31), st.sampled_from([6, 8, 16, 24, 64]))
@settings(max_examples=30, deadline=None)
def test_a_global_batch_has_the_same_sequences_for_all_ranks_and_micro_batches(
    sequences, seed, size
):
    steps = ceil(sequences.per_epoch / size)
    for step in {0, steps - 1}:
        batch = global_batch(step, sequences, seed=seed, global_batch_size=size)
        assert len(batch) == size or step == steps - 1
        for ranks in (number for number in range(1, 65) if size % number == 0):
            for micro_batch_size in {1, size // ranks}:
                layout = BatchLayout(
                    data_parallel_size=ranks,
                    accumulation_steps=size // ranks // micro_batch_size,
                    micro_batch_size=micro_batch_size,
                    flops=SMALL,
                )
                work_of_ranks = partition(batch, sequences, layout)
                assert {len(work) for work in work_of_ranks} == {layout.accumulation_steps}
                micro_batches = [micro_batch for work in work_of_ranks for micro_batch in work]
                assigned = [i for micro_batch in micro_batches for i in micro_batch.sequences]
                assert sorted(assigned) == sorted(batch.tolist())


def max_deviation(sources, size, seed, *, are_packs):
    """Largest deviation of a source from its share of the progress, over all steps.

    `sources`: number of sequences of each source, and how often an epoch has each of them. Returns
    the deviation, the largest global batch and the largest sequence, in supervised tokens.
    """
    random = np.random.default_rng(seed)
    shortest = random.integers(1, 1000, len(sources))
    lengths = np.concatenate(
        [random.integers(n, 1025, count) for n, (count, _) in zip(shortest, sources, strict=True)]
    )
    supervised = np.ceil(lengths * random.uniform(0.3, 0.9, len(lengths))).astype(int)
    sequences = sequences_of(lengths, supervised, sources, are_packs=are_packs)
    source_of = np.repeat(np.arange(len(sources)), [count for count, _ in sources])
    order = epoch_order(sequences, seed=seed, epoch=0, global_batch_size=size)
    assert np.array_equal(np.sort(order), np.sort(sequences.of_epoch()))
    steps = [order[first : first + size] for first in range(0, len(order), size)]
    done = np.cumsum(
        [np.bincount(source_of[step], supervised[step], len(sources)) for step in steps], 0
    )
    total = done.sum(axis=1)
    deviation = np.abs(done - total[:, None] * (done[-1] / total[-1])).max()
    return deviation, max(int(supervised[step].sum()) for step in steps), supervised.max()


MIXTURES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 3)), min_size=2, max_size=5)
# One large source and many small ones.
ONE_LARGE = st.builds(
    lambda large, *small: [large, *small[0]],
    st.tuples(st.integers(500, 3000), st.integers(1, 2)),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=10, max_size=60),
)


# docs/data.md proves the bound: half a group for each source, and one group.
@given(MIXTURES | ONE_LARGE, st.sampled_from([1, 2, 8, 16, 64]), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_every_source_of_packs_stays_near_its_share(sources, size, seed):
    deviation, _, largest_pack = max_deviation(sources, size, seed, are_packs=True)
    assert deviation <= (len(sources) + 2) / 2 * largest_pack


@given(MIXTURES | ONE_LARGE, st.sampled_from([1, 2, 8, 16, 64]), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_every_source_of_documents_stays_near_its_share(sources, size, seed):
    """Groups are global batches; the remaining documents of all sources form one more stream."""
    deviation, largest_batch, _ = max_deviation(sources, size, seed, are_packs=False)
    assert deviation <= (len(sources) + 3) / 2 * largest_batch


@pytest.mark.parametrize("are_packs", [True, False])
@pytest.mark.parametrize("size", [2, 4, 16, 64])
@pytest.mark.parametrize("small", [10, 20, 30, 60])
def test_small_sources_are_spread_over_the_epoch(small, size, are_packs):
    """Each small source has one pack, or the documents of one global batch."""
    sources = [(40 * size, 1)] + [(1 if are_packs else size, 1)] * small
    deviation, largest_batch, _ = max_deviation(sources, size, small, are_packs=are_packs)
    assert deviation <= largest_batch


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    sequences = sequences_of(np.full(1000, 7), np.ones(1000), are_packs=True)

    def order(seed, epoch):
        return tuple(epoch_order(sequences, seed=seed, epoch=epoch, global_batch_size=8))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    epoch_order.cache_clear()
    assert order(0, 0) == orders[0]
    # Pinned values: a run that is resumed after an upgrade must keep its order.
    few = sequences_of(np.arange(1, 9), np.ones(8), [(6, 1), (2, 2)])
    assert list(epoch_order(few, seed=42, epoch=0, global_batch_size=2)) == PINNED
    few = sequences_of(np.arange(1, 9), np.ones(8), [(6, 1), (2, 2)], are_packs=True)
    assert list(epoch_order(few, seed=42, epoch=0, global_batch_size=2)) == PINNED_PACKS


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_steps_of_an_epoch_have_the_order_of_that_epoch(epoch):
    sequences = sequences_of(np.full(100, 7), np.ones(100), are_packs=True)
    steps = range(13 * epoch, 13 * (epoch + 1))  # 12 steps of 8 sequences, and one of 4
    batches = [global_batch(step, sequences, seed=3, global_batch_size=8) for step in steps]
    order = epoch_order(sequences, seed=3, epoch=epoch, global_batch_size=8)
    assert np.concatenate(batches).tolist() == order.tolist()


PINNED = [6, 7, 0, 1, 6, 7, 4, 5, 2, 3]
PINNED_PACKS = [7, 2, 6, 3, 1, 6, 5, 7, 4, 0]


def test_a_source_is_finished_before_its_next_repeat_begins():
    sequences = sequences_of(np.full(300, 7), np.ones(300), [(200, 1), (100, 3)], are_packs=True)
    order = epoch_order(sequences, seed=0, epoch=0, global_batch_size=8).tolist()
    repeated = [i for i in order if i >= 200]
    assert all(sorted(repeated[k : k + 100]) == list(range(200, 300)) for k in (0, 100, 200))


@pytest.mark.parametrize("global_batch_size", [2, 6, 16, 64, 96, 128, 1024])
def test_without_packing_less_than_ten_percent_of_tokens_are_padding(global_batch_size):
    """GSM8K, with micro-batches of up to twice the largest that the plan chooses."""
    sequences = gsm8k(packing=False)
    for micro_batch_size in (2, 3, 8, 48, 64, 96, 128):
        if global_batch_size % micro_batch_size:
            continue
        layout = BatchLayout(
            data_parallel_size=1,
            accumulation_steps=global_batch_size // micro_batch_size,
            micro_batch_size=micro_batch_size,
            flops=SMALL,
        )
        work = work_of(sequences, layout, 0)
        lengths = [LENGTHS[list(each.sequences)] for each in work if each.sequences]
        padded_tokens = sum(int(of_batch.max()) * len(of_batch) for of_batch in lengths)
        assert 1 - LENGTHS.sum() / padded_tokens < 0.1


def test_without_packing_steps_are_shuffled():
    """Lengths of consecutive batches are uncorrelated, and each epoch has different batches."""
    sequences = gsm8k(packing=False)
    orders = [epoch_order(sequences, seed=0, epoch=epoch, global_batch_size=16) for epoch in (0, 1)]
    in_full_batches = len(LENGTHS) // 16 * 16
    mean_lengths = LENGTHS[orders[0][:in_full_batches]].reshape(-1, 16).mean(axis=1)
    assert abs(np.corrcoef(mean_lengths[:-1], mean_lengths[1:])[0, 1]) < 0.15
    first_batches, second_batches = (
        {frozenset(batch) for batch in order[:in_full_batches].reshape(-1, 16)} for order in orders
    )
    assert not first_batches & second_batches
    first_batch_of = {i: batch for batch in first_batches for i in batch}
    # Few of the 15 other documents of a batch are with a document again in the next epoch.
    num_met_again = [
        len(first_batch_of[i] & batch) - 1
        for batch in second_batches
        for i in batch
        if i in first_batch_of
    ]
    assert np.mean(num_met_again) < 1.5


@given(any_sequences(), st.integers(1, 16), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_evaluation_sees_every_sequence_as_an_epoch_does(sequences, ranks, micro):
    work_of_ranks = evaluation_work(sequences, data_parallel_size=ranks, micro_batch_size=micro)
    assert len({len(work) for work in work_of_ranks}) == 1
    micro_batches = [micro_batch for work in work_of_ranks for micro_batch in work]
    evaluated = [i for micro_batch in micro_batches for i in micro_batch.sequences]
    assert sorted(evaluated) == sorted(sequences.of_epoch())


def test_the_ranks_of_an_evaluation_have_equal_numbers_of_tokens():
    """Lengths 64, 63, ..., 1: the direction alternates, so no rank always has the longer one."""
    lengths = np.arange(1, 65)
    work = evaluation_work(
        sequences_of(lengths, lengths, are_packs=True), data_parallel_size=4, micro_batch_size=2
    )
    tokens = [sum(int(lengths[list(m.sequences)].sum()) for m in rank) for rank in work]
    assert tokens == [lengths.sum() / 4] * 4


def test_seeds_of_forward_passes_differ():
    seeds = {
        forward_seed(run_seed, step, first_sequence, rank_in_group)
        for run_seed in range(3)
        for step in range(50)
        for first_sequence in range(50)
        for rank_in_group in range(4)
    }
    assert len(seeds) == 3 * 50 * 50 * 4


def test_the_first_rank_of_a_group_has_the_seed_that_it_has_without_groups():
    assert forward_seed(1, 2, 3, rank_in_group=0) == forward_seed(1, 2, 3)
