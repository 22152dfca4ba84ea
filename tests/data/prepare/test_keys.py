"""Keys: everything that makes documents changes them, nothing else does."""

import hashlib
import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.config.settings import settings_with
from pipeline.data.dataset import writer
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare import job, keys
from pipeline.data.prepare.prepare import train_key
from tests.data.prepare.preparation import lines_of, row
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.tensor


CHANGES = {
    "chat_template": {"chat_template": "chatml"},
    "columns": {"columns": {"messages": "messages"}},
    "data_format": {"data_format": "messages"},
    "held_out": {"eval_data": 0.5},
    "limit": {"limit": 3},
    "limit of a source": {"train_data": {"path": "train.jsonl", "limit": 5}},
    "max_length": {"max_length": 99},
    "over_length": {"over_length": "drop"},
    "packing": {"packing": False},
    "chat_template_kwargs": {"chat_template_kwargs": {"mood": "calm"}},
    "special_tokens_in_text": {"special_tokens_in_text": "reject"},
    "split_turns": {"split_turns": True},
    "train_on_reasoning": {"train_on_reasoning": False},
    "train_on": {"train_on": "all"},
    "weight": {"train_data": {"path": "train.jsonl", "weight": 2.0}},
}


FILES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("change", ["data", *FILES, *CHANGES])
def test_whatever_makes_the_documents_changes_the_key(run, monkeypatch, change):
    monkeypatch.chdir(run.folder)
    if change == "chat_template":
        (run.folder / "model" / "chat_template.jinja").unlink()
    if change == "chat_template_kwargs":
        template = run.folder / "model" / "chat_template.jinja"
        template.write_text("{{ mood }}" + template.read_text())
    before = {} if change != "chat_template" else {"train_data": texts(run), "eval_data": None}
    first = run.prepare(**before)
    if change == "data":
        run.append(row("new"))
    elif change == "chat_template.jinja":
        template = run.folder / "model" / change
        template.write_text("Hello. " + template.read_text())
    elif change in FILES:
        path = run.folder / "model" / change
        path.write_text(path.read_text() + "\n")
    second = run.prepare(**before | CHANGES.get(change, {}))
    assert second.train.key != first.train.key
    is_of_one_split = change in ("data", "held_out", "limit of a source", "weight", "chat_template")
    if not is_of_one_split:
        assert second.eval.key != first.eval.key
    elif change != "held_out":
        assert second.eval == first.eval
    folders = {path.name for path in run.data.iterdir() if path.is_dir()}
    assert folders == {split.folder.name for split in second.splits.values()}
    assert DataIndex.load(run.data) == second
    for name, split in second.splits.items():
        assert run.audit(name)["documents"] == split.documents


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


def test_no_setting_of_the_key_is_untested():
    assert settings_with("documents") <= set(CHANGES)


def texts(run):
    path = run.folder / "texts.jsonl"
    lines_of(path, [json.dumps({"text": f"a text {i}"}) for i in range(8)])
    return str(path)


def test_other_settings_do_not_change_the_key(run):
    first = run.prepare()
    assert run.prepare(lr=1e-5, seed=7, max_rejected=0.5) == first


@pytest.mark.parametrize("how", ["appended", "replaced", "removed", "tokenizer"])
def test_a_file_that_changes_while_it_is_read_is_refused(run, monkeypatch, how):
    first = run.prepare()
    text = run.train.read_text()
    run.append(row("new"))
    run_job = job.JobRun.run

    def changing(self, processes):
        run_job(self, processes)
        if how == "appended":
            run.append(row("late"))
        elif how == "replaced":
            other = run.folder / "other"
            shutil.copy2(run.train, other)
            other.replace(run.train)
        elif how == "removed":
            run.train.unlink()
        else:
            path = run.folder / "model" / "tokenizer.json"
            path.write_text(path.read_text() + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(job.JobRun, "run", changing)
        with refused("tokenizer.json" if how == "tokenizer" else "train.jsonl", "changed"):
            run.prepare()
    assert DataIndex.load(run.data) == first
    if how != "tokenizer":
        run.train.write_text(text)
        os.utime(run.train, (0, 0))
        assert run.prepare() == first


def test_a_new_link_or_mode_of_a_file_is_no_change(run, monkeypatch):
    run_job = job.JobRun.run

    def touching(self, processes):
        run_job(self, processes)
        run.train.chmod(0o600)
        os.link(run.train, run.folder / f"link-{len(list(run.folder.iterdir()))}")

    monkeypatch.setattr(job.JobRun, "run", touching)
    assert run.prepare().train.documents == 24


def test_large_files_are_hashed_once_until_they_change(run, monkeypatch):
    hashed = []
    digest = hashlib.file_digest

    def counting(stream, name):
        hashed.append(Path(stream.name))
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    monkeypatch.setattr(keys, "_MIN_CACHED_BYTES", 1)
    run.prepare()  # just written: within a tick of the clock it could change unseen
    monkeypatch.setattr(keys, "_SETTLED_AFTER_S", 0.0)
    first = run.prepare()
    assert hashed.count(run.train) == 2
    assert run.prepare() == first
    assert train_key(run.settings()) == first.train.key
    assert hashed.count(run.train) == 2
    text = run.train.read_text()
    run.train.write_text(text.replace("yes", "nay"))  # of the same length
    assert run.prepare().train.key != first.train.key
    run.train.write_text(text)
    assert run.prepare().train.key == first.train.key
    assert hashed.count(run.train) == 4


def test_data_of_other_tokeniser_versions_is_reused_and_named(run, monkeypatch, caplog):
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
