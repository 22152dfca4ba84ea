import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.config.settings import RunSettings, settings_with
from pipeline.data.chat.encoder import Encoder, load_tokenizer
from pipeline.data.dataset.reader import DataIndex, open_split
from pipeline.data.dataset.writer import SplitWriter
from pipeline.data.prepare import keys, splits
from pipeline.data.prepare import prepare as module
from pipeline.data.prepare.prepare import check_first_rows, check_rows, prepare, train_key
from pipeline.errors import RankZeroError, UserError
from pipeline.report.data_audit import source_columns
from pipeline.report.text import cell
from pipeline.rows.formats import to_example
from pipeline.rows.sources import read_rows, resolve
from pipeline.train.status import RunStatus
from tests import ROOT
from tests.report.test_page import read_page
from tests.tiny import CHATML, make_rows, make_tokenizer

pytestmark = pytest.mark.tensor


@pytest.fixture
def run(tmp_path):
    """A folder with model/, train.jsonl and eval.jsonl, and settings that name them."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_rows(tmp_path / "train.jsonl", 24)
    make_rows(tmp_path / "eval.jsonl", 6)
    return Run(tmp_path)


class Run:
    def __init__(self, folder):
        self.folder, self.data = folder, folder / "run" / "data"
        self.train, self.eval = folder / "train.jsonl", folder / "eval.jsonl"

    def settings(self, **values):
        given = {
            "model": str(self.folder / "model"),
            "train_data": str(self.train),
            "eval_data": str(self.eval),
            "output_dir": str(self.folder / "run"),
        }
        return RunSettings.model_validate(given | values)

    def prepare(self, limit=None, **values):
        return prepare(self.settings(**values), self.data, limit)

    def audit(self, split="train"):
        return json.loads((self.data / "audit.json").read_text())[split]

    def rejects(self):
        return [json.loads(line) for line in (self.data / "rejects.jsonl").read_text().splitlines()]

    def everything(self):
        """Every name under data/, with when it was written and as what file."""
        paths = [self.data, *self.data.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    def append(self, *lines):
        with self.train.open("a") as stream:
            stream.writelines(f"{line}\n" for line in lines)


def row(answer, question="q"):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def test_documents_are_those_of_encode(run):
    split = open_split(run.prepare(max_length=100).train)
    encoder = Encoder(load_tokenizer(run.folder / "model"), run.settings())
    rows = list(read_rows(resolve(run.settings().train_sources, "train_data")))
    assert len(split) == len(rows) == 24
    for i, source in enumerate(rows):
        (expected,) = encoder.encode(to_example(source))
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


def test_it_says_how_far_it_is(run, monkeypatch):
    monkeypatch.setattr("pipeline.data.prepare.splits._ROWS_A_LINE", 10)
    monkeypatch.setattr("pipeline.data.prepare.splits._PIECE_ROWS", 10)
    said = []
    prepare(run.settings(), run.data, say=said.append)
    assert said == [f"{run.train}: {count} rows tokenised" for count in (10, 20)]


def test_the_index_says_what_the_files_hold_and_survives_a_move(run):
    made = run.prepare()
    moved = run.data.rename(run.folder / "moved")
    found = DataIndex.load(moved)
    assert found == DataIndex.from_json(json.loads(json.dumps(made.as_json())), moved)
    for name, split_index in found.splits.items():
        split = open_split(split_index)
        assert split_index.folder == moved / f"{name}-{split_index.key}"
        assert split_index.documents == len(split)
        assert split_index.tokens == split.lengths.sum()
        assert split_index.supervised_tokens == split.supervised_counts.sum()
        assert split_index.longest == split.lengths.max()
    without = prepare(run.settings(eval_data=None), moved)
    assert without.eval is None
    assert DataIndex.load(moved) == without
    assert not list(moved.glob("eval-*"))


def test_a_split_in_a_worker_maps_the_files_instead_of_copying_them(run):
    split = open_split(run.prepare().train)
    sent = pickle.dumps(split)
    assert len(sent) < 1000
    assert pickle.loads(sent).document(3)[0].tolist() == split.document(3)[0].tolist()


def test_a_second_time_nothing_is_written(run, monkeypatch):
    first = run.prepare()
    before = run.everything()

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(splits, "Maker", fail)
    assert run.prepare() == first
    assert run.everything() == before


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
    "split_turns": {"split_turns": True},
    "train_on": {"train_on": "all"},
    "weight": {"train_data": {"path": "train.jsonl", "weight": 2.0}},
}
FILES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("change", ["data", *FILES, *CHANGES])
def test_the_key_is_made_of_all_that_makes_the_documents(run, monkeypatch, change):
    monkeypatch.chdir(run.folder)
    if change == "chat_template":
        (run.folder / "model" / "chat_template.jinja").unlink()
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


def test_no_setting_of_the_key_is_untested():
    assert settings_with("documents") <= set(CHANGES)


def texts(run):
    path = run.folder / "texts.jsonl"
    lines_of(path, [json.dumps({"text": f"a text {i}"}) for i in range(8)])
    return str(path)


def test_settings_that_do_not_matter_are_not_in_the_key(run):
    first = run.prepare()
    assert run.prepare(lr=1e-5, seed=7, max_rejected=0.5) == first


def test_limit_is_the_number_of_documents_a_split(run):
    run.train.write_text("{broken\n" + run.train.read_text())
    index = run.prepare(limit=4)
    assert (index.train.documents, index.eval.documents) == (4, 4)
    assert run.audit()["rows_read"] == 5


def test_killed_half_way_nothing_half_written_is_used(run):
    first = run.prepare()
    run.append(row("new"))
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.data.prepare import prepare\n"
        "from pipeline.data.dataset.writer import SplitWriter\n"
        "def add_and_die(self, *given, add=SplitWriter.add):\n"
        "    add(self, *given)\n"
        "    for column in self._columns.values():\n"
        "        column.stream.flush()\n"
        "    os._exit(9)\n"
        "SplitWriter.add = add_and_die\n"
        "settings = RunSettings.model_validate_json(sys.argv[1])\n"
        "prepare.prepare(settings, Path(sys.argv[2]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, run.settings().model_dump_json(), str(run.data)],
        cwd=ROOT,
        check=False,
    )
    assert killed.returncode == 9
    assert len([path for path in run.data.iterdir() if path.name.endswith(".tmp")]) == 1
    assert DataIndex.load(run.data) == first
    assert len(open_split(first.train)) == 24
    second = run.prepare()
    assert second.train.documents == len(open_split(second.train)) == 25
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


def test_killed_between_the_splits_and_their_index(run, monkeypatch):
    first = run.prepare()
    run.append(row("new"))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_summary", die)
        with pytest.raises(KeyboardInterrupt):
            run.prepare()
    assert DataIndex.load(run.data) == first
    assert open_split(first.train).document(0)
    second = run.prepare()
    assert DataIndex.load(run.data) == second
    assert run.audit()["rows_used"] == 25


def test_a_damaged_split_is_refused_by_readers_and_made_again_by_prepare(run):
    first = run.prepare()
    ids = first.train.folder / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-400])
    with pytest.raises(UserError, match="prepare"):
        open_split(first.train)
    ids.unlink()
    with pytest.raises(UserError, match="prepare"):
        open_split(first.train)
    assert run.prepare() == first
    assert len(open_split(first.train)) == 24
    shutil.rmtree(run.data)
    with pytest.raises(UserError, match=r"launch/prepare\.py"):
        DataIndex.load(run.data)


@pytest.mark.parametrize("damage", ["missing", "cut", "short"])
def test_a_split_without_all_its_rejects_is_made_again(run, damage):
    run.append("{", row(" "), row("long " * 99))
    values = {"max_rejected": 0.1, "over_length": "drop", "max_length": 200}
    first = run.prepare(**values)
    before = content(run.data)
    assert len(run.rejects()) == 3
    rejects = first.train.folder / "rejects.jsonl"
    whole = rejects.read_text()
    if damage == "missing":
        rejects.unlink()
    else:
        rejects.write_text(whole[:-9] if damage == "cut" else whole[: whole.index("\n") + 1])
    assert run.prepare(**values) == first
    assert content(run.data) == before


@pytest.mark.parametrize("check", ["rows", "prepare"])
def test_more_bad_rows_than_allowed(run, check):
    bad = ["{", "[]", "[]", row(" "), row(" "), row(" "), '{"note": "t"}']
    run.append(*bad)

    def judge(**values):
        check_rows(run.settings(**values)) if check == "rows" else run.prepare(**values)

    with pytest.raises(UserError) as raised:
        judge(max_rejected=0.2)
    message = str(raised.value)
    assert f"{run.train}:25: not valid JSON" in message
    assert f"{run.train}:26: expected a JSON object, found a list" in message
    assert "train_data: 7 of 31 rows (22.6 %)" in message
    assert "max_rejected (0.2)" in message
    assert "3 x an assistant message is empty; 2 x expected a JSON object" in message
    assert "set max_rejected to 0.226" in message
    left = [path.name for path in run.data.iterdir()] if run.data.exists() else []
    assert left == ([] if check == "rows" else ["rejects.jsonl"])
    judge(max_rejected=0.226)


@pytest.mark.parametrize("how", ["beginning", "prepare", "prepared"])
def test_refused_rows_are_all_named(run, monkeypatch, how):
    monkeypatch.setattr(module, "_FIRST_ROWS", 2)
    first = run.prepare()
    before = content(run.data)
    good = run.train.read_text()
    lines_of(run.train, ["{", *good.splitlines(), *["[]"] * 5])
    if how == "prepared":
        first = run.prepare(max_rejected=1.0)
        before = content(run.data)
        (run.data / "rejects.jsonl").write_text("")  # of what was refused before
    with pytest.raises(UserError, match=rf"; each row is named in {run.data}/rejects.jsonl$"):
        check_first_rows(run.settings()) if how == "beginning" else run.prepare()
    assert [reject["line"] for reject in run.rejects()] == [1, *range(26, 31)]
    assert DataIndex.load(run.data) == first
    if how != "prepared":
        run.train.write_text(good)
    run.prepare(max_rejected=1.0)
    assert content(run.data) == before


def test_exactly_as_many_bad_rows_as_allowed(run):
    check_rows(run.settings(max_rejected=0.0))
    run.train.write_text("{\n" + 3 * f"{row('good')}\n")
    check_rows(run.settings(max_rejected=0.25))
    assert run.prepare(max_rejected=0.25).train.documents == 3


def test_bad_held_out_rows_are_judged_by_themselves(run):
    run.eval.write_text(run.eval.read_text() + "{\n")
    with pytest.raises(UserError, match="eval_data: 1 of 7 rows"):
        check_rows(run.settings())
    with pytest.raises(UserError, match="eval_data: 1 of 7 rows"):
        run.prepare()
    assert [(reject["file"], reject["line"]) for reject in run.rejects()] == [(str(run.eval), 7)]


def test_what_was_prepared_with_a_laxer_limit_is_judged_again(run):
    run.append("{")
    run.prepare(max_rejected=0.5)
    with pytest.raises(UserError, match=f"{run.train}:25: not valid JSON"):
        run.prepare(max_rejected=0.01)


@pytest.mark.parametrize("how", ["check", "beginning", "prepare", "dropped"])
def test_a_source_is_not_lost_as_a_whole_however_few_rows_it_has(run, monkeypatch, how):
    monkeypatch.setattr(module, "_FIRST_ROWS", 2)
    other = run.folder / "other.jsonl"
    lines_of(other, [row("long " * 99)] * 3 if how == "dropped" else ['{"sum": 3}'] * 3)
    sources = [str(run.train), {"path": str(other), "weight": 0.1}]
    values = {"train_data": sources, "max_rejected": 1.0, "over_length": "drop", "max_length": 200}
    do = {"check": check_rows, "beginning": check_first_rows}.get(how)
    do = do or (lambda settings: prepare(settings, run.data))
    why = "" if how == "dropped" else rf" \({other}:1: .*\)"
    with pytest.raises(UserError, match=rf"train_data: {other}: none of its 3 rows is used{why};"):
        do(run.settings(**values))
    lines_of(other, [*other.read_text().splitlines(), row("good")])
    do(run.settings(**values))
    run.prepare(**values, limit=4)  # its rows are not all read


def test_no_usable_row(run):
    run.train.write_text("{\n{\n")
    with pytest.raises(UserError, match="no usable row"):
        check_rows(run.settings(max_rejected=1.0))
    with pytest.raises(UserError, match="no usable row"):
        run.prepare(limit=4)
    assert not list(run.data.iterdir())  # a few rows to try with, perhaps in a folder for that
    run.train.write_text("\n\n")
    with pytest.raises(UserError, match="only blank lines"):
        check_rows(run.settings())


def test_checking_rows_needs_no_torch(run):
    code = (
        "import sys\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.data.prepare.prepare import check_rows\n"
        "check_rows(RunSettings.model_validate_json(sys.argv[1]))\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    arguments = [sys.executable, "-c", code, run.settings().model_dump_json()]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_audit_adds_up(run):
    long = row("long " * 40)  # cut inside the answer
    late = row("late", question="ask " * 40)  # cut before the answer
    run.append("{", row(" "), long, late, row("twice"), row("twice"))
    run.eval.write_text(row("twice") + "\n" + row("never seen") + "\n")
    index = run.prepare(max_length=128, max_rejected=0.2)
    audit = run.audit()
    assert (audit["rows_read"], audit["rows_used"]) == (30, 27)
    assert audit["rejected"] == {
        "not valid JSON: Expecting property name enclosed in double quotes": 1,
        "an assistant message is empty": 1,
        "no supervised token within max_length (128)": 1,
    }
    assert [(reject["file"], reject["line"]) for reject in run.rejects()] == [
        (str(run.train), line) for line in (25, 26, 28)
    ]
    assert {reject["reason"] for reject in run.rejects()} == set(audit["rejected"])
    split = open_split(index.train)
    assert len(split) == 27
    lengths = split.lengths
    assert audit["tokens"] == lengths.sum()
    assert audit["supervised_tokens"] == split.supervised_counts.sum()
    share = audit["supervised_tokens"] / audit["tokens"]
    assert audit["supervised_share"] == pytest.approx(share, abs=1e-4)
    said = audit["length"]
    assert (said["min"], said["max"]) == (lengths.min(), 128)
    assert said["median"] == np.median(lengths)
    histogram = said["histogram"]
    assert sum(histogram["documents"]) == 27
    assert histogram["documents"][0] > 0
    for i, count in enumerate(histogram["documents"]):
        first, width = said["min"] + i * histogram["width"], histogram["width"]
        assert count == ((first <= lengths) & (lengths < first + width)).sum()
    assert audit["end_of_turn_share"] == pytest.approx(26 / 27, abs=1e-4)
    tokenizer = load_tokenizer(run.folder / "model")
    whole = len(tokenizer.apply_chat_template(json.loads(long)["messages"])["input_ids"])
    assert (audit["truncated_rows"], audit["tokens_lost"]) == (1, whole - 128)
    assert audit["duplicate_rows"] == 1
    assert run.audit("eval")["rows_also_in_train"] == 1


def test_a_row_of_several_turns_that_is_cut_has_lost_an_end(run):
    turns = json.loads(row("yes"))["messages"] * 3
    lines_of(run.train, [json.dumps({"messages": turns})])
    whole = run.prepare().train.tokens
    assert run.audit()["end_of_turn_share"] == 1
    for cut, share in (
        (1, 1),
        (2, 0),
        (30, 0),
    ):  # the newline behind the last turn; its end; a turn
        assert run.prepare(max_length=whole - cut).train.documents == 1
        assert run.audit()["end_of_turn_share"] == share
    run.prepare(max_length=whole - 30, over_length="split")
    assert run.audit()["end_of_turn_share"] == 1
    run.prepare(max_length=whole - 2, split_turns=True)  # two of three are whole
    assert run.audit()["end_of_turn_share"] == 0


def test_ends_are_counted_whatever_the_order_of_rows(run):
    """Tokens end with a turn's end, which is not the end of sequence."""
    tokenizer = load_tokenizer(run.folder / "model")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(run.folder / "model")
    ids = tokenizer("<|im_start|>assistant\nyes<|im_end|>").input_ids
    tokens = json.dumps({"input_ids": ids, "labels": ids})
    for rows in ([tokens, row("yes")], [row("yes"), tokens]):
        lines_of(run.train, rows)
        run.prepare()
        assert run.audit()["end_of_turn_share"] == 1


