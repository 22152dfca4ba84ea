"""A start in a run folder is new, a resume, nothing to do, or refused: docs/reliability.md.

STARTS is that table: state of the folder and change of the settings -> decision. The fixture
`begin` (conftest.py) is a run folder and a function that decides and opens a start in it, with
changed settings: ACCEPTED is a change that the setting accept_changes accepts, OTHER is not.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.train.names import FILES, FOLDERS
from pipeline.train.owner import identity
from pipeline.train.start import STARTS
from pipeline.train.status import is_alive, read_status
from tests.messages import refused
from tests.train.starts import ACCEPTED, OTHER, has_results, leave_files

pytestmark = pytest.mark.unit

REFUSED = None  # in place of a decision


def change_status(folder: Path, **fields) -> None:
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# State of the folder -> function that brings it into this state.
STATES = {
    "no run": lambda folder, start: None,
    "no progress": lambda folder, start: (
        start(),
        leave_files(folder, "failed", adapter=False, checkpoint=False),
    ),
    "checkpoints missing": lambda folder, start: (
        start(),
        leave_files(folder, "stopped", adapter=False, checkpoint=False),
        change_status(folder, saved_step=9),
    ),
    "unfinished": lambda folder, start: (start(), leave_files(folder, "stopped", adapter=False)),
    "done": lambda folder, start: (start(), leave_files(folder, "done")),
    "done, adapter missing": lambda folder, start: (
        start(),
        leave_files(folder, "done", adapter=False),
    ),
}
OVERWRITE, NEVER = {"overwrite": True}, {"resume": "never"}
ROWS = [
    # state of the folder, changed settings, start
    *(("no run", change, "new") for change in ({}, ACCEPTED, OTHER, OVERWRITE, NEVER)),
    *(("no progress", change, "new") for change in ({}, ACCEPTED, OTHER, OVERWRITE, NEVER)),
    *(("checkpoints missing", change, REFUSED) for change in ({}, ACCEPTED, OTHER)),
    *(("checkpoints missing", change, "new") for change in (NEVER, OTHER | NEVER, OVERWRITE)),
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


@pytest.mark.parametrize(
    ("state", "settings", "expected"), [row for row in ROWS if row[2] is not REFUSED]
)
def test_a_start_is_decided_as_in_the_table(begin, state, settings, expected):
    folder, start = begin
    STATES[state](folder, start)
    had_results = has_results(folder)
    assert start(**settings) == expected
    assert has_results(folder) == (had_results and expected != "new")


@pytest.mark.parametrize(("state", "settings"), [row[:2] for row in ROWS if row[2] is REFUSED])
def test_a_start_that_the_table_refuses_keeps_the_results(begin, state, settings):
    folder, start = begin
    STATES[state](folder, start)
    had_results = has_results(folder)
    with refused("output_dir", folder, "overwrite: true"):
        start(**settings)
    assert has_results(folder) == had_results


def test_the_table_has_a_row_for_each_state_and_change():
    assert STARTS.keys() == STATES.keys()
    changes = {"none": {}, "accepted": ACCEPTED, "other": OTHER}
    for state, starts in STARTS.items():
        for change, expected in starts.items():
            assert (state, changes[change], expected) in ROWS


def test_a_new_run_writes_its_settings_and_plan(begin):
    folder, start = begin
    assert start() == "new"
    assert {p.name for p in folder.iterdir()} == {"run.yaml", "plan.json", "ds_config.json"}


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_settings_that_do_not_decide_the_result_may_change(begin, state):
    folder, start = begin
    start()
    leave_files(folder, state)
    assert start(zero_stage=3, batch_size=2, logging_steps=1) == "resume"


def test_a_finished_run_without_a_checkpoint_stays_done(begin):
    folder, start = begin
    start()
    leave_files(folder, "done", checkpoint=False)
    assert start() == "done"
    assert (folder / "adapter").exists()


@pytest.mark.parametrize(
    ("adapter", "settings"), [(True, ACCEPTED), (False, {}), (False, ACCEPTED)]
)
def test_a_finished_run_without_a_checkpoint_is_not_trained_again(begin, adapter, settings):
    """It would begin at step 0 and replace the adapter."""
    folder, start = begin
    start()
    leave_files(folder, "done", adapter=adapter, checkpoint=False)
    with refused("output_dir", folder, "no checkpoint", "overwrite: true"):
        start(**settings)
    assert (folder / "adapter").exists() == adapter


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_the_target_of_a_linked_folder_is_cleared_and_the_link_stays(begin, tmp_path, name):
    folder, start = begin
    other_disk = tmp_path / "other_disk"
    other_disk.mkdir()
    start()
    leave_files(folder, "done")
    (folder / name).rename(other_disk / name)
    (folder / name).symlink_to(other_disk / name)
    (other_disk / "someone_else").mkdir()
    assert start() == "done"
    assert start(**OTHER, overwrite=True) == "new"
    assert not has_results(folder)
    assert (folder / name).is_symlink()
    assert (other_disk / "someone_else").exists()


def test_a_new_run_removes_only_files_that_a_run_wrote(begin):
    folder, start = begin
    start()
    leave_files(folder, "done")
    kept = [folder / "keep.txt", folder / "checkpoints/step-00000009-keep"]
    removed = [".step-00000012.new", "step-00000006-skipped-1", "best-00000003"]
    for name in removed:
        (folder / "checkpoints" / name).mkdir()
    for path in kept:
        path.touch()
    assert start(**OTHER, overwrite=True) == "new"
    assert all(path.exists() for path in kept)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000009-keep"]


def test_a_file_that_cannot_be_removed_fails_the_start(begin, monkeypatch):
    from pipeline.errors import RankZeroError

    folder, start = begin
    start()
    leave_files(folder, "done")

    def refuse(path, **_):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(os, "rmdir", refuse)  # for example a file is open on a network disk
    with refused("output_dir", folder, "Device or resource busy", error=RankZeroError):
        start(**OTHER, overwrite=True)
    assert read_status(folder / "status.json")["state"] == "failed"  # and no longer done


def test_a_kill_while_a_run_is_cleared_leaves_a_folder_that_starts(begin, monkeypatch):
    folder, start = begin
    start()
    leave_files(folder, "done")

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
    leave_files(folder, "done")
    assert start(is_debug=True, lr=0.5) == "new"
    assert not has_results(folder)


def test_debug_starts_again_in_a_folder_without_a_plan(begin):
    folder, start = begin
    folder.mkdir()
    leave_files(folder, "failed", adapter=False, checkpoint=False)
    assert start(is_debug=True) == "new"


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_debug_does_not_replace_a_run_without_debug(begin, state):
    folder, start = begin
    start()
    leave_files(folder, state)
    for settings in ({}, {"overwrite": True}):
        with refused("output_dir", folder, "--debug"):
            start(is_debug=True, **settings)
    assert has_results(folder)


def test_a_checkpoint_of_the_run_that_would_be_replaced_cannot_be_resumed(begin, tmp_path):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    own = str(folder / "checkpoints/step-00000009")
    assert start(resume=own) == "resume"
    with refused("resume", own, "output_dir"):
        start(resume=own, lr=0.5, overwrite=True)
    assert (folder / "checkpoints/step-00000009").exists()


def test_resume_is_a_keyword_or_the_path_of_an_existing_checkpoint(begin, tmp_path):
    folder, start = begin
    with refused("resume", "alwyas", "auto", "must", "never", folder / "checkpoints/step-00000100"):
        start(resume="alwyas")
    (tmp_path / "other/checkpoints/step-00000004").mkdir(parents=True)
    assert start(resume=str(tmp_path / "other/checkpoints/step-00000004")) == "new"


@pytest.mark.parametrize("name", ["other", "other/checkpoints"])
def test_a_folder_of_checkpoints_given_to_resume_gets_the_newest_one_as_advice(
    begin, tmp_path, name
):
    _, start = begin
    for step in (3, 6):
        (tmp_path / f"other/checkpoints/step-0000000{step}").mkdir(parents=True)
    with refused("resume", tmp_path / name, "other/checkpoints/step-00000006"):
        start(resume=str(tmp_path / name))


def test_resume_must_without_a_checkpoint_is_refused(begin):
    folder, start = begin
    with refused("resume: must", folder, "resume: auto"):
        start(resume="must")
    start()
    leave_files(folder, "stopped", checkpoint=False, adapter=False)
    with refused("resume: must", folder):
        start(resume="must")


def test_resume_must_with_overwrite_clears_no_run(begin):
    folder, start = begin
    start()
    leave_files(folder, "stopped", adapter=False)
    with refused("resume: must", folder):
        start(resume="must", lr=0.5, overwrite=True)
    assert has_results(folder)


def test_other_adam_parameters_in_a_deepspeed_json_are_a_refused_change(begin, tmp_path):
    folder, start = begin
    deepspeed_json = tmp_path / "ds.json"
    deepspeed_json.write_text('{"steps_per_print": 5}')  # does not change the result
    start()
    leave_files(folder, "stopped")
    assert start(deepspeed_json=str(deepspeed_json)) == "resume"
    deepspeed_json.write_text('{"optimizer": {"params": {"betas": [0.9, 0.95]}}}')
    with refused("optimizer.params.betas: [0.9, 0.999] ->"):
        start(deepspeed_json=str(deepspeed_json))
    deepspeed_json.write_text('{"optimizer": {"params": {"weight_decay": 0.5}}}')
    with refused("weight_decay: 0.01 -> 0.5"):
        start(deepspeed_json=str(deepspeed_json))


def test_prepared_data_is_kept(begin):
    folder, start = begin
    (folder / "data").mkdir(parents=True)  # as launch/prepare.py leaves it
    (folder / "data/index.json").touch()
    assert start() == "new"
    assert (folder / "data/index.json").exists()


def test_unreadable_checkpoints_are_refused_and_not_treated_as_missing(begin, monkeypatch):
    folder, start = begin
    start()
    leave_files(folder, "stopped", adapter=False)
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "checkpoints":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with refused(folder / "checkpoints", "Permission denied"):
        start()


@pytest.mark.parametrize("name", ["merged", "checkpoints", "notes.txt"])
def test_a_folder_with_files_of_no_run_is_refused(begin, name):
    folder, start = begin
    (folder / name).mkdir(parents=True)
    with refused("output_dir", name):
        start(overwrite=True)


DAMAGES = {
    "empty": lambda path: path.write_text(""),
    "incomplete": lambda path: path.write_text("{"),
    "missing": lambda path: path.unlink(),
    "a list": lambda path: path.write_text("[1]"),
    "not UTF-8": lambda path: path.write_bytes(b"state: \xff"),
}


@pytest.mark.parametrize(
    "fields",
    [{"earlier_starts": 3}, {"earlier_starts": [3]}, {"heartbeat": "x"}, {"started": None},
     {"pids": 7}, {"pids": ["x"]}, {"pids": [-1]}, {"state": 5, "saved_step": "x"}],
)  # fmt: skip
@pytest.mark.parametrize("machine", ["elsewhere", identity()["machine"]])
def test_a_status_with_values_of_other_types_is_damaged(begin, fields, machine):
    folder, start = begin
    start()
    leave_files(folder, "running")
    change_status(folder, machine=machine, **fields)
    assert start() == "resume"
    assert read_status(folder / "status.json") is None or "state" in fields


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_readable_settings_is_not_replaced(begin, damage):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    DAMAGES[damage](folder / "run.yaml")
    with refused("output_dir", folder, "run.yaml", "restore", "overwrite: true"):
        start()
    assert has_results(folder)


def test_a_ds_config_of_another_form_is_not_compared(begin):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    (folder / "ds_config.json").write_text('{"optimizer": {"params": []}}')
    assert start() == "resume"


@pytest.mark.parametrize("content", [None, b"", b"\2\0\0"])
def test_a_finished_run_whose_adapter_is_damaged_is_published_again(begin, content):
    folder, start = begin
    start()
    leave_files(folder, "done")
    path = folder / "adapter/adapter_model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    assert start() == "resume"


@pytest.mark.parametrize("adapter", [False, True])
def test_missing_checkpoints_are_named_with_their_folder(begin, adapter):
    """A finished run that was continued and stopped has an adapter too."""
    folder, start = begin
    start()
    leave_files(folder, "stopped", adapter=adapter, checkpoint=False)
    change_status(folder, saved_step=9)
    for resume in ("auto", "must"):
        with refused(folder / "checkpoints", "resume: never"):
            start(resume=resume)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_status_is_damaged_or_missing_is_still_a_run(begin, damage):
    folder, start = begin
    start()
    leave_files(folder, "running")
    DAMAGES[damage](folder / "status.json")
    with refused("lr: 0.001 -> 0.5"):
        start(lr=0.5)
    assert start() == "resume"
    assert has_results(folder)


def test_a_start_is_refused_while_another_run_is_alive(begin):
    folder, start = begin
    start()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        status = {
            "state": "running", "started": time.time(), "heartbeat": 0,
            **identity(), "pids": [owner.pid],
        }  # fmt: skip
        (folder / "status.json").write_text(json.dumps(status))
        for settings in ({}, {"overwrite": True, "lr": 0.5}):
            with refused(f"process {owner.pid}"):
                start(**settings)
        owner.kill()
    assert start() == "new"  # it had no progress


# Kind of directory entry -> function that creates it.
ENTRIES = {
    "a folder": lambda path: path.mkdir(),
    "a file": lambda path: path.touch(),
    "a link to a missing target": lambda path: path.symlink_to("/no/such/target"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
FILE_NAMES = [*FILES, "stop", "data/audit.json"]
WRONG_ENTRIES = [(name, kind) for name in FOLDERS for kind in ENTRIES if kind != "a folder"]
WRONG_ENTRIES += [(name, kind) for name in FILE_NAMES for kind in ENTRIES if kind != "a file"]


@pytest.mark.parametrize(("name", "kind"), WRONG_ENTRIES)
def test_a_run_folder_with_a_wrong_kind_of_entry_under_a_name_of_a_run_is_refused(
    begin, name, kind
):
    folder, start = begin
    start()
    leave_files(folder, "stopped")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    ENTRIES[kind](path)
    with refused("output_dir", path):
        start(**OTHER, overwrite=True)
    assert os.path.lexists(path)


def test_a_stop_file_may_be_in_the_folder_before_a_run(begin):
    folder, start = begin
    folder.mkdir()
    (folder / "stop").touch()
    assert start() == "new"
    assert (folder / "stop").exists()


@pytest.mark.parametrize("name", ["data", "logs"])
def test_data_and_logs_may_be_in_the_folder_before_a_run(begin, name):
    folder, start = begin
    (folder / name).mkdir(parents=True)
    assert start() == "new"
    assert (folder / name).exists()


def test_hidden_files_of_a_killed_start_do_not_refuse_the_next(begin):
    folder, start = begin
    folder.mkdir()
    for name in (".status.json.4711.tmp", ".owner.lock", ".nfs0001"):
        (folder / name).touch()
    assert start() == "new"


def test_a_run_is_alive_if_its_process_lives_or_its_heartbeat_is_recent():
    now = time.time()
    running = {"state": "running", "host": "other", "pids": [1], "started": now}
    # A run writes a heartbeat every 10 s.
    assert is_alive(running | {"heartbeat": now - 5})
    assert not is_alive(running | {"heartbeat": now - 500})
    two_days = 2 * 86_400
    assert not is_alive(running | {"heartbeat": now + two_days})  # before a clock was set back
    assert is_alive(running | {"heartbeat": now + 500})  # the clocks of two machines may differ
    assert not is_alive(running | {"heartbeat": now, "state": "stopped"})
    # A process that started after the run and has its process id is another one.
    with_reused_pid = identity() | {"pids": [os.getppid()], "started": 1.0, "heartbeat": now}
    assert not is_alive(running | with_reused_pid)
