"""Documents longer than max_length: which windows of them are trained, with any loss mask.

The setting `over_length` decides: truncate keeps the first window, drop none, and split all.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.prepare.truncation import count_lengths, num_dropped, windows

pytestmark = pytest.mark.tensor


@st.composite
def documents(draw):
    """Token ids 0, 1, 2, ..., and a mask of supervised tokens without the first."""
    mask = draw(st.lists(st.booleans(), min_size=1, max_size=40))
    mask[0] = False
    return np.arange(len(mask), dtype=np.int32), np.array(mask, bool)


lengths = st.integers(1, 45)


@given(documents(), lengths, st.sampled_from(["truncate", "drop", "split", "fail"]))
@settings(max_examples=300, deadline=None)
def test_windows_fit_and_have_a_supervised_token(document, length, over_length):
    ids, supervised = document
    parts = windows(ids, supervised, length, over_length)
    for part in parts:
        assert 1 <= len(part.ids) == len(part.supervised) <= length
        assert part.supervised.any()
        assert not part.supervised[0]
        assert part.ids.tolist() == list(range(part.start, part.start + len(part.ids)))
        assert not (part.supervised & ~supervised[part.ids]).any()  # no other token is trained
    used = {int(i) for part in parts for i in part.ids}
    assert num_dropped(parts, len(ids)) == len(ids) - len(used)
    if len(ids) <= length:
        assert len(parts) == supervised.any()


@given(documents(), st.integers(2, 45))
@settings(max_examples=300, deadline=None)
def test_split_trains_each_supervised_token_once(document, length):
    ids, supervised = document
    trained = np.zeros(len(ids), int)
    for part in windows(ids, supervised, length, "split"):
        trained[part.ids[part.supervised]] += 1
    assert trained.tolist() == supervised.astype(int).tolist()


@given(documents(), lengths)
@settings(max_examples=200, deadline=None)
def test_truncate_keeps_the_beginning_if_it_has_a_supervised_token(document, length):
    ids, supervised = document
    kept = windows(*document, length, "truncate")
    if supervised[:length].any():
        (window,) = kept
        assert window.ids.tolist() == ids[:length].tolist()
        assert window.supervised.tolist() == supervised[:length].tolist()
    else:
        assert kept == []


@given(documents(), lengths)
@settings(max_examples=200, deadline=None)
def test_drop_keeps_nothing_of_a_longer_document(document, length):
    ids, supervised = document
    assume(len(ids) > length)
    assert windows(ids, supervised, length, "drop") == []


@given(
    st.lists(documents(), min_size=1, max_size=8),
    st.integers(1, 45),
    st.sampled_from(["truncate", "drop"]),
)
@settings(max_examples=300, deadline=None)
def test_the_length_that_keeps_all_tokens_is_the_smallest(rows, length, over_length):
    counts = count_lengths([mask for _, mask in rows], length, over_length)
    assume(counts.supervised)

    def num_lost(max_length):
        """Supervised tokens that are not trained with this max_length."""
        parts = [window for row in rows for window in windows(*row, max_length, over_length)]
        return counts.supervised - sum(int(part.supervised.sum()) for part in parts)

    counts.trained = counts.supervised - num_lost(length)
    length_loss = counts.length_loss()
    assert length_loss.tokens == sum(int(mask.sum()) for _, mask in rows)
    assert length_loss.lost == num_lost(length)
    assert length_loss.longer == sum(len(ids) > length and mask.any() for ids, mask in rows)
    assert num_lost(length_loss.keeps_all) == 0 < num_lost(length_loss.keeps_all - 1)
    assert length_loss.keeps_99 <= length_loss.keeps_all


@pytest.mark.parametrize("over_length", ["truncate", "drop", "split"])
def test_the_length_that_keeps_99_percent_is_exact_to_64_tokens(over_length):
    masks = [np.arange(size) > 3 for size in (*range(40, 3000, 7), 20_000)]
    length_loss = count_lengths(masks, 1024, over_length).length_loss()
    rule = "truncate" if over_length == "truncate" else "drop"

    def kept_share(max_length):
        parts = [
            window
            for mask in masks
            for window in windows(np.arange(len(mask)), mask, max_length, rule)
        ]
        return sum(int(part.supervised.sum()) for part in parts) / length_loss.tokens

    assert kept_share(length_loss.keeps_99 - 64) < 0.99 <= kept_share(length_loss.keeps_99)
    assert length_loss.keeps_all == 20_000


def test_counts_of_chunks_add_up_to_the_counts_of_all_documents():
    masks = [np.arange(size) % 3 == 1 for size in (2, 70, 500, 1000, 4)]
    parts = count_lengths(masks[:2], 100, "truncate")
    parts.add(count_lengths(masks[2:], 100, "truncate"))
    parts.add(count_lengths([], 100, "truncate"))
    assert parts == count_lengths(masks, 100, "truncate")
