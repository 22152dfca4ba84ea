"""Each text and number of a row (leaf) is in the example or reported, or the row is rejected.

A leaf is reported if one of the keys above it is in the list of unread keys.
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


def text_of(example):
    """All texts and numbers of an example, as one text."""
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
    generator = RandomRow(random)
    row = generator.row(is_regular=generator.is_rare(one_in=2))
    # If a key is drawn twice, the row has only its second value, so that the first is not a leaf.
    leaves = [leaf for leaf in generator.leaves if leaf in json.dumps(row)]
    try:
        result = read_example(row_of(row))
    except RowError:
        event("rejected")
        return
    event("read")
    text = text_of(result.example)
    unread_keys = {name.rpartition(".")[2] for name in result.unread}
    for leaf in leaves:
        is_reported = bool(unread_keys & set(generator.leaves[leaf].path))
        assert leaf in text or is_reported, (leaf, row, result)
