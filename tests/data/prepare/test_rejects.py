"""Rejected rows: each is listed in rejects.jsonl, and a source with too many of them is refused.

`max_rejected` is the largest allowed share of bad rows in a source.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare import prepare as module
from pipeline.data.prepare.prepare import check_first_rows, check_rows, eval_examples, prepare_data
from tests import ROOT
from tests.data.prepare.preparation import content, documents_of, row, write_lines
from tests.messages import assert_mentions, refused
from tests.tiny import CHATML

pytestmark = pytest.mark.tensor


# Functions that refuse bad rows, by name.
CHECKS = {
    "check_rows": lambda run, settings: check_rows(settings),
    "check_first_rows": lambda run, settings: check_first_rows(settings),
    "prepare": lambda run, settings: prepare_data(settings, run.data),
}
# Seven bad rows with four reasons; they follow the 24 rows of the fixture `run`.
BAD = ["{", "[]", "[]", row(" "), row(" "), row(" "), '{"note": "t"}']


def expected_facts(run):
    """Facts that a message about the 7 bad rows of 31 must have."""
    places = [f"{run.train}:25", f"{run.train}:26", f"{run.train}:28"]
    return [*places, "train_data", "7 of 31 rows", "22.6 %", "max_rejected to 0.226"]


def test_more_bad_rows_than_allowed_are_refused_before_tokenising(run):
    run.append(*BAD)
    with refused(*expected_facts(run)):
        check_rows(run.settings(max_rejected=0.2))
    assert not run.data.exists()
    check_rows(run.settings(max_rejected=0.226))


def test_more_bad_rows_than_allowed_are_refused_by_prepare(run):
    run.append(*BAD)
    with refused(*expected_facts(run), run.data / "rejects.jsonl"):
        run.prepare(max_rejected=0.2)
    assert [path.name for path in run.data.iterdir()] == ["rejects.jsonl"]
    run.prepare(max_rejected=0.226)


def test_max_rejected_applies_to_each_source(run):
    """A small bad source is refused although a large one is good, and all bad sources are named."""
    small, other = run.folder / "small.jsonl", run.folder / "other.jsonl"
    write_lines(small, [row("good"), *['{"sum": 3}'] * 2])
    write_lines(other, [row("good"), "["])
    write_lines(run.train, [row(f"answer {i}") for i in range(500)])
    values = {"train_data": [str(run.train), str(small), str(other)], "max_rejected": 0.1}
    for check in (lambda: check_rows(run.settings(**values)), lambda: run.prepare(**values)):
        with refused(small, f"{small}:2", "2 of 3 rows", other, f"{other}:2", "1 of 2 rows"):
            check()
    run.prepare(**values | {"max_rejected": 0.7})


REFUSED_LINES = [1, *range(26, 31)]


def add_bad_rows(run):
    """Add a bad first row and five bad last rows."""
    write_lines(run.train, ["{", *run.train.read_text().splitlines(), *["[]"] * 5])


@pytest.mark.parametrize("check", ["check_first_rows", "prepare"])
def test_all_rows_of_a_refusal_are_named_and_the_earlier_data_stays(run, monkeypatch, check):
    monkeypatch.setattr(module, "_FIRST_ROWS", 2)
    first = run.prepare()
    before = content(run.data)
    good = run.train.read_text()
    add_bad_rows(run)
    with refused(run.data / "rejects.jsonl"):
        CHECKS[check](run, run.settings())
    assert [reject["line"] for reject in run.rejects()] == REFUSED_LINES
    assert DataIndex.load(run.data) == first
    run.train.write_text(good)
    run.prepare(max_rejected=1.0)
    assert content(run.data) == before


def test_all_rows_of_a_refusal_of_prepared_data_are_named(run):
    add_bad_rows(run)
    first = run.prepare(max_rejected=1.0)
    before = content(run.data)
    (run.data / "rejects.jsonl").write_text("")  # of an earlier refusal
    with refused(run.data / "rejects.jsonl"):
        run.prepare()
    assert [reject["line"] for reject in run.rejects()] == REFUSED_LINES
    assert DataIndex.load(run.data) == first
    run.prepare(max_rejected=1.0)
    assert content(run.data) == before


def test_exactly_as_many_bad_rows_as_allowed_are_accepted(run):
    check_rows(run.settings(max_rejected=0.0))
    run.train.write_text("{\n" + 3 * f"{row('good')}\n")
    check_rows(run.settings(max_rejected=0.25))
    assert run.prepare(max_rejected=0.25).train.documents == 3


def test_max_rejected_applies_to_eval_data_separately(run):
    run.eval.write_text(run.eval.read_text() + "{\n")
    with refused("eval_data", run.eval, "1 of 7 rows"):
        check_rows(run.settings())
    with refused("eval_data", run.eval, "1 of 7 rows"):
        run.prepare()
    assert [(reject["file"], reject["line"]) for reject in run.rejects()] == [(str(run.eval), 7)]


def test_a_stricter_max_rejected_applies_to_prepared_data(run):
    run.append("{")
    run.prepare(max_rejected=0.5)
    with refused(f"{run.train}:25", "1 of 25 rows"):
        run.prepare(max_rejected=0.01)


def settings_with_small_source(run, path):
    """Settings with a second source of little weight, whose rows may all be bad or dropped."""
    sources = [str(run.train), {"path": str(path), "weight": 0.1}]
    return run.settings(train_data=sources, max_rejected=1.0, over_length="drop", max_length=200)


@pytest.mark.parametrize("check", CHECKS)
def test_a_source_of_bad_rows_only_is_refused_even_if_small(run, monkeypatch, check):
    monkeypatch.setattr(module, "_FIRST_ROWS", 2)
    path = run.folder / "other.jsonl"
    write_lines(path, ['{"sum": 3}'] * 3)
    settings = settings_with_small_source(run, path)
    with refused("train_data", path, f"{path}:1"):
        CHECKS[check](run, settings)
    write_lines(path, [*['{"sum": 3}'] * 3, row("good")])
    CHECKS[check](run, settings)
    prepare_data(settings, run.data, 4)  # not all of its rows are read


def test_a_source_of_dropped_rows_only_is_refused_even_if_small(run):
    path = run.folder / "other.jsonl"
    write_lines(path, [row("long " * 99)] * 3)
    settings = settings_with_small_source(run, path)
    with refused("train_data", path, "max_length"):
        prepare_data(settings, run.data)
    write_lines(path, [*[row("long " * 99)] * 3, row("good")])
    prepare_data(settings, run.data)
    prepare_data(settings, run.data, 4)  # not all of its rows are read


def test_data_without_a_usable_row_is_refused_even_if_max_rejected_is_1(run):
    run.train.write_text("{\n{\n")
    with refused("no usable row", run.train):
        check_rows(run.settings(max_rejected=1.0))
    with refused("no usable row", run.train):
        run.prepare(limit=4)
    assert not list(run.data.iterdir())  # with a limit, no rejects are written
    run.train.write_text("\n\n")
    with refused(run.train):
        check_rows(run.settings())


@pytest.mark.parametrize("check", CHECKS)
def test_each_reason_is_given_once_with_its_first_row_and_number_of_rows(run, check):
    write_lines(run.train, ['{"question": "a", "answer": "b"}'] * 7)
    with refused(
        "7 of 7 rows",
        f"{run.train}:1 and 6 other rows",
        "columns: {instruction: question, output: answer}",
    ) as caught:
        CHECKS[check](run, run.settings())
    assert str(caught.value).count("no known format") == 1


def test_the_path_of_rejects_jsonl_is_not_part_of_a_reason(run):
    write_lines(run.train, ["{", row(" ")])
    with refused(run.data / "rejects.jsonl", "2 of 2 rows") as caught:
        prepare_data(run.settings(), run.data)
    reasons = [line for line in str(caught.value).splitlines() if line.startswith(f"{run.train}:")]
    assert len(reasons) == 2
    assert not any("rejects.jsonl" in line for line in reasons)


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


def test_max_rejected_is_a_share_of_both_splits_of_a_source(run):
    write_lines(run.train, [*(row(f"a {i}") for i in range(99)), "{"])
    run.prepare(eval_data=0.1, max_rejected=0.01)
    assert sum(run.audit()["rejected"].values()) == 1
    assert run.audit("eval")["rejected"] == {}
    assert run.audit()["rows_read"] + run.audit("eval")["rows_read"] == 100
    with refused("1 of 100 rows"):
        run.prepare(eval_data=0.1, max_rejected=0.009)


@pytest.mark.parametrize("check", ["check_rows", "prepare"])
def test_on_bad_row_fail_refuses_at_the_first_bad_row(run, check):
    run.append("{", "[]")
    settings = run.settings(on_bad_row="fail", max_rejected=1.0)
    with refused(f"{run.train}:25", "on_bad_row"):
        CHECKS[check](run, settings)


@pytest.mark.parametrize("eval_data", [None, 0.3])
def test_on_bad_row_fail_applies_to_prepared_data(run, eval_data):
    """Only prepare finds a row that the template refuses."""
    refusal = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}"
    (run.folder / "model" / "chat_template.jinja").write_text(
        f"{refusal}{{% endif %}}{{% endfor %}}{CHATML}"
    )
    long = row("long " * 99)
    run.append(long, row("no"), row("no", question="again"))
    values = {"max_rejected": 1.0, "over_length": "drop", "max_length": 200, "eval_data": eval_data}
    run.prepare(**values)
    with refused(run.train, "on_bad_row"):
        run.prepare(on_bad_row="fail", **values)
    write_lines(run.train, [*(row(f"a {i}") for i in range(20)), long])
    run.prepare(**values)
    run.prepare(on_bad_row="fail", **values)  # a dropped row is not a bad row


def test_a_source_with_bad_first_rows_is_checked_completely(run, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_ROWS", 10)
    write_lines(run.train, ["{"] * 3 + [row(f"a {i}") for i in range(297)])
    check_first_rows(run.settings(max_rejected=0.01))  # 3 of 10, but no more than 3 of 300
    with refused("3 of 300 rows"):
        check_first_rows(run.settings(max_rejected=0.009))
    write_lines(run.train, [*(row(f"a {i}") for i in range(30)), *["{"] * 30])
    check_first_rows(run.settings(max_rejected=0.01))  # the bad rows are later
    with refused("30 of 60 rows"):
        run.prepare(max_rejected=0.01)


def test_a_bad_row_of_a_file_with_a_non_utf8_name_is_rejected(run):
    folder = run.folder / "rows"
    folder.mkdir()
    name = os.fsdecode(b"\xffrows.jsonl")
    write_lines(folder / name, [row("a"), "{", row("b")])
    write_lines(folder / "other.jsonl", ["{", row("c")])
    run.prepare(train_data=str(folder), max_rejected=0.5)
    assert [(Path(reject["file"]).name, reject["line"]) for reject in run.rejects()] == [
        ("other.jsonl", 1),
        (name, 2),
    ]
    (source,) = run.audit()["sources"]
    assert list(source["files"].values()) == [2, 3]


def test_files_that_a_folder_leaves_out_are_logged(run, caplog):
    folder = run.folder / "rows"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        write_lines(folder / name, [row("a"), row("b")])
    with caplog.at_level("INFO", "pipeline"):
        run.prepare(train_data=str(folder))
    assert run.audit()["rows_read"] == 2
    assert_mentions(caplog.text, folder, "test.jsonl")


def test_rows_held_out_of_a_folder_are_rows_of_its_training_files(run):
    folder = run.folder / "rows"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        write_lines(folder / name, [row(f"{name} {i}") for i in range(40)])
    settings = run.settings(train_data=str(folder), eval_data=0.25)
    index = prepare_data(settings, run.data)
    examples = list(eval_examples(settings, index.eval))
    assert len(examples) == index.eval.documents > 0
    assert all(example.messages[1].content.startswith("train") for example in examples)


def test_a_token_without_embedding_refuses_the_row_before_it_is_trained(run):
    """An id beyond the embeddings is an IndexError on a CPU and an assertion on a GPU."""
    config = run.folder / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"vocab_size": values["vocab_size"] - 1}))
    last = values["vocab_size"] - 1  # the byte of this token is the second of "í"
    lines = [row("í"), *(json.dumps({"input_ids": [5, i], "labels": [5, i]}) for i in (last, 6))]
    write_lines(run.train, lines)
    assert len(documents_of(run.prepare(max_rejected=0.7).train)) == 1
    text, ids = (reject["reason"] for reject in run.rejects())
    assert_mentions(text, last, "embeddings", "new_tokens")
    assert_mentions(ids, "`input_ids`", f"the model's {last} tokens")
