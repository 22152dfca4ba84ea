"""Packing: each document is in one pack, no pack is too long, and packs are nearly full."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dataset.packing import best_fit_decreasing, fill_gaps, make_packs
from tests.bench.gsm8k import LENGTHS

pytestmark = pytest.mark.tensor


def pack_tokens(lengths, max_length):
    """The tokens of each pack, after checking that each document is in exactly one."""
    lengths = np.asarray(lengths, np.int64)
    documents, offsets = make_packs(lengths, max_length)
    assert documents.dtype == offsets.dtype == np.int64
    assert sorted(documents) == list(range(len(lengths)))
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    assert (np.diff(offsets) > 0).all()
    tokens = np.add.reduceat(lengths[documents], offsets[:-1]) if len(lengths) else lengths
    assert (tokens <= max_length).all()
    return tokens


@st.composite
def documents(draw):
    """Lengths of documents, and a max_length that none of them exceeds."""
    max_length = draw(st.integers(1, 200))
    return draw(st.lists(st.integers(1, max_length), max_size=300)), max_length


@given(documents())
@settings(max_examples=200, deadline=None)
def test_each_document_is_in_one_pack_and_no_pack_is_too_long(lengths_and_max_length):
    pack_tokens(*lengths_and_max_length)


def test_gsm8k_is_packed_nearly_full():
    assert len(LENGTHS) == 7473
    for max_length, min_fill in ((768, 0.998), (1024, 0.998), (2048, 0.998)):
        tokens = pack_tokens(LENGTHS, max_length)
        assert LENGTHS.sum() / (len(tokens) * max_length) > min_fill


@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [
        (np.random.default_rng(0).lognormal(5.3, 0.6, 100_000), 1024),
        (np.random.default_rng(0).lognormal(6.5, 1.2, 20_000), 8192),
        (np.random.default_rng(0).integers(20, 60, 50_000), 1024),
        (np.random.default_rng(0).integers(1, 1025, 50_000), 1024),
    ],
    ids=["chat", "long", "short", "uniform"],
)
def test_other_lengths_are_packed_nearly_full(lengths, max_length):
    lengths = np.clip(lengths.astype(int), 1, max_length)
    tokens = pack_tokens(lengths, max_length)
    assert lengths.sum() / (len(tokens) * max_length) > 0.997


def test_packs_depend_on_lengths_only():
    first, second = make_packs(LENGTHS, 1024), make_packs(LENGTHS.astype(np.int32), 1024)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_document_longer_than_a_pack_is_an_error():
    with pytest.raises(AssertionError):
        make_packs(np.array([3, 9]), 8)


def num_packs(algorithm, lengths, max_length):
    """Number of packs of an algorithm, after checking that they have all documents.

    The algorithm gets the number of documents of each length. It yields patterns, {length: number
    of documents of this length in a pack}, each with the number of packs of this pattern.
    """
    counts = np.bincount(lengths, minlength=max_length + 1)
    packed_counts = np.zeros_like(counts)
    num_of_all = 0
    for pattern, num_of_pattern in algorithm(counts.copy(), max_length):
        assert sum(length * number for length, number in pattern.items()) <= max_length
        num_of_all += num_of_pattern
        for length, number in pattern.items():
            packed_counts[length] += number * num_of_pattern
    assert np.array_equal(packed_counts, counts)
    return num_of_all


def best_fit_one_by_one(lengths, max_length):
    """Number of packs of textbook best-fit decreasing, one document after another."""
    free_tokens, packs = [], 0  # free tokens of each pack, sorted
    for length in sorted(lengths, reverse=True):
        fullest_fitting = bisect_left(free_tokens, length)
        is_new_pack = fullest_fitting == len(free_tokens)
        packs += is_new_pack
        free = max_length if is_new_pack else free_tokens.pop(fullest_fitting)
        insort(free_tokens, free - length)
    return packs


@given(documents())
@settings(max_examples=200, deadline=None)
def test_best_fit_by_length_equals_textbook_best_fit_and_the_fewer_packs_are_kept(
    lengths_and_max_length,
):
    lengths, max_length = lengths_and_max_length
    lengths = np.array(lengths, np.int64)
    best_fit = num_packs(best_fit_decreasing, lengths, max_length)
    assert best_fit == best_fit_one_by_one(lengths, max_length)
    gap_filling = num_packs(fill_gaps, lengths, max_length)
    assert len(pack_tokens(lengths, max_length)) == min(best_fit, gap_filling)


def test_best_fit_is_better_for_packs_hardly_longer_than_a_document():
    lengths = LENGTHS[LENGTHS <= 512]
    best_fit = num_packs(best_fit_decreasing, lengths, 512)
    assert len(pack_tokens(lengths, 512)) == best_fit < num_packs(fill_gaps, lengths, 512)


def test_gap_filling_is_better_for_packs_of_five_documents():
    filled = num_packs(fill_gaps, LENGTHS, 1024)
    best_fit = num_packs(best_fit_decreasing, LENGTHS, 1024)
    assert len(pack_tokens(LENGTHS, 1024)) == filled <= best_fit
