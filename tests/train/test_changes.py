"""Changed settings and data at a later start in a run folder: accepted, or refused with the key."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.settings import RunSettings, settings_with_change
from pipeline.data.prepare.prepare import prepare_data, train_key
from pipeline.model.fingerprint import record_base_of_run
from pipeline.train.context import requeued_settings
from pipeline.train.folder import open_run
from pipeline.train.start import decide_start
from tests.messages import refused
from tests.tiny import CHATML, make_plan
from tests.train.starts import has_results, leave_files

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("state", ["stopped", "done"])
def test_a_change_of_epochs_is_accepted_only_by_total_steps_in_accept_changes(begin, state):
    folder, start = begin
    start(epochs=1)
    leave_files(folder, state)
    with refused("epochs: 1", "accept_changes: [total_steps]"):
        start(epochs=2)
    with refused("epochs: 1"):
        start(epochs=2, accept_changes=["base", "data"])
    assert start(epochs=2, accept_changes=["total_steps"]) == "resume"
    assert has_results(folder)


def test_a_setting_that_is_missing_in_the_old_run_yaml_counts_as_its_default(begin):
    """An older version did not have the setting."""
    folder, start = begin
    start()
    leave_files(folder, "done")
    text = (folder / "run.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("min_lr_ratio", "seed"))]
    (folder / "run.yaml").write_text("\n".join(lines))
    assert start() == "done"
    with refused("min_lr_ratio: 0.0 -> 0.5"):
        start(min_lr_ratio=0.5)


# Settings that decide the tokens of the documents, with values other than those of make_plan.
CHANGED_DOCUMENTS = {
    "chat_template": "chatml",
    "columns": {"prompt": "question"},
    "data_format": "text",
    "max_length": 77,
    "over_length": "drop",
    "packing": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "special_tokens_in_text": "reject",
    "split_turns": True,
    "train_on_reasoning": False,
    "train_on": "last-assistant",
}


@pytest.mark.parametrize("key", CHANGED_DOCUMENTS)
def test_a_change_of_the_documents_is_accepted_by_data_in_accept_changes(begin, key):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    changed = {key: CHANGED_DOCUMENTS[key]}
    with refused(f"{key}: ", "accept_changes: [data]"):
        start(**changed)
    assert start(**changed, accept_changes=["data"]) == "resume"


def test_every_setting_of_the_documents_is_in_this_test():
    assert CHANGED_DOCUMENTS.keys() == settings_with_change("documents")


def test_limits_on_bad_rows_may_change_after_the_run(begin):
    folder, start = begin
    start()
    leave_files(folder, "done")
    assert start(on_bad_row="fail", max_rejected=0.5) == "done"


@pytest.mark.parametrize("selection", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_evaluation_settings_may_change_unless_they_select_the_adapter(begin, selection):
    folder, start = begin
    held_out = {"eval_data": "heldout.jsonl", "evaluation_strategy": "steps"}
    start(**held_out)
    leave_files(folder, "done")
    assert start(**held_out, eval_steps=7) == "done"
    assert start(**held_out | {"evaluation_strategy": "epoch"}) == "done"
    [selecting_key] = selection
    with refused(f"{selecting_key}: "):
        start(**held_out, **selection)
    start(**held_out, **selection, overwrite=True)
    leave_files(folder, "done")
    with refused("eval_steps: ", "7"):
        start(**held_out, **selection, eval_steps=7)


def test_accept_changes_is_suggested_only_if_it_accepts_every_change(begin):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    with refused("lr: 0.001 -> 0.5") as caught:
        start(lr=0.5, epochs=2, accept_changes=["total_steps"])
    assert "epochs" not in str(caught.value)  # that change is accepted
    assert "with accept_changes" not in str(caught.value)


def test_a_requeued_job_resumes_the_run_that_it_started_itself(begin, monkeypatch):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert start(resume="never") == "new"
    never = RunSettings(model="m", train_data="t", output_dir=str(folder), resume="never")
    # Job id, number of requeues of the job, and the value of `resume` that replaces `never`.
    for job, requeues, resume in (("7", "1", "auto"), ("7", "0", "never"), ("8", "1", "never")):
        env = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": requeues}
        assert requeued_settings(never, env).resume == resume


def write_text_row(path: Path, text: str) -> str:
    path.write_text(json.dumps({"text": text}) + "\n")
    return str(path)


def test_the_same_rows_by_another_path_are_the_same_run(begin, tmp_path, tiny_model):
    folder, start = begin
    rows = write_text_row(tmp_path / "rows.jsonl", "x")
    copy = write_text_row(tmp_path / "copy.jsonl", "x")
    other = write_text_row(tmp_path / "other.jsonl", "y")
    start(train_data=rows)
    leave_files(folder, "stopped", adapter=False)
    # The start compares the key of the rows with the one that the checkpoint recorded.
    key = train_key(make_plan(tiny_model, train_data=rows).settings)
    state = folder / "checkpoints/step-00000009/state.json"
    state.write_text(json.dumps({"identity": {"data": key}}))
    assert start(train_data=copy) == "resume"
    with refused("train_data", "accept_changes: [data]"):
        start(train_data=other)


def test_held_out_rows_and_a_template_by_another_path_are_not_a_change(begin, tmp_path, tiny_model):
    folder, start = begin
    train = write_text_row(tmp_path / "train.jsonl", "train")
    held_out = write_text_row(tmp_path / "held_out.jsonl", "held out")
    copy = write_text_row(tmp_path / "copy.jsonl", "held out")
    other = write_text_row(tmp_path / "other.jsonl", "other")
    template, copied_template = tmp_path / "template.jinja", tmp_path / "copy.jinja"
    for path in (template, copied_template):
        path.write_text(CHATML)
    unchanged = {"train_data": train, "chat_template": str(template)}
    start(eval_data=held_out, **unchanged)
    leave_files(folder, "done")
    settings = make_plan(tiny_model, eval_data=held_out, **unchanged).settings
    prepare_data(settings, folder / "data")
    assert start(eval_data=copy, **unchanged) == "done"
    with refused("eval_data", other):
        start(eval_data=other, **unchanged)
    moved = unchanged | {"chat_template": str(copied_template)}
    assert start(eval_data=copy, **moved) == "done"
    copied_template.write_text(CHATML + " ")
    with refused("chat_template"):
        start(eval_data=copy, **moved)


def test_the_same_base_by_another_path_is_not_a_change(tmp_path, tiny_model):
    folder, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    plan = make_plan(tiny_model)
    open_run(folder, plan, decide_start(folder, plan, is_debug=False), is_debug=False)
    record_base_of_run(folder, tiny_model)
    leave_files(folder, "done")
    assert decide_start(folder, make_plan(copy), is_debug=False) == "done"
    (weights,) = copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of the last weight
    weights.write_bytes(content)
    with refused("model", copy, "accept_changes: [base]"):
        decide_start(folder, make_plan(copy), is_debug=False)