def test_a_template_that_teaches_no_end_is_refused_and_nothing_is_left(run):
    first = run.prepare()
    template = run.folder / "model" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(UserError, match="never learn to stop"):
        run.prepare()
    assert DataIndex.load(run.data) == first
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


def test_the_script_shows_documents_and_the_audit(run):
    settings = run.settings().model_dump(include={"model", "train_data", "output_dir"})
    run_file = run.folder / "run.yaml"
    run_file.write_text(json.dumps(settings))

    def script(*arguments):
        command = [sys.executable, "launch/prepare.py", str(run_file), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = script("--show", "2")
    assert shown.returncode == 0, shown.stderr
    assert "<|im_start|>assistant\n[[yes 0<|im_end|>]]\n" in shown.stdout
    assert shown.stdout.count("[[") == 3  # the second document has two answers
    assert "rows read" in shown.stdout
    run.append("{")
    refused = script("max_rejected=0")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"{run.train}:25: ")
    assert "Traceback" not in refused.stderr
    for place in ("/proc/x", str(run.train), str(run.train / "below")):
        refused = script(f"output_dir={place}")
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"output_dir: {place}")
        assert "give another folder" in refused.stderr


def test_the_script_leaves_a_run_that_is_at_work_its_data(run):
    status = RunStatus(run.folder / "run" / "status.json")
    first = run.prepare()
    status.own()
    status.claim()
    run_file = run.folder / "run.yaml"
    run_file.write_text(json.dumps(run.settings().model_dump(include={"model", "output_dir"})))
    command = [sys.executable, "launch/prepare.py", run_file, f"train_data={run.train}"]
    command.append("max_length=99")
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"is in use by a run (process {os.getpid()} " in refused.stderr
    assert len(open_split(first.train)) == 24
    status.end("done", 0, None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not first.train.folder.exists()


def test_a_full_disk_is_said_and_leaves_what_was_there(run, monkeypatch):
    first = run.prepare()
    before = sorted(path.name for path in first.train.folder.parent.iterdir())

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RankZeroError, match="No space left on device while the data is prepared"):
        run.prepare(max_length=99)
    assert sorted(path.name for path in first.train.folder.parent.iterdir()) == before
    assert len(open_split(first.train)) == 24


