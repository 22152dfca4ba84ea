"""Digests and what is held out by them; work in several processes."""

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from pipeline.data.prepare.documents import (
    digest,
    is_held_out,
    threshold_of_rows,
    threshold_of_share,
)
from pipeline.data.prepare.parallel import in_order
from pipeline.errors import UserError
from pipeline.rows.formats import Completion, Conversation, Message, Text, Tokens

pytestmark = pytest.mark.tensor

ASKED, SAID = Message("user", "a"), Message("assistant", "b")
EXAMPLES = [
    Conversation((ASKED, SAID)),
    Conversation((ASKED, replace(SAID, content="c"))),
    Conversation((replace(ASKED, content="ab"), replace(SAID, content=""))),
    Conversation((ASKED, replace(SAID, is_trained=False))),
    Conversation((ASKED, replace(SAID, others={"reasoning_content": "r"}))),
    Conversation((ASKED, SAID), ({"name": "tool"},)),
    Conversation((ASKED, SAID, ASKED, SAID)),
    Completion("a", "b"),
    Completion("ab", ""),
    Completion("", "ab"),
    Text("ab"),
    Text("1:a"),
    Tokens((1, 2), (False, True)),
    Tokens((1, 2), (True, True)),
    Tokens((12,), (True,)),
]


def test_different_examples_have_different_digests():
    found = [digest(example) for example in EXAMPLES]
    assert len(set(found)) == len(EXAMPLES)
    assert all(0 <= number < 2**64 for number in found)


def test_the_spelling_of_an_object_does_not_matter():
    one = replace(SAID, others={"name": "n", "tool_call_id": "i"})
    other = replace(SAID, others={"tool_call_id": "i", "name": "n"})
    assert digest(Conversation((ASKED, one))) == digest(Conversation((ASKED, other)))


def test_a_share_is_held_out_and_a_larger_one_holds_out_the_same_and_more():
    digests = [digest(Text(str(i))) for i in range(4000)]
    before: set[int] = set()
    for share in (0.01, 0.1, 0.5, 0.99):
        threshold = threshold_of_share(share)
        held = {number for number in digests if is_held_out(number, threshold)}
        assert len(held) / 4000 == pytest.approx(share, abs=0.03)
        assert before <= held
        before = held


def test_what_is_held_out_says_nothing_of_the_digests_order():
    """A source's weight goes by the smallest digests or a hash of its own: no mere threshold."""
    digests = np.array([digest(Text(str(i))) for i in range(4000)], np.uint64)
    held = [int(number) for number in digests if is_held_out(int(number), threshold_of_share(0.5))]
    assert sum(number < 2**63 for number in held) / len(held) == pytest.approx(0.5, abs=0.05)


def test_a_number_is_held_out_and_doubles_stay_together():
    digests = np.array([digest(Text(str(i))) for i in range(50)], np.uint64)
    for rows in (1, 7, 50, 80):
        threshold = threshold_of_rows(digests, rows)
        held = [number for number in digests.tolist() if is_held_out(number, threshold)]
        assert len(held) == min(rows, 50)
        twice = threshold_of_rows(np.repeat(digests, 2), rows)
        both = [number for number in digests.tolist() if is_held_out(number, twice)]
        assert len(both) == min(-(-rows // 2), 50)
    assert threshold_of_rows(digests[:0], 3) == 0


def make_squares(fails_at):
    return partial(square, fails_at)


def square(fails_at, number):
    if number == fails_at:
        raise UserError(f"{number} is wrong")
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order_and_from_all_processes(processes):
    found = list(in_order(range(60), partial(make_squares, None), processes=processes))
    assert [number for number, _ in found] == [number * number for number in range(60)]
    here = os.getpid()
    assert {pid == here for _, pid in found} == {processes == 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_at_its_place(processes):
    found = in_order(range(60), partial(make_squares, 5), processes=processes)
    assert [next(found)[0] for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="5 is wrong"):
        next(found)


def test_a_few_pieces_start_no_process():
    found = list(in_order(range(5), partial(make_squares, None)))
    assert {pid for _, pid in found} == {os.getpid()}


def test_no_more_pieces_are_read_than_processes_can_use():
    read = []

    def pieces():
        for number in range(1000):
            read.append(number)
            yield number

    found = in_order(pieces(), partial(make_squares, None), processes=2)
    next(found)
    found.close()
    assert len(read) < 20
