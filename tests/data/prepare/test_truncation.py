"""Documents that are too long: what is kept of them, over all lengths and masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.prepare.truncation import fit, num_lost

pytestmark = pytest.mark.tensor


@st.composite
def documents(draw):
    mask = draw(st.lists(st.booleans(), min_size=1, max_size=40))
    mask[0] = False
    return np.arange(len(mask), dtype=np.int32), np.array(mask, bool)


lengths = st.integers(1, 45)


@given(documents(), lengths, st.sampled_from(["truncate", "drop", "split", "fail"]))
@settings(max_examples=300, deadline=None)
def test_what_is_kept_fits_and_is_trained(document, length, how):
    ids, supervised = document
    pieces = fit(ids, supervised, length, how)
    for piece in pieces:
        assert 1 <= len(piece.ids) == len(piece.supervised) <= length
        assert piece.supervised.any()
        assert not piece.supervised[0]
        assert piece.ids.tolist() == list(range(piece.start, piece.start + len(piece.ids)))
        assert not (piece.supervised & ~supervised[piece.ids]).any()  # nothing more is trained
    kept = {int(i) for piece in pieces for i in piece.ids}
    assert num_lost(pieces, len(ids)) == len(ids) - len(kept)
    if len(ids) <= length:
        assert len(pieces) == supervised.any()


@given(documents(), st.integers(2, 45))
@settings(max_examples=300, deadline=None)
def test_split_trains_each_token_once(document, length):
    ids, supervised = document
    trained = np.zeros(len(ids), int)
    for piece in fit(ids, supervised, length, "split"):
        trained[piece.ids[piece.supervised]] += 1
    assert trained.tolist() == supervised.astype(int).tolist()


@given(documents(), lengths)
@settings(max_examples=200, deadline=None)
def test_truncate_and_drop(document, length):
    ids, supervised = document
    (kept,) = fit(ids, supervised, length, "truncate") or (None,)
    if supervised[:length].any():
        assert kept.ids.tolist() == ids[:length].tolist()
        assert kept.supervised.tolist() == supervised[:length].tolist()
    else:
        assert kept is None
    if len(ids) > length:
        assert fit(ids, supervised, length, "drop") == []