def lines_of(path, rows):
    path.write_text("".join(f"{line}\n" for line in rows))


def long_rows(count=40):
    """Rows of many lengths, some bad, some twice, some without an answer within 128 tokens."""
    rows = [
        row(f"answer {i} " * (1 + i % 9), question="q " * (1 + i * 7 % 70)) for i in range(count)
    ]
    return [*rows, "{", row(" "), rows[3], rows[7]]


def content(data):
    """Every published file but the host's own memory of hashes, by name."""
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in sorted(data.rglob("*"))
        if path.is_file() and path.name != "fingerprints.json"
    }


@pytest.mark.parametrize(("processes", "over_length"), [(2, "truncate"), (3, "split")])
def test_what_is_written_does_not_depend_on_the_number_of_processes(
    run, monkeypatch, processes, over_length
):
    lines_of(run.train, long_rows(300))
    monkeypatch.setattr(splits, "_PIECE_ROWS", 7)
    values = {"max_length": 128, "over_length": over_length, "max_rejected": 0.9}
    settings = run.settings(eval_data=0.1, **values)
    alone, together = run.folder / "alone", run.folder / "together"
    prepare(settings, alone, processes=1)
    prepare(settings, together, processes=processes)
    assert content(alone) == content(together)
    assert any(name.startswith("eval-") for name in content(alone))


