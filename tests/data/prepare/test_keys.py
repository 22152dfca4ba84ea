"""The key of prepared data: a hash of everything that determines its documents.

A run reuses prepared data with the same key. Training and held-out data have a key each.
"""

import hashlib
import json
import logging
import os
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.config.settings import settings_with_change
from pipeline.data.dataset import writer
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare import job, keys
from pipeline.data.prepare.digests import digest
from pipeline.data.prepare.prepare import train_key
from pipeline.rows.examples import RowError
from pipeline.rows.formats import read_example
from tests.data.prepare.preparation import row, write_lines
from tests.messages import assert_mentions, refused
from tests.rows.read import row_of

pytestmark = pytest.mark.tensor

# Setting -> a change of it that must change the key.
CHANGES = {
    "chat_template": {"chat_template": "chatml"},
    "columns": {"columns": {"messages": "messages"}},
    "data_format": {"data_format": "messages"},
    "held_out": {"eval_data": 0.5},
    "limit": {"limit": 3},
    "limit of a source": {"train_data": {"path": "train.jsonl", "limit": 5}},
    "max_length": {"max_length": 99},
    "new_tokens": {"new_tokens": ["ask"]},
    "over_length": {"over_length": "drop"},
    "packing": {"packing": False},
    "chat_template_kwargs": {"chat_template_kwargs": {"mood": "calm"}},
    "special_tokens_in_text": {"special_tokens_in_text": "reject"},
    "split_turns": {"split_turns": True},
    "train_on_reasoning": {"train_on_reasoning": False},
    "train_on": {"train_on": "all"},
    "weight": {"train_data": {"path": "train.jsonl", "weight": 2.0}},
}
OF_TRAINING_DATA = ["limit of a source", "weight"]  # these change the key of training data only
TESTED_SEPARATELY = ["chat_template", "held_out"]
OF_BOTH_SPLITS = [name for name in CHANGES if name not in (*OF_TRAINING_DATA, *TESTED_SEPARATELY)]


def assert_replaced(run, index):
    """The folder has the splits and audit of this index, and no others."""
    folders = {path.name for path in run.data.iterdir() if path.is_dir()}
    assert folders == {split.folder.name for split in index.splits.values()}
    assert DataIndex.load(run.data) == index
    for name, split in index.splits.items():
        assert run.audit(name)["documents"] == split.documents


def assert_both_keys_change(run, first, **settings):
    second = run.prepare(**settings)
    assert second.train.key != first.train.key
    assert second.eval.key != first.eval.key
    assert_replaced(run, second)


def assert_only_the_training_key_changes(run, first, **settings):
    second = run.prepare(**settings)
    assert second.train.key != first.train.key
    assert second.eval == first.eval
    assert_replaced(run, second)


def test_the_type_of_a_file_is_part_of_the_key(run):
    """The same bytes are other rows in a file of another type."""
    content = "".join(f'{{"text": "answer {i}"}}\n' for i in range(8))
    (run.folder / "rows.jsonl").write_text(content)
    (run.folder / "rows.csv").write_text(content)

    def key(name):
        return train_key(run.settings(train_data=str(run.folder / name), eval_data=None))

    assert key("rows.jsonl") != key("rows.csv")


@pytest.mark.parametrize("change", OF_BOTH_SPLITS)
def test_a_setting_of_the_documents_changes_both_keys(run, change):
    template = run.folder / "model" / "chat_template.jinja"
    template.write_text("{{ mood }}" + template.read_text())
    assert_both_keys_change(run, run.prepare(), **CHANGES[change])


@pytest.mark.parametrize("change", OF_TRAINING_DATA)
def test_a_setting_of_the_training_data_changes_its_key_only(run, monkeypatch, change):
    monkeypatch.chdir(run.folder)
    assert_only_the_training_key_changes(run, run.prepare(), **CHANGES[change])


def test_chatml_changes_the_key_of_plain_text_rows_too(run):
    (run.folder / "model" / "chat_template.jinja").unlink()
    settings = {"train_data": texts(run), "eval_data": None}
    first = run.prepare(**settings)
    assert_only_the_training_key_changes(run, first, **settings | CHANGES["chat_template"])


