"""No text or number (leaf) of a row is lost without notice.

It is in the example, or under a key that is reported as unread, or the row is rejected.
"""

import json

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.rows.examples import Completion, Conversation, RowError, Text
from pipeline.rows.formats import read_example
from tests.rows.random_rows import RandomRow
from tests.rows.read import row_of

pytestmark = pytest.mark.unit


def written(example):
    """All that an example holds, as text."""
    if isinstance(example, Conversation):
        messages = [[message.content, message.others] for message in example.messages]
        return json.dumps([messages, example.tools])
    if isinstance(example, Completion):
        return example.prompt + example.completion
    assert isinstance(example, Text)
    return example.text


@settings(max_examples=600)
@given(st.randoms(use_true_random=False))
def test_every_leaf_is_in_the_example_or_unread_or_the_row_is_rejected(random):
    rows = RandomRow(random)
    row = rows.row(is_regular=rows.is_rare(2))  # in one of two rows
    # Not those that were replaced: if a key is drawn twice, the row has only its second value.
    leaves = [leaf for leaf in rows.leaves if leaf in json.dumps(row)]
    try:
        result = read_example(row_of(row))
    except RowError:
        event("rejected")
        return
    event("read")
    text = written(result.example)
    keys = {name.rpartition(".")[2] for name in result.unread}
    for leaf in leaves:
        assert leaf in text or not keys.isdisjoint(rows.leaves[leaf].path), (leaf, row, result)
