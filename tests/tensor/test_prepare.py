import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.settings import RunSettings
from pipeline.data import prepare as module
from pipeline.data.chat import encode, load_tokenizer
from pipeline.data.formats import to_example
from pipeline.data.prepare import check_rows, prepare
from pipeline.data.prepared import DataIndex, open_split
from pipeline.data.sources import read_rows, resolve
from pipeline.errors import UserError
from tests.tiny import CHATML, make_rows, make_tokenizer

ROOT = Path(__file__).parents[2]


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
    tokenizer = load_tokenizer(run.folder / "model")
    rows = list(read_rows(resolve(run.settings().train_sources, "train_data")))
    assert len(split) == len(rows) == 24
    for i, source in enumerate(rows):
        expected = encode(to_example(source), tokenizer, "assistant")
        ids, supervised = split.document(i)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected.ids[:100]
        assert supervised.dtype == np.bool_
        assert supervised.tolist() == expected.supervised[:100]
        assert split.lengths[i] == len(ids)
        assert split.supervised_counts[i] == supervised.sum() > 0
    assert split.lengths.dtype == split.supervised_counts.dtype == np.int64
    for outside in (-1, 24):
        with pytest.raises(IndexError):
            split.document(outside)


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

    monkeypatch.setattr(module, "load_tokenizer", fail)
    assert run.prepare() == first
    assert run.everything() == before


@pytest.mark.parametrize("change", ["data", "template", "max_length", "train_on", "limit"])
def test_the_key_is_made_of_all_that_makes_the_documents(run, change):
    first = run.prepare()
    if change == "data":
        run.append(row("new"))
    elif change == "template":
        template = run.folder / "model" / "chat_template.jinja"
        template.write_text("Hello. " + CHATML)
    changed = {"max_length": {"max_length": 99}, "train_on": {"train_on": "all"}}
    second = run.prepare(limit=3 if change == "limit" else None, **changed.get(change, {}))
    assert second.train.key != first.train.key
    assert (second.eval == first.eval) == (change == "data")
    folders = {path.name for path in run.data.iterdir() if path.is_dir()}
    assert folders == {f"train-{second.train.key}", f"eval-{second.eval.key}"}
    assert DataIndex.load(run.data) == second
    assert run.audit()["rows_used"] == second.train.documents
    assert run.audit("eval")["rows_used"] == second.eval.documents


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
        "from pipeline.data import prepare\n"
        "from pipeline.data.writing import SplitWriter\n"
        "add = SplitWriter.add\n"
        "def add_or_die(self, *given):\n"
        "    add(self, *given)\n"
        "    if len(self.lengths) == 20:\n"
        "        for column in self._columns.values():\n"
        "            column.stream.flush()\n"
        "        os._exit(9)\n"
        "SplitWriter.add = add_or_die\n"
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
    assert not run.data.exists() or not list(run.data.iterdir())
    judge(max_rejected=0.226)


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
    assert not list(run.data.iterdir())


def test_what_was_prepared_with_a_laxer_limit_is_judged_again(run):
    run.append("{")
    run.prepare(max_rejected=0.5)
    with pytest.raises(UserError, match=f"{run.train}:25: not valid JSON"):
        run.prepare(max_rejected=0.01)


def test_no_usable_row(run):
    run.train.write_text("{\n{\n")
    with pytest.raises(UserError, match="no usable row"):
        check_rows(run.settings(max_rejected=1.0))
    with pytest.raises(UserError, match="no usable row"):
        run.prepare(limit=4)
    run.train.write_text("\n\n")
    with pytest.raises(UserError, match="only blank lines"):
        check_rows(run.settings())


def test_checking_rows_needs_no_torch(run):
    code = (
        "import sys\n"
        "from pipeline.config.settings import RunSettings\n"
        "from pipeline.data.prepare import check_rows\n"
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
    middle = float(np.median(lengths))
    assert audit["length"] == {"min": lengths.min(), "median": middle, "max": 128}
    tokenizer = load_tokenizer(run.folder / "model")
    whole = len(tokenizer.apply_chat_template(json.loads(long)["messages"])["input_ids"])
    assert (audit["truncated_rows"], audit["tokens_lost"]) == (1, whole - 128)
    assert audit["duplicate_rows"] == 1
    assert run.audit("eval")["rows_also_in_train"] == 1


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
