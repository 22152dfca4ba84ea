"""Held-out rows are selected by content and never trained on.

The digest of a row, a hash of its content, decides whether the row is held out.
"""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from pipeline.data.prepare.digests import digest, is_held_out, threshold_of_rows, threshold_of_share
from pipeline.data.prepare.prepare import eval_examples
from pipeline.rows.examples import Completion, Conversation, Message, Text, Tokens
from tests.data.prepare.preparation import documents_of, row, write_lines
from tests.messages import refused

pytestmark = pytest.mark.tensor

QUESTION, ANSWER = Message("user", "a"), Message("assistant", "b")
EXAMPLES = [
    Conversation((QUESTION, ANSWER)),
    Conversation((QUESTION, replace(ANSWER, content="c"))),
    Conversation((replace(QUESTION, content="ab"), replace(ANSWER, content=""))),
    Conversation((QUESTION, replace(ANSWER, is_trained=False))),
    Conversation((QUESTION, replace(ANSWER, others={"reasoning_content": "r"}))),
    Conversation((QUESTION, ANSWER), ({"name": "tool"},)),
    Conversation((QUESTION, ANSWER, QUESTION, ANSWER)),
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
    digests = [digest(example) for example in EXAMPLES]
    assert len(set(digests)) == len(EXAMPLES)
    assert all(0 <= number < 2**64 for number in digests)


def test_the_digest_does_not_depend_on_the_order_of_keys():
    one = replace(ANSWER, others={"name": "n", "tool_call_id": "i"})
    other = replace(ANSWER, others={"tool_call_id": "i", "name": "n"})
    assert digest(Conversation((QUESTION, one))) == digest(Conversation((QUESTION, other)))


def test_the_digest_does_not_depend_on_the_amount_of_white_space():
    """Rows that differ in nothing else count as duplicates and are in the same split."""
    assert digest(Text("a b\n")) == digest(Text(" a\t\n b"))
    assert digest(Text("a b")) != digest(Text("ab"))
    spaced = Conversation((replace(QUESTION, content=" a\n"), ANSWER))
    assert digest(spaced) == digest(Conversation((QUESTION, ANSWER)))


def test_a_larger_share_holds_out_the_same_rows_and_more():
    digests = [digest(Text(str(i))) for i in range(4000)]
    with_smaller_share: set[int] = set()
    for share in (0.01, 0.1, 0.5, 0.99):
        threshold = threshold_of_share(share)
        held_out = {number for number in digests if is_held_out(number, threshold)}
        assert len(held_out) / 4000 == pytest.approx(share, abs=0.03)
        assert with_smaller_share <= held_out
        with_smaller_share = held_out


def test_held_out_rows_are_not_those_with_the_lowest_digests():
    """The weight of a source selects documents by digest too; the two must be independent."""
    digests = np.array([digest(Text(str(i))) for i in range(4000)], np.uint64)
    held = [int(number) for number in digests if is_held_out(int(number), threshold_of_share(0.5))]
    assert sum(number < 2**63 for number in held) / len(held) == pytest.approx(0.5, abs=0.05)


def test_a_number_of_rows_is_held_out_and_duplicates_stay_together():
    digests = np.array([digest(Text(str(i))) for i in range(50)], np.uint64)
    for num_rows in (1, 7, 50, 80):
        threshold = threshold_of_rows(digests, num_rows)
        held_out = [number for number in digests.tolist() if is_held_out(number, threshold)]
        assert len(held_out) == min(num_rows, 50)
        # With each row twice, half as many different rows are held out, and one more if odd.
        threshold = threshold_of_rows(np.repeat(digests, 2), num_rows)
        held_out = [number for number in digests.tolist() if is_held_out(number, threshold)]
        assert len(held_out) == min(ceil(num_rows / 2), 50)
    assert threshold_of_rows(digests[:0], 3) == 0


ROWS = [row(f"answer {i}") for i in range(60)]
NEW_ROWS = [row(f"new answer {i}") for i in range(60)]


def split_rows(run, rows, eval_data):
    """Training and held-out documents of these rows."""
    write_lines(run.train, rows)
    index = run.prepare(eval_data=eval_data)
    train, held = documents_of(index.train), documents_of(index.eval)
    assert not set(train) & set(held)
    assert run.audit("eval")["rows_also_in_train"] == 0
    audits = [run.audit("train"), run.audit("eval")]
    assert [audit["rows_used"] for audit in audits] == [len(train), len(held)]
    return set(train), set(held)


def test_a_share_of_rows_is_held_out_by_content(run):
    train, held = split_rows(run, ROWS, 0.25)
    assert len(train) + len(held) == 60
    assert 5 < len(held) < 25
    # With each row twice and in another order, the same rows are held out.
    assert split_rows(run, [*reversed(ROWS), *ROWS], 0.25) == (train, held)
    # With more rows, the same old rows are held out.
    _, more_held = split_rows(run, [*ROWS, *NEW_ROWS], 0.25)
    assert more_held & (held | train) == held


def test_a_number_of_rows_is_held_out_by_content(run):
    train, held = split_rows(run, ROWS, 12)
    assert (len(train), len(held)) == (48, 12)
    assert split_rows(run, [*reversed(ROWS), *ROWS], 24) == (train, held)
    # With more rows, no old row is held out that was not held out before.
    _, more_held = split_rows(run, [*ROWS, *NEW_ROWS], 12)
    assert more_held & (held | train) <= held


def test_a_limit_applies_also_to_held_out_rows(run):
    index = run.prepare(limit=4, eval_data=0.1)
    assert index.train.documents == 4
    assert index.eval.documents >= 1
    index = run.prepare(limit=4, eval_data=3)
    assert index.train.documents == 4
    assert 1 <= index.eval.documents <= 4


def test_holding_out_nothing_or_everything_is_refused(run):
    write_lines(run.train, [row("a"), row("b")])
    with refused("eval_data: 2", "0 documents to train on"):
        run.prepare(eval_data=2)
    write_lines(run.train, [row("a")] * 5)
    with refused("eval_data", "5 documents to train on", "holds out 0"):
        run.prepare(eval_data=0.0001)
    assert not list(run.data.iterdir())


def test_held_out_rows_of_earlier_versions_are_matched_by_their_old_digests(run):
    """Old digests kept white space; scoring such a run still needs its rows."""
    assert digest(Text("a  b"), keeps_space=True) == 11958313914725998261
    write_lines(run.train, [row(f"answer  {i}") for i in range(40)])
    index = run.prepare(eval_data=0.25)
    settings = run.settings(eval_data=0.25)
    expected = list(eval_examples(settings, index.eval))
    assert len(expected) == index.eval.documents > 0
    old = [digest(example, keeps_space=True) for example in expected]
    np.save(index.eval.folder / "digests.npy", np.array(old, np.uint64))
    assert list(eval_examples(settings, index.eval)) == expected