def test_holding_rows_out_changes_the_training_key(run):
    first = run.prepare()
    second = run.prepare(**CHANGES["held_out"])
    assert second.train.key != first.train.key
    assert_replaced(run, second)


def test_new_rows_change_the_key_of_their_split_only(run):
    first = run.prepare()
    run.append(row("new"))
    assert_only_the_training_key_changes(run, first)


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("chat_template.jinja", "Hello. ", ""),
        ("tokenizer.json", "", "\n"),
        ("tokenizer_config.json", "", "\n"),
    ],
)
def test_a_changed_file_of_the_tokenizer_changes_both_keys(run, name, start, end):
    first = run.prepare()
    path = run.folder / "model" / name
    path.write_text(start + path.read_text() + end)
    assert_both_keys_change(run, first)


def test_the_content_of_a_template_file_is_in_the_key(run, monkeypatch):
    monkeypatch.chdir(run.folder)
    path = run.folder / "mine.jinja"
    path.write_text((run.folder / "model" / "chat_template.jinja").read_text())
    first = run.prepare(chat_template=str(path))
    assert first.train.key != run.prepare().train.key
    path.write_text(path.read_text() + "\n")
    assert run.prepare(chat_template=str(path)).train.key != first.train.key
    path.unlink()
    with refused("chat_template", path):
        run.prepare(chat_template=str(path))


def test_every_setting_of_the_documents_is_tested_here():
    assert settings_with_change("documents") <= set(CHANGES)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALLS = [{"id": name, "function": {"name": name, "arguments": {}}} for name in "xy"]
RESULTS = [{"role": "tool", "content": name, "tool_call_id": name} for name in "yx"]
ROWS = [
    {"messages": TURNS, "num_images": "2", "image": "python:3.11"},
    {"messages": TURNS, "image": "a.tar:1.jpg"},
    {"messages": TURNS, "loss_mask": [1]},
    {"messages": [TURNS[0], {"role": "assistant", "tool_calls": CALLS}, *RESULTS, TURNS[1]]},
    {"prompt": "q", "completion": 'b <think step="1">r</think> a'},
    {"prompt": "q", "completion": "r</think> a"},
    {"prompt": "q", "completion": "\u201c</think>\u201d is a tag"},
    {"instruction": "q", "input": "i", "output": "a"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"text": " q a "},
]


def test_a_change_of_the_code_that_reads_rows_also_changes_the_version_in_the_key():
    """Otherwise data that an earlier version prepared would be reused.

    If the hash of the examples of ROWS changes, increase keys._FORMAT and record both values here.
    """
    digests = []
    for value in ROWS:
        try:
            digests.append(digest(read_example(row_of(value)).example, keeps_space=True))
        except RowError:
            digests.append(None)  # rejected
    hash_of_examples = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:8]
    assert (keys._FORMAT, hash_of_examples) == (11, "c9c5456d")


def texts(run):
    path = run.folder / "texts.jsonl"
    write_lines(path, [json.dumps({"text": f"a text {i}"}) for i in range(8)])
    return str(path)


def test_other_settings_do_not_change_the_key(run):
    first = run.prepare()
    assert run.prepare(lr=1e-5, seed=7, max_rejected=0.5) == first


@contextmanager
def changing_while_read(change):
    """Call `change` after the rows are read and before the key is checked."""
    run_job = job.JobRun.run

    def run_and_change(self, processes):
        run_job(self, processes)
        change()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.JobRun, "run", run_and_change)
        yield