def test_an_error_of_a_process_is_the_users(run):
    template = run.folder / "model" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(UserError, match="never learn to stop"):
        prepare(run.settings(), run.data, processes=2)
    assert not list(run.data.iterdir())


def test_a_process_that_is_killed_is_said(run, monkeypatch):
    monkeypatch.setattr(splits, "Maker", Killed)
    with pytest.raises(RankZeroError, match="memory") as raised:
        prepare(run.settings(), run.data, processes=2)
    assert raised.value.exit_code == 1
    assert not list(run.data.iterdir())


class Killed:
    """A worker that the kernel ends."""

    def __init__(self, settings, threshold):
        pass

    def __call__(self, piece):
        os.kill(os.getpid(), signal.SIGKILL)


def test_no_process_is_left_behind_when_the_main_one_is_killed(run):
    code = (
        "import os, sys, signal, psutil\n"
        "from pathlib import Path\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.data.prepare import prepare\n"
        "from pipeline.data.dataset.writer import SplitWriter\n"
        "def add_and_die(self, *given):\n"
        "    children = psutil.Process().children(recursive=True)\n"
        "    print(*(child.pid for child in children), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "SplitWriter.add = add_and_die\n"
        "settings = RunSettings.model_validate_json(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare(settings, Path(sys.argv[2]), processes=2)\n"
    )
    command = [sys.executable, "-c", code, run.settings().model_dump_json(), str(run.data)]
    killed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    children = [int(pid) for pid in killed.stdout.split()]
    assert len(children) >= 2
    left = [psutil.Process(pid) for pid in children if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=20)[1] == []
    run.prepare()
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


