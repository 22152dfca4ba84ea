"""Windows of documents longer than max_length, for all lengths and masks."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.prepare.truncation import num_dropped, windows

pytestmark = pytest.mark.tensor


@st.composite
def documents(draw):
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
    kept = [(w.ids.tolist(), w.supervised.tolist()) for w in windows(*document, length, "truncate")]
    beginning = (ids[:length].tolist(), supervised[:length].tolist())
    assert kept == [beginning] * int(supervised[:length].any())


@given(documents(), lengths)
@settings(max_examples=200, deadline=None)
def test_drop_keeps_nothing_of_a_longer_document(document, length):
    ids, supervised = document
    assume(len(ids) > length)
    assert windows(ids, supervised, length, "drop") == []
