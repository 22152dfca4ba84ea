"""Starting in a folder: new, going on, nothing to do, or refused; and whose a folder is."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.settings import RunSettings, settings_with
from pipeline.errors import UserError
from pipeline.train.owner import OWNER, identity
from pipeline.train.start import as_requeued, look, open_run
from pipeline.train.status import RunStatus, end_for_dead_owner, is_alive, read_status
from tests.tiny import make_plan

pytestmark = pytest.mark.unit


@pytest.fixture
def begin(tmp_path, tiny_model):
    folder = tmp_path / "run"

    def start(is_debug: bool = False, **settings) -> str:
        plan = make_plan(tiny_model, **settings)
        found = look(folder, plan, is_debug=is_debug)
        open_run(folder, plan, found)
        return found

    return folder, start


def left(folder, state: str) -> None:
    """What an earlier start left, besides what open_run wrote."""
    fields = {"state": state, "host": "elsewhere", "heartbeat": 0, "pids": [1]}
    (folder / "status.json").write_text(json.dumps(fields))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/mine").touch()


def test_a_new_folder_gets_its_plan(begin):
    folder, start = begin
    assert start() == "new"
    assert {p.name for p in folder.iterdir()} == {"run.yaml", "plan.json", "ds_config.json"}


@pytest.mark.parametrize(("state", "expected"), [
    ("stopped", "resume"), ("failed", "resume"), ("running", "resume"), ("done", "done"),
])  # fmt: skip
def test_the_same_settings_go_on_or_are_done(begin, state, expected):
    folder, start = begin
    start()
    left(folder, state)
    assert start(zero_stage=3, batch_size=2, logging_steps=1) == expected  # none changes the result
    assert (folder / "checkpoints/mine").exists()


@pytest.mark.parametrize("state", ["stopped", "done"])
def test_other_settings_are_refused_unless_overwritten(begin, state):
    folder, start = begin
    start()
    left(folder, state)
    with pytest.raises(UserError, match=r"lr: 0\.001 -> 0\.5.*overwrite"):
        start(lr=0.5)
    assert (folder / "checkpoints/mine").exists()
    (folder / "keep.txt").touch()
    assert start(lr=0.5, overwrite=True) == "new"
    assert not (folder / "checkpoints").exists()
    assert (folder / "keep.txt").exists()  # not ours to remove


def test_another_adam_in_a_deepspeed_json_is_another_run(begin, tmp_path):
    folder, start = begin
    own = tmp_path / "ds.json"
    own.write_text('{"steps_per_print": 5}')
    start()
    left(folder, "stopped")
    assert start(deepspeed_json=str(own)) == "resume"  # changes nothing that comes out
    own.write_text('{"optimizer": {"params": {"betas": [0.9, 0.95]}}}')
    with pytest.raises(UserError, match=r"optimizer\.params\.betas: \[0\.9, 0\.999\] -> "):
        start(deepspeed_json=str(own))
    own.write_text('{"optimizer": {"params": {"weight_decay": 0.5}}}')
    with pytest.raises(UserError, match=r"weight_decay: 0\.01 -> 0\.5"):
        start(deepspeed_json=str(own))


def test_prepared_data_is_kept(begin):
    folder, start = begin
    (folder / "data").mkdir(parents=True)  # as launch/prepare.py leaves it
    (folder / "data/index.json").touch()
    assert start() == "new"
    assert (folder / "data/index.json").exists()


def test_resume_never_and_must(begin):
    folder, start = begin
    with pytest.raises(UserError, match="holds no run"):
        start(resume="must")
    start()
    left(folder, "stopped")
    assert start(resume="never") == "new"
    left(folder, "done")
    assert start(resume="never") == "done"
    assert start(resume="never", overwrite=True) == "new"
    assert not (folder / "checkpoints").exists()


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(begin, monkeypatch):
    folder, start = begin
    start()
    left(folder, "stopped")
    there = Path.iterdir

    def refuse(path):
        if path.name == "checkpoints":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return there(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"checkpoints cannot be read \(Permission denied\)"):
        start()


def test_a_debug_run_replaces_the_one_before(begin):
    folder, start = begin
    start()
    left(folder, "done")
    assert start(is_debug=True, lr=0.5) == "new"


def test_a_start_that_came_to_nothing_can_be_corrected(begin):
    folder, start = begin
    start()
    fields = {"state": "failed", "host": "here", "heartbeat": 0, "pids": [1]}
    (folder / "status.json").write_text(json.dumps(fields))
    assert start(lr=0.5) == "new"


def test_a_users_own_files_are_left_alone(begin):
    folder, start = begin
    (folder / "merged").mkdir(parents=True)
    with pytest.raises(UserError, match="holds merged and is not a run folder"):
        start(overwrite=True)


@pytest.mark.parametrize("damage", ["", "{", None])
def test_a_run_whose_status_was_lost_is_still_a_run(begin, damage):
    folder, start = begin
    start()
    left(folder, "running")
    if damage is None:
        (folder / "status.json").unlink()
    else:
        (folder / "status.json").write_text(damage)
    with pytest.raises(UserError, match="other settings"):
        start(lr=0.5)
    assert start() == "resume"
    assert (folder / "checkpoints/mine").exists()


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
            with pytest.raises(UserError, match=f"process {owner.pid}"):
                start(**settings)
        owner.kill()
    assert start() == "new"  # it had come to nothing


@pytest.mark.parametrize("name", ["stop", "data", "logs"])
def test_what_may_be_there_before_a_run(begin, name):
    folder, start = begin
    folder.mkdir()
    (folder / name).touch()
    assert start() == "new"
    assert (folder / name).exists()


def test_who_is_alive():
    now = time.time()
    running = {"state": "running", "host": "other", "pids": [1], "started": now}
    assert is_alive(running | {"heartbeat": now - 5})
    assert not is_alive(running | {"heartbeat": now - 500})
    assert not is_alive(running | {"heartbeat": now, "state": "stopped"})
    # A process that took the number over later is another one.
    later = identity() | {"pids": [os.getppid()], "started": 1.0, "heartbeat": now}
    assert not is_alive(running | later)


def test_status_is_replaced_whole_and_says_how_it_ended(tmp_path):
    status = RunStatus(tmp_path / "status.json")
    status.own()
    status.claim({"step": 0, "total_steps": 9})
    status.update(step=3)
    found = read_status(tmp_path / "status.json")
    assert (found["state"], found["step"], found["total_steps"]) == ("running", 3, 9)
    status.end("stopped", 75, "time_limit")
    found = read_status(tmp_path / "status.json")
    assert (found["state"], found["exit_code"], found["reason"]) == ("stopped", 75, "time_limit")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("state", ["stopped", "done"])
def test_a_change_that_is_accepted_by_name_goes_on(begin, state):
    folder, start = begin
    start(epochs=1)
    left(folder, state)
    with pytest.raises(UserError, match=r"epochs: 1 -> 2; .*accept_changes: \[total_steps\]"):
        start(epochs=2)
    with pytest.raises(UserError, match="epochs: 1 -> 2"):
        start(epochs=2, accept_changes=["base", "data"])
    assert start(epochs=2, accept_changes=["total_steps"]) == "resume"
    assert (folder / "checkpoints/mine").exists()


OTHER_DOCUMENTS = {
    "chat_template": "chatml",
    "columns": {"prompt": "question"},
    "data_format": "text",
    "max_length": 77,
    "over_length": "drop",
    "packing": True,
    "split_turns": True,
    "train_on": "last-assistant",
}


def test_all_that_documents_are_made_from_can_be_accepted_by_name(begin):
    folder, start = begin
    start()
    left(folder, "stopped")
    assert OTHER_DOCUMENTS.keys() == settings_with("documents")
    for key, value in OTHER_DOCUMENTS.items():
        with pytest.raises(UserError, match=rf"{key}: .*accept_changes: \[data\]"):
            start(**{key: value})
        assert start(**{key: value}, accept_changes=["data"]) == "resume"
        assert start(accept_changes=["data"]) == "resume"


def test_what_only_says_when_to_give_up_is_free(begin):
    folder, start = begin
    start()
    left(folder, "done")
    assert start(on_bad_row="fail", max_rejected=0.5) == "done"


@pytest.mark.parametrize("choice", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_evaluation_is_free_unless_it_chooses(begin, choice):
    folder, start = begin
    held_out = {"eval_data": "heldout.jsonl", "evaluation_strategy": "steps"}
    start(**held_out)
    left(folder, "done")
    assert start(**held_out, eval_steps=7) == "done"
    assert start(**held_out | {"evaluation_strategy": "epoch"}) == "done"
    with pytest.raises(UserError, match=f"{next(iter(choice))}: "):
        start(**held_out, **choice)
    start(**held_out, **choice, overwrite=True)
    left(folder, "done")
    with pytest.raises(UserError, match="eval_steps: 100 -> 7"):
        start(**held_out, **choice, eval_steps=7)


def test_what_no_word_covers_is_not_offered(begin):
    folder, start = begin
    start()
    left(folder, "stopped")
    with pytest.raises(UserError, match=r"lr: ") as caught:
        start(lr=0.5, epochs=2, accept_changes=["total_steps"])
    assert "epochs" not in str(caught.value)  # that is accepted
    assert "go on with accept_changes" not in str(caught.value)


def test_resume_names_a_checkpoint(begin, tmp_path):
    folder, start = begin
    with pytest.raises(UserError, match="resume: alwyas is not auto, must, never or the folder"):
        start(resume="alwyas")
    (tmp_path / "other/checkpoints/step-00000004").mkdir(parents=True)
    assert start(resume=str(tmp_path / "other/checkpoints/step-00000004")) == "new"
    left(folder, "stopped")
    (folder / "checkpoints/step-00000002").mkdir()
    own = str(folder / "checkpoints/step-00000002")
    assert start(resume=own) == "resume"
    with pytest.raises(UserError, match="is of the run that a new one here would replace"):
        start(resume=own, lr=0.5, overwrite=True)
    assert (folder / "checkpoints/step-00000002").exists()


def test_a_survivor_ends_the_status_of_a_dead_owner_alone(tmp_path):
    path = tmp_path / "status.json"
    mine = identity() | {"state": "running", "started": time.time(), "step": 4}
    path.write_text(json.dumps(mine | {"pids": [os.getppid()]}))
    end_for_dead_owner(path, "rank 0 ended")
    assert read_status(path)["state"] == "running"  # it lives
    path.write_text(json.dumps(mine | {"pids": [2**22 + 1]}))
    (tmp_path / OWNER).write_text(path.read_text())
    end_for_dead_owner(path, "rank 0 ended")
    found = read_status(path)
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 1, 4)
    assert found["reason"] == "rank 0 ended"
    assert not (tmp_path / OWNER).exists()  # another machine may start at once


def test_of_a_dead_owner_elsewhere_a_heartbeat_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    said = identity() | {"machine": "another", "state": "running", "heartbeat": time.time()}
    path.write_text(json.dumps(said))
    beat = lambda _: path.write_text(json.dumps(said | {"heartbeat": time.time() + 1}))  # noqa: E731
    monkeypatch.setattr("pipeline.train.status.time.sleep", beat)
    end_for_dead_owner(path, "rank 0 ended")
    assert read_status(path)["state"] == "running"
    monkeypatch.setattr("pipeline.train.status.time.sleep", lambda _: None)
    end_for_dead_owner(path, "rank 0 ended")
    assert read_status(path)["state"] == "failed"


def test_a_kill_while_a_run_is_removed_leaves_a_folder_to_go_on_in(begin, monkeypatch):
    folder, start = begin
    start()
    left(folder, "done")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.train.start.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        start(lr=0.5, overwrite=True)
    monkeypatch.undo()
    assert read_status(folder / "status.json")["state"] == "failed"
    assert start(lr=0.5, overwrite=True) == "new"


def test_what_a_kill_left_hidden_is_no_stranger(begin):
    folder, start = begin
    folder.mkdir()
    for name in (".status.json.4711.tmp", ".owner.lock", ".nfs0001"):
        (folder / name).touch()
    assert start() == "new"


def test_a_requeued_job_goes_on_with_what_it_began_anew(begin, monkeypatch):
    folder, start = begin
    start()
    left(folder, "stopped")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert start(resume="never") == "new"
    left(folder, "stopped")
    never = RunSettings(model="m", train_data="t", output_dir=str(folder), resume="never")
    for job, count, resume in (("7", "1", "auto"), ("7", "0", "never"), ("8", "1", "never")):
        env = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": count}
        assert as_requeued(never, env).resume == resume
