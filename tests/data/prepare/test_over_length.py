"""Documents longer than max_length are truncated, dropped, split or refused."""

import numpy as np
import pytest

from pipeline.data.dataset.reader import open_split
from pipeline.data.prepare.prepare import prepare_data
from tests.data.prepare.preparation import long_rows, row, write_lines
from tests.messages import refused

pytestmark = pytest.mark.tensor


def fitted_and_whole(run, over_length):
    """The same rows with max_length 100 and this rule, and with a max_length that fits all rows."""
    write_lines(run.train, long_rows())
    index = run.prepare(max_length=100, over_length=over_length, max_rejected=0.9)
    whole = prepare_data(run.settings(max_length=10_000, max_rejected=0.9), run.folder / "whole")
    return open_split(index.train), open_split(whole.train)


def test_truncated_documents_keep_a_supervised_token(run):
    fitted, whole = fitted_and_whole(run, "truncate")
    masks = [whole.document(i)[1] for i in range(len(whole))]
    num_late = sum(not mask[:100].any() for mask in masks)  # answers beyond the first 100 tokens
    assert num_late > 0
    assert len(fitted) == len(whole) - num_late
    assert run.audit()["rejected"]["no supervised token within max_length (100)"] == num_late
    assert fitted.lengths.max() == 100
    assert fitted.supervised_counts.min() > 0


def test_dropped_rows_are_counted_and_are_not_rejected(run):
    fitted, whole = fitted_and_whole(run, "drop")
    audit = run.audit()
    num_short = int((whole.lengths <= 100).sum())
    assert len(fitted) == audit["rows_used"] == num_short < len(whole)
    assert audit["rows_dropped"] == len(whole) - num_short
    assert sum(audit["rejected"].values()) == 2
    assert audit["rows_read"] == audit["rows_used"] + audit["rows_dropped"] + 2
    assert len(run.rejects()) == 2 + audit["rows_dropped"]
    run.prepare(max_length=100, over_length="drop", max_rejected=0.05)  # 2 of 44
    write_lines(run.train, [row("long " * 99)])
    with refused("max_length", "over_length is drop"):
        run.prepare(max_length=100, over_length="drop")


def test_split_documents_train_every_supervised_token_once(run):
    fitted, whole = fitted_and_whole(run, "split")
    assert fitted.lengths.max() <= 100
    assert fitted.supervised_counts.min() > 0
    assert fitted.supervised_counts.sum() == whole.supervised_counts.sum()
    segments = iter(range(len(fitted)))
    for i in range(len(whole)):
        ids, supervised = whole.document(i)
        start = 0
        trained = np.zeros(len(ids), bool)
        # Windows of 100 overlap by one token: the first token of a segment has no prediction.
        while start + 1 < len(ids) or start == 0:
            window = slice(start, start + 100)
            if supervised[window][1:].any():
                segment, mask = fitted.document(next(segments))
                assert segment.tolist() == ids[window].tolist()
                assert not mask[0]
                assert not (trained[window] & mask).any()
                trained[window] |= mask
            start += 99
        assert trained.tolist() == supervised.tolist()
    assert next(segments, None) is None
    audit = run.audit()
    assert audit["documents"] == len(fitted) > audit["rows_used"] == len(whole)
    assert audit["duplicate_rows"] == 2
    assert audit["split_rows"] > 0


def test_over_length_fail_refuses_a_long_document(run):
    write_lines(run.train, [row("short"), row("long " * 99)])
    with refused(f"{run.train}:2", "max_length", 100, "over_length"):
        run.prepare(max_length=100, over_length="fail")
    run.prepare(max_length=600, over_length="fail")


@pytest.mark.parametrize("over_length", ["truncate", "drop", "split"])
def test_the_audit_counts_the_supervised_tokens_that_max_length_loses(run, over_length):
    fitted, whole = fitted_and_whole(run, over_length)
    length = run.audit()["max_length"]
    assert length["documents"] == len(whole)
    assert length["longer"] == (whole.lengths > 100).sum() > 0
    assert length["tokens"] == whole.supervised_counts.sum()
    assert length["lost"] == whole.supervised_counts.sum() - fitted.supervised_counts.sum()
    assert (length["lost"] == 0) == (over_length == "split")
    # keeps_99: the max_length that keeps 99 % of the supervised tokens
    assert 100 < length["keeps_99"] <= length["keeps_all"]
    index = run.prepare(max_length=length["keeps_all"], over_length=over_length, max_rejected=0.9)
    assert index.train.size.length_loss.lost == 0
    assert index.train.supervised_tokens == length["tokens"]
