"""The start table of docs/reliability.md, row by row."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.settings import RunSettings, settings_with
from pipeline.data.prepare.prepare import prepare_data, train_key
from pipeline.model.fingerprint import record_base_of_run
from pipeline.train.context import requeued_settings
from pipeline.train.folder import open_run
from pipeline.train.names import FILES, FOLDERS
from pipeline.train.owner import identity
from pipeline.train.start import STARTS, decide_start
from pipeline.train.status import is_alive, read_status
from tests.messages import refused
from tests.tiny import CHATML, make_plan

pytestmark = pytest.mark.unit

ACCEPTED = {"epochs": 2, "accept_changes": ["total_steps"]}
OTHER = {"lr": 0.5}
REFUSED = None


@pytest.fixture
def begin(tmp_path, tiny_model):
    """The folder, and a function that starts a run in it: settings -> start."""
    folder = tmp_path / "run"

    def start(is_debug: bool = False, **settings) -> str:
        plan = make_plan(tiny_model, **settings)
        decided = decide_start(folder, plan, is_debug=is_debug)
        open_run(folder, plan, decided, is_debug=is_debug)
        return decided

    return folder, start


def leave(folder: Path, state: str, *, adapter: bool = True, checkpoint: bool = True) -> None:
    """Files of an earlier start, in addition to those of open_run."""
    fields = {"state": state, "host": "elsewhere", "heartbeat": 0, "pids": [1]}
    (folder / "status.json").write_text(json.dumps(fields))
    if checkpoint:
        (folder / "checkpoints/step-00000009").mkdir(parents=True, exist_ok=True)
    if adapter:
        (folder / "adapter").mkdir(exist_ok=True)


def has_results(folder: Path) -> bool:
    return (folder / "checkpoints/step-00000009").exists() or (folder / "adapter").exists()


# Found -> how to leave a folder like that.
FOUND = {
    "no run": lambda folder, start: None,
    "no progress": lambda folder, start: (
        start(),
        leave(folder, "failed", adapter=False, checkpoint=False),
    ),
    "unfinished": lambda folder, start: (start(), leave(folder, "stopped", adapter=False)),
    "done": lambda folder, start: (start(), leave(folder, "done")),
    "done, adapter missing": lambda folder, start: (start(), leave(folder, "done", adapter=False)),
}
OVERWRITE, NEVER = {"overwrite": True}, {"resume": "never"}
ROWS = [
    # found, changed settings, start
    *(("no run", change, "new") for change in ({}, ACCEPTED, OTHER, OVERWRITE, NEVER)),
    *(("no progress", change, "new") for change in ({}, ACCEPTED, OTHER, OVERWRITE, NEVER)),
    ("unfinished", {}, "resume"),
    ("unfinished", ACCEPTED, "resume"),
    ("unfinished", OTHER, REFUSED),
    ("unfinished", OVERWRITE, "resume"),
    ("unfinished", OTHER | OVERWRITE, "new"),
    ("unfinished", NEVER, "new"),
    ("unfinished", OTHER | NEVER, REFUSED),
    ("done", {}, "done"),
    ("done", ACCEPTED, "resume"),
    ("done", OTHER, REFUSED),
    ("done", OVERWRITE, "done"),
    ("done", OTHER | OVERWRITE, "new"),
    ("done", NEVER, "done"),
    ("done", ACCEPTED | NEVER, REFUSED),
    ("done", OTHER | NEVER, REFUSED),
    ("done", NEVER | OVERWRITE, "new"),
    ("done, adapter missing", {}, "resume"),
    ("done, adapter missing", ACCEPTED, "resume"),
    ("done, adapter missing", OTHER, REFUSED),
    ("done, adapter missing", OTHER | OVERWRITE, "new"),
    ("done, adapter missing", NEVER, REFUSED),
    ("done, adapter missing", NEVER | OVERWRITE, "new"),
]


@pytest.mark.parametrize(("found", "settings", "expected"), ROWS)
def test_a_row_of_the_table(begin, found, settings, expected):
    folder, start = begin
    FOUND[found](folder, start)
    had_results = has_results(folder)
    if expected is REFUSED:
        with refused("output_dir", folder, "overwrite: true"):
            start(**settings)
    else:
        assert start(**settings) == expected
    assert has_results(folder) == (had_results and expected != "new")


def test_the_table_has_a_row_for_each_state_and_change():
    assert STARTS.keys() == FOUND.keys()
    changes = {"none": {}, "accepted": ACCEPTED, "other": OTHER}
    for found, starts in STARTS.items():
        for change, expected in starts.items():
            assert (found, changes[change], expected) in ROWS


def test_a_new_run_writes_its_settings_and_plan(begin):
    folder, start = begin
    assert start() == "new"
    assert {p.name for p in folder.iterdir()} == {"run.yaml", "plan.json", "ds_config.json"}


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_settings_that_do_not_decide_the_result_may_change(begin, state):
    folder, start = begin
    start()
    leave(folder, state)
    assert start(zero_stage=3, batch_size=2, logging_steps=1) == "resume"


@pytest.mark.parametrize("left", [{"adapter": True}, {"adapter": False}])
@pytest.mark.parametrize("settings", [{}, ACCEPTED])
def test_a_finished_run_without_a_checkpoint_is_not_trained_again(begin, left, settings):
    """It would begin at step 0 and replace the adapter."""
    folder, start = begin
    start()
    leave(folder, "done", checkpoint=False, **left)
    if left["adapter"] and not settings:
        assert start() == "done"
    else:
        with refused("output_dir", folder, "no checkpoint", "overwrite: true"):
            start(**settings)
    assert (folder / "adapter").exists() == left["adapter"]


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_a_linked_folder_is_cleared_behind_the_link_and_the_link_stays(begin, tmp_path, name):
    folder, start = begin
    other_disk = tmp_path / "other_disk"
    other_disk.mkdir()
    start()
    leave(folder, "done")
    (folder / name).rename(other_disk / name)
    (folder / name).symlink_to(other_disk / name)
    (other_disk / "someone_else").mkdir()
    assert start() == "done"
    assert start(**OTHER, overwrite=True) == "new"
    assert not has_results(folder)
    assert (folder / name).is_symlink()
    assert (other_disk / "someone_else").exists()


def test_only_what_a_run_wrote_is_removed(begin):
    folder, start = begin
    start()
    leave(folder, "done")
    kept = [folder / "keep.txt", folder / "checkpoints/step-00000009-keep"]
    removed = [".step-00000012.new", "step-00000006-skipped-1", "best-00000003"]
    for name in removed:
        (folder / "checkpoints" / name).mkdir()
    for path in kept:
        path.touch()
    assert start(**OTHER, overwrite=True) == "new"
    assert all(path.exists() for path in kept)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000009-keep"]


def test_an_error_that_hinders_clearing_is_an_error(begin, monkeypatch):
    from pipeline.errors import RankZeroError

    folder, start = begin
    start()
    leave(folder, "done")

    def refuse(path, **_):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(os, "rmdir", refuse)  # as for a file that is open on a network disk
    with refused("output_dir", folder, "Device or resource busy", error=RankZeroError):
        start(**OTHER, overwrite=True)
    assert read_status(folder / "status.json")["state"] == "failed"  # and no longer done


def test_a_kill_while_a_run_is_cleared_leaves_a_folder_that_starts(begin, monkeypatch):
    folder, start = begin
    start()
    leave(folder, "done")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.train.folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        start(**OTHER, overwrite=True)
    monkeypatch.undo()
    assert read_status(folder / "status.json")["state"] == "failed"
    assert start(**OTHER, overwrite=True) == "new"


def test_debug_replaces_a_debug_run(begin):
    folder, start = begin
    assert start(is_debug=True) == "new"
    leave(folder, "done")
    assert start(is_debug=True, lr=0.5) == "new"
    assert not has_results(folder)


def test_debug_starts_again_where_it_was_interrupted_before_it_wrote_its_plan(begin):
    folder, start = begin
    folder.mkdir()
    leave(folder, "failed", adapter=False, checkpoint=False)
    assert start(is_debug=True) == "new"


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_debug_replaces_no_other_run(begin, state):
    folder, start = begin
    start()
    leave(folder, state)
    for settings in ({}, {"overwrite": True}):
        with refused("output_dir", folder, "--debug"):
            start(is_debug=True, **settings)
    assert has_results(folder)


def test_a_checkpoint_of_the_run_that_would_be_replaced_cannot_be_resumed(begin, tmp_path):
    folder, start = begin
    start()
    leave(folder, "stopped")
    own = str(folder / "checkpoints/step-00000009")
    assert start(resume=own) == "resume"
    with refused("resume", own, "output_dir"):
        start(resume=own, lr=0.5, overwrite=True)
    assert (folder / "checkpoints/step-00000009").exists()


def test_resume_names_an_existing_checkpoint(begin, tmp_path):
    folder, start = begin
    with refused("resume", "alwyas", "auto", "must", "never", folder / "checkpoints/step-00000100"):
        start(resume="alwyas")
    (tmp_path / "other/checkpoints/step-00000004").mkdir(parents=True)
    assert start(resume=str(tmp_path / "other/checkpoints/step-00000004")) == "new"


@pytest.mark.parametrize("settings", [{}, {"lr": 0.5, "overwrite": True}])
def test_resume_must_starts_no_new_run_and_clears_nothing(begin, settings):
    folder, start = begin
    with refused("resume: must", folder, "resume: auto"):
        start(resume="must")
    start()
    leave(folder, "stopped", checkpoint=bool(settings), adapter=False)
    with refused("resume: must", folder):
        start(resume="must", **settings)
    assert has_results(folder) == bool(settings)


def test_another_adam_in_a_deepspeed_json_is_another_run(begin, tmp_path):
    folder, start = begin
    own = tmp_path / "ds.json"
    own.write_text('{"steps_per_print": 5}')
    start()
    leave(folder, "stopped")
    assert start(deepspeed_json=str(own)) == "resume"  # changes nothing of the result
    own.write_text('{"optimizer": {"params": {"betas": [0.9, 0.95]}}}')
    with refused("optimizer.params.betas: [0.9, 0.999] ->"):
        start(deepspeed_json=str(own))
    own.write_text('{"optimizer": {"params": {"weight_decay": 0.5}}}')
    with refused("weight_decay: 0.01 -> 0.5"):
        start(deepspeed_json=str(own))


def test_prepared_data_is_kept(begin):
    folder, start = begin
    (folder / "data").mkdir(parents=True)  # as launch/prepare.py leaves it
    (folder / "data/index.json").touch()
    assert start() == "new"
    assert (folder / "data/index.json").exists()


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(begin, monkeypatch):
    folder, start = begin
    start()
    leave(folder, "stopped", adapter=False)
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "checkpoints":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with refused(folder / "checkpoints", "Permission denied"):
        start()


@pytest.mark.parametrize("name", ["merged", "checkpoints", "notes.txt"])
def test_foreign_files_are_left_alone(begin, name):
    folder, start = begin
    (folder / name).mkdir(parents=True)
    with refused("output_dir", name):
        start(overwrite=True)


@pytest.mark.parametrize("damage", ["", "{", None])
def test_a_run_whose_status_is_lost_is_still_a_run(begin, damage):
    folder, start = begin
    start()
    leave(folder, "running")
    if damage is None:
        (folder / "status.json").unlink()
    else:
        (folder / "status.json").write_text(damage)
    with refused("lr: 0.001 -> 0.5"):
        start(lr=0.5)
    assert start() == "resume"
    assert has_results(folder)


def test_a_living_owner_is_left_alone(begin):
    folder, start = begin
    start()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        fields = {
            "state": "running", "started": time.time(), "heartbeat": 0,
            **identity(), "pids": [owner.pid],
        }  # fmt: skip
        (folder / "status.json").write_text(json.dumps(fields))
        for settings in ({}, {"overwrite": True, "lr": 0.5}):
            with refused(f"process {owner.pid}"):
                start(**settings)
        owner.kill()
    assert start() == "new"  # it had no progress


WRONG = {
    "a folder": lambda path: path.mkdir(),
    "a file": lambda path: path.touch(),
    "a link to a missing target": lambda path: path.symlink_to("/no/such/target"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*FILES, *FOLDERS, "stop", "data/audit.json"])
def test_an_entry_that_no_run_writes_under_this_name_is_refused(begin, name, wrong):
    if wrong == ("a folder" if name in FOLDERS else "a file"):
        return
    folder, start = begin
    start()
    leave(folder, "stopped")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    WRONG[wrong](path)
    with refused("output_dir", path):
        start(**OTHER, overwrite=True)
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["stop", "data", "logs"])
def test_files_that_may_be_there_before_a_run(begin, name):
    folder, start = begin
    folder.mkdir()
    (folder / name).touch() if name == "stop" else (folder / name).mkdir()
    assert start() == "new"
    assert (folder / name).exists()


def test_hidden_files_of_a_killed_start_are_not_foreign(begin):
    folder, start = begin
    folder.mkdir()
    for name in (".status.json.4711.tmp", ".owner.lock", ".nfs0001"):
        (folder / name).touch()
    assert start() == "new"


def test_a_run_is_alive_while_its_process_or_its_heartbeat_is():
    now = time.time()
    running = {"state": "running", "host": "other", "pids": [1], "started": now}
    assert is_alive(running | {"heartbeat": now - 5})
    assert not is_alive(running | {"heartbeat": now - 500})
    assert not is_alive(running | {"heartbeat": now, "state": "stopped"})
    # A later process with the same number is another one.
    later = identity() | {"pids": [os.getppid()], "started": 1.0, "heartbeat": now}
    assert not is_alive(running | later)


@pytest.mark.parametrize("state", ["stopped", "done"])
def test_a_change_is_accepted_by_its_own_word_only(begin, state):
    folder, start = begin
    start(epochs=1)
    leave(folder, state)
    with refused("epochs: 1", "accept_changes: [total_steps]"):
        start(epochs=2)
    with refused("epochs: 1"):
        start(epochs=2, accept_changes=["base", "data"])
    assert start(epochs=2, accept_changes=["total_steps"]) == "resume"
    assert has_results(folder)


def test_a_setting_that_an_older_version_did_not_have_is_no_change(begin):
    folder, start = begin
    start()
    leave(folder, "done")
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
    leave(folder, "stopped")
    changed = {key: OTHER_DOCUMENTS[key]}
    with refused(f"{key}: ", "accept_changes: [data]"):
        start(**changed)
    assert start(**changed, accept_changes=["data"]) == "resume"


def test_every_setting_of_the_documents_is_tried_here():
    assert OTHER_DOCUMENTS.keys() == settings_with("documents")


def test_limits_that_only_end_a_run_may_change(begin):
    folder, start = begin
    start()
    leave(folder, "done")
    assert start(on_bad_row="fail", max_rejected=0.5) == "done"


@pytest.mark.parametrize("selection", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_evaluation_settings_may_change_unless_they_select_the_adapter(begin, selection):
    folder, start = begin
    held_out = {"eval_data": "heldout.jsonl", "evaluation_strategy": "steps"}
    start(**held_out)
    leave(folder, "done")
    assert start(**held_out, eval_steps=7) == "done"
    assert start(**held_out | {"evaluation_strategy": "epoch"}) == "done"
    with refused(f"{next(iter(selection))}: "):
        start(**held_out, **selection)
    start(**held_out, **selection, overwrite=True)
    leave(folder, "done")
    with refused("eval_steps: ", "7"):
        start(**held_out, **selection, eval_steps=7)


def test_accept_changes_is_offered_only_where_it_covers_every_change(begin):
    folder, start = begin
    start()
    leave(folder, "stopped")
    with refused("lr: 0.001 -> 0.5") as caught:
        start(lr=0.5, epochs=2, accept_changes=["total_steps"])
    assert "epochs" not in str(caught.value)  # that change is accepted
    assert "with accept_changes" not in str(caught.value)


def test_a_requeued_job_resumes_the_run_that_it_started_itself(begin, monkeypatch):
    folder, start = begin
    start()
    leave(folder, "stopped")
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
    leave(folder, "stopped", adapter=False)
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
    leave(folder, "done")
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
    leave(folder, "done")
    assert decide_start(folder, make_plan(copy), is_debug=False) == "done"
    (weights,) = copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with refused("model", copy, "accept_changes: [base]"):
        decide_start(folder, make_plan(copy), is_debug=False)