def documents_of(index):
    split = open_split(index)
    return [tuple(split.document(i)[0].tolist()) for i in range(len(split))]


@pytest.mark.parametrize("held_out", [0.25, 12])
def test_held_out_rows_are_chosen_by_content(run, held_out):
    rows = [row(f"answer {i}") for i in range(60)]
    lines_of(run.train, rows)
    first = run.prepare(eval_data=held_out)
    train, held = documents_of(first.train), documents_of(first.eval)
    assert len(train) + len(held) == 60
    assert not set(train) & set(held)
    if held_out == 12:
        assert len(held) == 12
    else:
        assert 5 < len(held) < 25
    audits = [run.audit("train"), run.audit("eval")]
    assert [audit["rows_used"] for audit in audits] == [len(train), len(held)]
    # twice each, and in another order: the same rows are held out, and no row is in both
    lines_of(run.train, [*reversed(rows), *rows])
    again = run.prepare(eval_data=held_out if held_out == 0.25 else 24)
    assert set(documents_of(again.eval)) == set(held)
    assert set(documents_of(again.train)) == set(train)
    assert run.audit("eval")["rows_also_in_train"] == 0
    # more rows: what was held out by share stays so
    lines_of(run.train, [*rows, *(row(f"new answer {i}") for i in range(60))])
    more = run.prepare(eval_data=held_out)
    kept = set(documents_of(more.eval)) & (set(held) | set(train))
    assert kept == set(held) if held_out == 0.25 else kept <= set(held)


