"""Which changes of settings and data a run in the folder accepts when it is started again."""

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
def test_a_change_is_accepted_only_by_its_own_word_of_accept_changes(begin, state):
    folder, start = begin
    start(epochs=1)
    leave_files(folder, state)
    with refused("epochs: 1", "accept_changes: [total_steps]"):
        start(epochs=2)
    with refused("epochs: 1"):
        start(epochs=2, accept_changes=["base", "data"])
    assert start(epochs=2, accept_changes=["total_steps"]) == "resume"
    assert has_results(folder)


def test_a_setting_that_an_older_version_did_not_have_is_no_change(begin):
    folder, start = begin
    start()
    leave_files(folder, "done")
    text = (folder / "run.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("min_lr_ratio", "seed"))]
    (folder / "run.yaml").write_text("\n".join(lines))
    assert start() == "done"
    with refused("min_lr_ratio: 0.0 -> 0.5"):
        start(min_lr_ratio=0.5)


OTHER_DOCUMENTS = {
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


@pytest.mark.parametrize("key", OTHER_DOCUMENTS)
def test_settings_of_the_documents_are_accepted_as_data(begin, key):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    changed = {key: OTHER_DOCUMENTS[key]}
    with refused(f"{key}: ", "accept_changes: [data]"):
        start(**changed)
    assert start(**changed, accept_changes=["data"]) == "resume"


def test_every_setting_of_the_documents_is_tried_here():
    assert OTHER_DOCUMENTS.keys() == settings_with_change("documents")


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
    with refused(f"{next(iter(selection))}: "):
        start(**held_out, **selection)
    start(**held_out, **selection, overwrite=True)
    leave_files(folder, "done")
    with refused("eval_steps: ", "7"):
        start(**held_out, **selection, eval_steps=7)


def test_accept_changes_is_offered_only_where_it_covers_every_change(begin):
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
    for job, count, resume in (("7", "1", "auto"), ("7", "0", "never"), ("8", "1", "never")):
        env = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": count}
        assert requeued_settings(never, env).resume == resume


def test_the_same_rows_by_another_path_are_the_same_run(begin, tmp_path, tiny_model):
    folder, start = begin
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for name, text in zip(names, ("x", "x", "y"), strict=True):
        Path(name).write_text(f'{{"text": "{text}"}}\n')
    start(train_data=names[0])
    leave_files(folder, "stopped", adapter=False)
    key = train_key(make_plan(tiny_model, train_data=names[0]).settings)
    state = folder / "checkpoints/step-00000009/state.json"
    state.write_text(json.dumps({"identity": {"data": key}}))
    assert start(train_data=names[1]) == "resume"
    with refused("train_data", "accept_changes: [data]"):
        start(train_data=names[2])


def test_held_out_rows_and_a_template_by_another_path_are_no_change(begin, tmp_path, tiny_model):
    folder, start = begin
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("train", "a", "b", "other")}
    for name, path in rows.items():
        path.write_text(f'{{"text": "{"a" if name == "b" else name}"}}\n')
    for name in ("x.jinja", "y.jinja"):
        (tmp_path / name).write_text(CHATML)
    same = {"train_data": str(rows["train"]), "chat_template": str(tmp_path / "x.jinja")}
    start(eval_data=str(rows["a"]), **same)
    leave_files(folder, "done")
    settings = make_plan(tiny_model, eval_data=str(rows["a"]), **same).settings
    prepare_data(settings, folder / "data")
    assert start(eval_data=str(rows["b"]), **same) == "done"
    with refused("eval_data", rows["other"]):
        start(eval_data=str(rows["other"]), **same)
    moved = same | {"chat_template": str(tmp_path / "y.jinja")}
    assert start(eval_data=str(rows["b"]), **moved) == "done"
    (tmp_path / "y.jinja").write_text(CHATML + " ")
    with refused("chat_template"):
        start(eval_data=str(rows["b"]), **moved)


def test_the_same_base_by_another_path_is_no_change(tmp_path, tiny_model):
    folder, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    plan = make_plan(tiny_model)
    open_run(folder, plan, decide_start(folder, plan, is_debug=False), is_debug=False)
    record_base_of_run(folder, tiny_model)
    leave_files(folder, "done")
    assert decide_start(folder, make_plan(copy), is_debug=False) == "done"
    (weights,) = copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with refused("model", copy, "accept_changes: [base]"):
        decide_start(folder, make_plan(copy), is_debug=False)