def replace_by_copy(path):
    """Replace a file by one with the same content and time."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


CHANGES_OF_ROWS = {
    "appended": lambda run: run.append(row("late")),
    "replaced": lambda run: replace_by_copy(run.train),
    "removed": lambda run: run.train.unlink(),
}


@pytest.mark.parametrize("change", CHANGES_OF_ROWS)
def test_a_data_file_that_changes_while_it_is_read_is_refused(run, change):
    first = run.prepare()
    text = run.train.read_text()
    run.append(row("new"))
    with (
        changing_while_read(lambda: CHANGES_OF_ROWS[change](run)),
        refused("train.jsonl", "changed"),
    ):
        run.prepare()
    assert DataIndex.load(run.data) == first
    run.train.write_text(text)
    os.utime(run.train, (0, 0))
    assert run.prepare() == first


def test_a_tokenizer_that_changes_while_rows_are_read_is_refused(run):
    first = run.prepare()
    run.append(row("new"))
    path = run.folder / "model" / "tokenizer.json"
    with (
        changing_while_read(lambda: path.write_text(path.read_text() + "\n")),
        refused("tokenizer.json", "changed"),
    ):
        run.prepare()
    assert DataIndex.load(run.data) == first


def test_a_new_link_or_mode_of_a_file_is_not_a_change(run):
    def link():
        run.train.chmod(0o600)
        os.link(run.train, run.folder / f"link-{len(list(run.folder.iterdir()))}")

    with changing_while_read(link):
        assert run.prepare().train.documents == 24


def test_large_files_are_hashed_once_until_they_change(run, monkeypatch):
    hashed_files = []
    file_digest = hashlib.file_digest

    def digest_and_record(stream, name):
        hashed_files.append(Path(stream.name))
        return file_digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", digest_and_record)
    monkeypatch.setattr(keys, "_MIN_CACHED_BYTES", 1)
    # The hash of a file written just now is not cached: a change within the resolution of the
    # file's time would not be detected.
    run.prepare()
    monkeypatch.setattr(keys, "_SETTLED_AFTER_S", 0.0)
    first = run.prepare()
    assert hashed_files.count(run.train) == 2
    assert run.prepare() == first
    assert train_key(run.settings()) == first.train.key
    assert hashed_files.count(run.train) == 2
    text = run.train.read_text()
    run.train.write_text(text.replace("yes", "nay"))  # same length
    assert run.prepare().train.key != first.train.key
    run.train.write_text(text)
    assert run.prepare().train.key == first.train.key
    assert hashed_files.count(run.train) == 4


def test_data_of_other_tokeniser_versions_is_reused_with_a_message(run, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "tokenising_versions", lambda: {"tokenizers": "0.1.2"})
        first = run.prepare()
    caplog.clear()
    assert run.prepare() == first
    assert_mentions(caplog.text, first.train.folder, "tokenizers 0.1.2", version("tokenizers"))
    for split in first.splits.values():
        shutil.rmtree(split.folder)
    caplog.clear()
    assert run.prepare().train.made_with["jinja2"] == version("jinja2")
    assert run.prepare().train.key == first.train.key
    assert "0.1.2" not in caplog.text


def test_the_content_digest_changes_with_token_ids_and_masks(run):
    first = run.prepare().train
    shutil.rmtree(first.folder)
    assert run.prepare().train.content == first.content != ""
    assert run.prepare(over_length="drop").train.content == first.content  # no row is too long
    assert run.prepare(train_on="all").train.content != first.content
    run.train.write_text(run.train.read_text().replace("yes", "nay"))
    assert run.prepare().train.content != first.content


def test_the_content_digest_changes_with_the_boundaries_of_documents(run):
    """The token ids and masks of all documents together are the same."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}]
    write_lines(run.train, map(json.dumps, rows))
    whole = run.prepare(eval_data=None).train
    halves = [
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [7, 8], "labels": [-100, 8]},
    ]
    write_lines(run.train, map(json.dumps, halves))
    split = run.prepare(eval_data=None).train
    assert (split.tokens, split.documents) == (whole.tokens, 2 * whole.documents)
    assert split.content != whole.content


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("first")
    hashes = keys.Fingerprints(tmp_path)
    hashes.sha256(path)
    hashes.require_unchanged()
    path.chmod(0o600)  # the content is the same
    hashes.require_unchanged()
    path.write_text("other")
    with refused(path, "changed"):
        hashes.require_unchanged()
    path.unlink()
    with refused(path, "changed"):
        hashes.require_unchanged()