def test_held_out_rows_are_read_in_a_debug_run_too(run):
    index = run.prepare(limit=4, eval_data=0.1)
    assert index.train.documents == 4
    assert index.eval.documents >= 1
    index = run.prepare(limit=4, eval_data=3)
    assert index.train.documents == 4
    assert 1 <= index.eval.documents <= 4


def test_holding_out_nothing_or_everything_is_refused(run):
    lines_of(run.train, [row("a"), row("b")])
    with pytest.raises(UserError, match=r"eval_data: 2 leaves 0 documents to train on"):
        run.prepare(eval_data=2)
    lines_of(run.train, [row("a")] * 5)
    with pytest.raises(UserError, match=r"leaves 5 documents to train on and holds out 0"):
        run.prepare(eval_data=0.0001)
    assert not list(run.data.iterdir())


def test_bad_rows_are_judged_over_both_parts(run):
    lines_of(run.train, [*(row(f"a {i}") for i in range(99)), "{"])
    run.prepare(eval_data=0.1, max_rejected=0.01)
    assert sum(run.audit()["rejected"].values()) == 1
    assert run.audit("eval")["rejected"] == {}
    assert run.audit()["rows_read"] + run.audit("eval")["rows_read"] == 100
    with pytest.raises(UserError, match="1 of 100 rows"):
        run.prepare(eval_data=0.1, max_rejected=0.009)


@pytest.mark.parametrize("how", ["check", "prepare"])
def test_the_first_bad_row_ends_it_where_the_run_file_says_so(run, how):
    run.append("{", "[]")
    settings = run.settings(on_bad_row="fail", max_rejected=1.0)
    with pytest.raises(UserError, match=rf"{run.train}:25: not valid JSON.*on_bad_row"):
        check_rows(settings) if how == "check" else prepare(settings, run.data)


@pytest.mark.parametrize("eval_data", [None, 0.3])
def test_what_was_prepared_with_bad_rows_is_refused_where_none_may_be(run, eval_data):
    """A row that only the template refuses: nothing but prepare sees it."""
    said = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}"
    (run.folder / "model" / "chat_template.jinja").write_text(
        f"{said}{{% endif %}}{{% endfor %}}{CHATML}"
    )
    long = row("long " * 99)
    run.append(long, row("no"), row("no", question="again"))
    values = {"max_rejected": 1.0, "over_length": "drop", "max_length": 200, "eval_data": eval_data}
    run.prepare(**values)
    with pytest.raises(UserError, match=rf"{run.train}:2[67]: .*refuses.*on_bad_row is fail"):
        run.prepare(on_bad_row="fail", **values)
    lines_of(run.train, [*(row(f"a {i}") for i in range(20)), long])
    run.prepare(**values)
    run.prepare(on_bad_row="fail", **values)  # dropped is not bad


