"""Prepared data has the documents of the encoder, is written once, and is never incomplete.

A split is the training data or the held-out data. `run` is a folder with a model and rows.
"""

import errno
import json
import os
import pickle
import re
import shutil
import time

import numpy as np
import pytest

from pipeline.cluster import progress
from pipeline.data.chat.encoder import Encoder
from pipeline.data.chat.tokenizer import load_tokenizer, run_tokenizer
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.prepare import job, lines
from pipeline.data.prepare.audit import audit_summary
from pipeline.data.prepare.prepare import prepare_data
from pipeline.errors import RankZeroError
from pipeline.rows.formats import read_example
from pipeline.rows.sources import read_rows, resolve_sources
from tests.data.prepare.preparation import content, row
from tests.messages import refused

pytestmark = pytest.mark.tensor


def test_documents_equal_those_of_the_encoder(run):
    split = open_split(run.prepare(max_length=100).train)
    encoder = Encoder(load_tokenizer(run.folder / "model"), run.settings())
    rows = list(read_rows(resolve_sources(run.settings().train_sources, "train_data")))
    assert len(split) == len(rows) == 24
    for i, source in enumerate(rows):
        (expected,) = encoder.encode(read_example(source).example)
        ids, supervised = split.document(i)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected.ids[:100].tolist()
        assert supervised.dtype == np.bool_
        assert supervised.tolist() == expected.supervised[:100].tolist()
        assert split.lengths[i] == len(ids)
        assert split.supervised_counts[i] == supervised.sum() > 0
    assert split.lengths.dtype == split.supervised_counts.dtype == np.int64
    for outside in (-1, 24):
        with pytest.raises(IndexError):
            split.document(outside)


def test_a_new_token_is_one_token_in_documents_and_stays_when_decoded(run):
    plain, with_token = (
        open_split(run.prepare(new_tokens=tokens).train).document(0)[0] for tokens in ([], ["ask"])
    )
    tokenizer = run_tokenizer(run.settings(new_tokens=["ask"]))
    token = tokenizer.convert_tokens_to_ids("ask")
    assert token == 259  # the first id after the vocabulary of the byte-level tokenizer
    num_occurrences = with_token.tolist().count(token)
    assert num_occurrences >= 1
    # One token replaces the three bytes of "ask".
    assert len(with_token) == len(plain) - 2 * num_occurrences
    text = tokenizer.decode(with_token, skip_special_tokens=True)
    assert text.count("ask") == num_occurrences


def test_a_new_token_that_no_document_has_is_counted_and_logged(run):
    run.prepare(new_tokens=["ask", "<never>"])
    counts = run.audit()["new_tokens"]
    assert counts["ask"] >= 1
    assert counts["<never>"] == 0
    summary = audit_summary(run.data)
    assert "'<never>'" in summary
    assert "'ask'" not in summary


def test_progress_is_logged(run, monkeypatch, caplog):
    monkeypatch.setattr(lines, "CHUNK_ROWS", 10)
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.001)
    advance = progress.Work.advance

    def advance_slowly(work, amount=1):  # so that a line is logged before the work ends
        advance(work, amount)
        time.sleep(0.05)

    monkeypatch.setattr(progress.Work, "advance", advance_slowly)
    with caplog.at_level("INFO", "pipeline"):
        run.prepare()
    lines_with_count = re.findall(r"train_data: tokenising rows: (?:10|20|24),", caplog.text)
    assert lines_with_count


def test_the_index_matches_the_files_also_after_the_folder_is_moved(run):
    index = run.prepare()
    moved = run.data.rename(run.folder / "moved")
    loaded = DataIndex.load(moved)
    assert loaded == DataIndex.from_json(json.loads(json.dumps(index.as_json())), moved)
    for name, split_index in loaded.splits.items():
        split = open_split(split_index)
        assert split_index.folder == moved / f"{name}-{split_index.key}"
        assert split_index.documents == len(split)
        assert split_index.tokens == split.lengths.sum()
        assert split_index.supervised_tokens == split.supervised_counts.sum()
        assert split_index.longest == split.lengths.max()
    without = prepare_data(run.settings(eval_data=None), moved)
    assert without.eval is None
    assert DataIndex.load(moved) == without
    assert not list(moved.glob("eval-*"))


def test_a_pickled_split_maps_the_files_instead_of_copying_them(run):
    split = open_split(run.prepare().train)
    sent = pickle.dumps(split)
    assert len(sent) < 1000
    assert pickle.loads(sent).document(3)[0].tolist() == split.document(3)[0].tolist()


def test_preparing_twice_writes_nothing(run, monkeypatch):
    first = run.prepare()
    before = run.file_states()

    def tokenise_again(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(job, "ChunkTokeniser", tokenise_again)
    assert run.prepare() == first
    assert run.file_states() == before


def test_limit_is_the_number_of_documents_of_each_split(run):
    run.train.write_text("{broken\n" + run.train.read_text())
    index = run.prepare(limit=4)
    assert (index.train.documents, index.eval.documents) == (4, 4)
    assert run.audit()["rows_read"] == 5


def test_a_template_without_an_end_token_is_refused_and_the_earlier_data_stays(run):
    first = run.prepare()
    template = run.folder / "model" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with refused("chat template"):
        run.prepare()
    assert DataIndex.load(run.data) == first
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


def test_a_full_disk_is_reported_and_the_earlier_data_stays(run, monkeypatch):
    first = run.prepare()
    before = sorted(path.name for path in first.train.folder.parent.iterdir())

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("No space left on device", run.data, "output_dir", error=RankZeroError):
        run.prepare(max_length=99)
    assert sorted(path.name for path in first.train.folder.parent.iterdir()) == before
    assert len(open_split(first.train)) == 24


def test_a_damaged_split_is_refused_by_readers_and_written_again(run):
    first = run.prepare()
    ids = first.train.folder / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-400])
    with refused("rankzero prepare"):
        open_split(first.train)
    ids.unlink()
    with refused("rankzero prepare"):
        open_split(first.train)
    assert run.prepare() == first
    assert len(open_split(first.train)) == 24
    shutil.rmtree(run.data)
    with refused("rankzero prepare"):
        DataIndex.load(run.data)


# Kind of damage -> function that damages a file in this way.
KINDS_OF_DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_text(path.read_text()[:-9]),
    "one line": lambda path: path.write_text(path.read_text().splitlines(keepends=True)[0]),
}


@pytest.mark.parametrize("damage", KINDS_OF_DAMAGE)
def test_a_split_with_damaged_rejects_is_written_again(run, damage):
    run.append("{", row(" "), row("long " * 99))
    values = {"max_rejected": 0.1, "over_length": "drop", "max_length": 200}
    first = run.prepare(**values)
    before = content(run.data)
    assert len(run.rejects()) == 3
    KINDS_OF_DAMAGE[damage](first.train.folder / "rejects.jsonl")
    assert run.prepare(**values) == first
    assert content(run.data) == before