def test_the_beginning_is_checked_and_what_looks_bad_is_checked_whole(run, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_ROWS", 10)
    lines_of(run.train, ["{"] * 3 + [row(f"a {i}") for i in range(297)])
    check_first_rows(run.settings(max_rejected=0.01))  # 3 of 10, but no more than 3 of 300
    with pytest.raises(UserError, match="3 of 300 rows"):
        check_first_rows(run.settings(max_rejected=0.009))
    lines_of(run.train, [*(row(f"a {i}") for i in range(30)), *["{"] * 30])
    check_first_rows(run.settings(max_rejected=0.01))  # not seen here
    with pytest.raises(UserError, match="30 of 60 rows"):
        run.prepare(max_rejected=0.01)


def over_length(run, how, **values):
    lines_of(run.train, long_rows())
    index = run.prepare(max_length=100, over_length=how, max_rejected=0.9, **values)
    whole = prepare(run.settings(max_length=10_000, max_rejected=0.9), run.folder / "whole")
    return open_split(index.train), open_split(whole.train)


def test_truncated_documents_keep_a_supervised_token(run):
    found, whole = over_length(run, "truncate")
    late = sum(not whole.document(i)[1][:100].any() for i in range(len(whole)))
    assert late > 0
    assert len(found) == len(whole) - late
    assert run.audit()["rejected"]["no supervised token within max_length (100)"] == late
    assert found.lengths.max() == 100
    assert found.supervised_counts.min() > 0


def test_dropped_rows_are_counted_and_are_not_bad(run):
    found, whole = over_length(run, "drop")
    audit = run.audit()
    fitting = int((whole.lengths <= 100).sum())
    assert len(found) == audit["rows_used"] == fitting < len(whole)
    assert audit["rows_dropped"] == len(whole) - fitting
    assert sum(audit["rejected"].values()) == 2
    assert audit["rows_read"] == audit["rows_used"] + audit["rows_dropped"] + 2
    assert len(run.rejects()) == 2 + audit["rows_dropped"]
    run.prepare(max_length=100, over_length="drop", max_rejected=0.05)  # 2 of 44
    lines_of(run.train, [row("long " * 99)])
    with pytest.raises(UserError, match="longer than max_length"):
        run.prepare(max_length=100, over_length="drop")


def test_split_documents_train_every_supervised_token_once(run):
    found, whole = over_length(run, "split")
    assert found.lengths.max() <= 100
    assert found.supervised_counts.min() > 0
    assert found.supervised_counts.sum() == whole.supervised_counts.sum()
    pieces = iter(range(len(found)))
    for i in range(len(whole)):
        ids, supervised = whole.document(i)
        start = 0
        trained = np.zeros(len(ids), bool)
        while start + 1 < len(ids) or start == 0:
            here = slice(start, start + 100)
            if supervised[here][1:].any():
                piece, mask = found.document(next(pieces))
                assert piece.tolist() == ids[here].tolist()
                assert not mask[0]
                assert not (trained[here] & mask).any()
                trained[here] |= mask
            start += 99
        assert trained.tolist() == supervised.tolist()
    assert next(pieces, None) is None
    audit = run.audit()
    assert audit["documents"] == len(found) > audit["rows_used"] == len(whole)
    assert audit["duplicate_rows"] == 2
    assert audit["split_rows"] > 0


def test_a_long_document_is_refused_where_the_run_file_says_so(run):
    lines_of(run.train, [row("short"), row("long " * 99)])
    with pytest.raises(
        UserError, match=rf"{run.train}:2: \d+ tokens, more than max_length \(100\)"
    ):
        run.prepare(max_length=100, over_length="fail")
    run.prepare(max_length=600, over_length="fail")


def test_every_source_is_accounted_for(run):
    other = make_rows(run.folder / "other.jsonl", 10)
    lines_of(run.train, [*(row(f"a {i}") for i in range(5)), "{"])
    sources = [{"path": str(run.train), "weight": 0.5}, {"path": str(other), "limit": 4}]
    index = run.prepare(train_data=sources, max_rejected=0.5).train
    column = np.load(index.folder / "sources.npy")
    assert column.dtype == np.int32
    assert column.tolist() == [0] * 5 + [1] * 4
    assert [(s.name, s.weight) for s in index.sources] == [(str(run.train), 0.5), (str(other), 1.0)]
    assert [dict(s.formats) for s in index.sources] == [{"messages": 5}, {"messages": 4}]
    audit = run.audit()
    first, second = audit["sources"]
    assert (first["rows_read"], first["rows_used"], first["rows_rejected"]) == (6, 5, 1)
    assert (second["rows_read"], second["rows_used"], second["rows_rejected"]) == (4, 4, 0)
    for key in ("documents", "tokens", "supervised_tokens", "rows_read", "rows_used"):
        assert first[key] + second[key] == audit[key]
    assert audit["formats"] == {"messages": 9}
    assert DataIndex.load(run.data).train == index


def test_the_report_shows_the_audit_that_prepare_has_written(run):
    other = make_rows(run.folder / "other.jsonl", 1234)
    run.append("{", row(" "))
    sources = [{"path": str(run.train), "weight": 0.5}, str(other)]
    run.prepare(train_data=sources, max_rejected=0.5)
    status = RunStatus(run.folder / "run" / "status.json")
    status.own()
    status.claim()
    status.end("done", 0, None)
    page = read_page(run.folder / "run").text
    for split in ("train", "eval"):
        audit = run.audit(split)
        histogram = audit["length"]["histogram"]
        for i, count in enumerate(histogram["documents"]):
            first, width = histogram["first"] + i * histogram["width"], histogram["width"]
            assert f"{cell(first)} to {cell(first + width - 1)} {cell(count)} " in page
        for number in (audit["rows_read"], audit["tokens"], audit["supervised_tokens"]):
            assert f" {cell(number)} " in page
    train = run.audit()
    assert train["rows_read"] == 24 + 2 + 1234
    for source in train["sources"]:
        cells = [source["name"], *(source[name] for name in source_columns()[:-1]), "messages"]
        assert " ".join(map(cell, cells)) in page
    for reason, count in train["rejected"].items():
        assert f"{reason} {count} " in page
    for line in (25, 26):
        assert f"{run.train}:{line}" in page


@pytest.mark.parametrize("damaged", [False, True])
def test_who_comes_second_keeps_what_is_there(run, monkeypatch, damaged):
    """Two processes that prepare the same at once, on a file system without locks."""
    publish = SplitWriter.publish
    quicker = []

    def overtaken(self, audit):
        if not quicker:
            quicker.append(True)
            there = run.folder / "elsewhere"
            prepare(run.settings(), there)
            for split in there.glob("*-*"):
                shutil.copytree(split, run.data / split.name)
                if damaged:
                    (run.data / split.name / "ids.npy").write_bytes(b"")
        publish(self, audit)

    monkeypatch.setattr(SplitWriter, "publish", overtaken)
    index = run.prepare()
    assert quicker
    assert len(open_split(index.train)) == 24
    assert len(open_split(index.eval)) == 6
    names = {path.name for path in run.data.iterdir()}
    splits_there = {f"train-{index.train.key}", f"eval-{index.eval.key}"}
    assert names == {*splits_there, "index.json", "audit.json", "rejects.jsonl"}


def test_two_at_once_are_both_right(run):
    command = [sys.executable, "-c", AT_ONCE, run.settings().model_dump_json(), str(run.data)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1] == b"24 6\n"
    assert not [path for path in run.data.iterdir() if path.name.endswith(".tmp")]


AT_ONCE = """
import sys
from pathlib import Path
from pipeline.config.settings import RunSettings
from pipeline.data.prepare.prepare import prepare
from pipeline.data.dataset.reader import open_split
index = prepare(RunSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
print(len(open_split(index.train)), len(open_split(index.eval)))
"""


@pytest.mark.parametrize("name", ["train-0123456789abcdef", "index.json.damaged"])
def test_what_a_dead_process_of_this_machine_has_left_is_removed(run, name):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    run.data.mkdir(parents=True)
    for pid in (dead.pid, os.getpid()):
        (run.data / f".{name}.{socket.gethostname()}-{pid}.tmp").write_text("")
    run.prepare()
    living = f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
    assert [path.name for path in run.data.glob(f".{name}.*")] == [living]


def test_another_machines_unfinished_work_is_left_alone(run):
    run.data.mkdir(parents=True)
    theirs = run.data / f".train-{'0' * 16}.other-host-17.tmp"
    theirs.mkdir()
    (theirs / "ids.npy").write_bytes(b"x")
    run.prepare()
    assert theirs.is_dir()
    for path in (theirs / "ids.npy", theirs):
        os.utime(path, (0, 0))
    run.prepare()
    assert not theirs.exists()


@pytest.mark.parametrize("how", ["appended", "replaced", "removed", "tokenizer"])
def test_a_file_that_changes_while_it_is_read_is_not_taken_for_what_was_hashed(
    run, monkeypatch, how
):
    first = run.prepare()
    text = run.train.read_text()
    run.append(row("new"))
    make = splits.Making.run

    def changing(self, processes):
        make(self, processes)
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
        patch.setattr(splits.Making, "run", changing)
        with pytest.raises(UserError, match=r"(train.jsonl|tokenizer.json): changed while it was"):
            run.prepare()
    assert DataIndex.load(run.data) == first
    if how != "tokenizer":
        run.train.write_text(text)
        os.utime(run.train, (0, 0))
        assert run.prepare() == first


def test_a_new_name_or_mode_of_a_file_is_no_change(run, monkeypatch):
    make = splits.Making.run

    def touching(self, processes):
        make(self, processes)
        run.train.chmod(0o600)
        os.link(run.train, run.folder / f"link-{len(list(run.folder.iterdir()))}")

    monkeypatch.setattr(splits.Making, "run", touching)
    assert run.prepare().train.documents == 24


def test_large_files_are_hashed_once_until_they_change(run, monkeypatch):
    hashed = []
    digest = hashlib.file_digest

    def counting(stream, name):
        hashed.append(Path(stream.name))
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    monkeypatch.setattr(keys, "_REMEMBERED_BYTES", 1)
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
