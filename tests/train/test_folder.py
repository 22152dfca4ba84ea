"""status.json has the outcome of a run, whether the main thread, the watchdog or a rank ends it."""

import json
import os
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

from pipeline.cluster.stop import StopRequests
from pipeline.errors import RankZeroError, Stopped, UserError
from pipeline.model import complete, fingerprint
from pipeline.model.fingerprint import base_fingerprint
from pipeline.train.context import RunContext
from pipeline.train.folder import RunFolder
from pipeline.train.owner import OWNER, identity
from pipeline.train.resume import checkpoints_of
from pipeline.train.status import RunStatus, end_for_dead_owner, read_status
from tests.messages import refused
from tests.tiny import make_plan, make_rows

pytestmark = pytest.mark.unit


NO_SUCH_PID = 2**22 + 1  # above the largest process id of Linux


class SingleProcess:
    """A session of one process."""

    is_rank_zero = True


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A run folder that this process owns."""
    plan = make_plan(tiny_model, documents=8, output_dir=str(tmp_path))
    stops = StopRequests(tmp_path, None, reads_stop_file=True)
    folder = RunFolder(RunContext(plan=plan, session=SingleProcess(), stops=stops))
    folder.status.take_ownership()
    yield folder
    folder.status.end("failed", 1, "the test is over")


def final_status(folder) -> tuple:
    status = read_status(folder.path / "status.json")
    return status["state"], status["exit_code"], status["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Stopped("at step 3"), ("stopped", 75, "at step 3")),
        (RankZeroError("not finite"), ("failed", 1, "not finite")),
        (ValueError("no memory"), ("failed", 1, "ValueError: no memory")),
        (KeyboardInterrupt(), ("failed", 1, "KeyboardInterrupt: ")),
    ],
)
def test_the_status_has_the_error(folder, error, status):
    folder.status.write_start()
    with pytest.raises(type(error)), folder.outcome_recorded():
        raise error
    assert final_status(folder) == status


def test_a_start_that_is_refused_before_the_folder_is_open_leaves_the_earlier_status(folder):
    earlier = b'{"state": "stopped", "step": 4}'
    folder.status.path.write_bytes(earlier)
    folder.status.write_start()
    folder.status.update(total_steps=9)
    with pytest.raises(UserError), folder.outcome_recorded():
        raise UserError("the model class cannot be trained")
    assert folder.status.path.read_bytes() == earlier
    assert not (folder.path / OWNER).exists()


def test_the_first_start_in_a_folder_records_why_it_is_refused(folder):
    folder.status.write_start()
    with pytest.raises(UserError), folder.outcome_recorded():
        raise UserError("the model class cannot be trained")
    assert final_status(folder) == ("failed", 2, "the model class cannot be trained")


def test_a_wrong_input_after_the_folder_is_open_is_a_failed_run(folder):
    folder.status.path.write_text('{"state": "stopped", "step": 4}')
    folder.start = "resume"
    folder.open(step=4)
    with pytest.raises(UserError), folder.outcome_recorded():
        raise UserError("the base has changed")
    assert final_status(folder) == ("failed", 2, "the base has changed")


def test_a_run_is_replaced_only_when_the_folder_is_opened(folder):
    (folder.path / "metrics.jsonl").touch()
    folder.status.path.write_text('{"state": "done"}')
    folder.open(step=0)
    assert read_status(folder.status.path)["state"] == "running"
    assert not (folder.path / "metrics.jsonl").exists()


def test_an_unreadable_base_is_refused_before_the_earlier_run_is_removed(folder, monkeypatch):
    (folder.path / "metrics.jsonl").touch()
    folder.status.path.write_text('{"state": "done"}')

    def raise_error(*_):
        raise UserError("model: a tensor cannot be read")

    monkeypatch.setattr(fingerprint, "_fingerprint", raise_error)
    with refused("model"):
        folder.open(step=0)
    assert (folder.path / "metrics.jsonl").exists()


def test_the_checkpoints_of_a_new_run_record_its_base_when_the_folder_is_opened(folder):
    plan = folder._context.plan
    folder.checkpoints = checkpoints_of(folder.path, plan, "new", "key of the data")
    assert folder.checkpoints.identity.base is None  # hashing would delay the preparation
    folder.open(step=0)
    base = base_fingerprint(plan.settings.model_folder).digest
    assert folder.checkpoints.identity.base == base


def test_the_base_is_hashed_while_the_data_is_prepared(folder, monkeypatch):
    hashed = []

    def prepare(*_):
        assert hashed == [folder._context.settings.model_folder]
        raise UserError("train_data: no rows")

    monkeypatch.setattr("pipeline.train.folder.start_hashing", hashed.append)
    monkeypatch.setattr("pipeline.train.folder.prepare_data", prepare)
    with refused("no rows"):
        folder.prepare()


def test_a_run_without_an_error_is_done_and_no_longer_owns_its_folder(folder):
    folder.status.write_start()
    with folder.outcome_recorded():
        pass
    assert final_status(folder) == ("done", 0, None)
    assert not (folder.path / OWNER).exists()


@pytest.mark.parametrize("error", [RankZeroError("not finite"), ValueError("no memory")])
def test_the_checkpoint_in_flight_is_written_before_an_error_ends_the_run(folder, error):
    waits = []
    folder.wait_for_writes = waits.append
    folder.status.write_start()
    with pytest.raises(type(error)), folder.outcome_recorded():
        raise error
    assert len(waits) == 1


def test_a_lost_connection_does_not_change_the_status(folder):
    """The watchdog will write it: it knows which rank ended and why."""
    folder.status.write_start()
    with pytest.raises(RuntimeError), folder.outcome_recorded():
        raise RuntimeError("Connection closed by peer")
    assert final_status(folder)[0] == "running"


def test_the_status_of_the_watchdog_is_final(folder):
    """The main thread continues for a moment after the watchdog and raises another error."""
    folder.status.write_start()

    def end_twice():
        with folder.outcome_recorded():
            folder.end_by_watchdog("rank 1 got a stop request", 75)
            raise ValueError("a later error of the main thread")

    with pytest.raises(ValueError):  # noqa: PT011 - raised above
        end_twice()
    assert final_status(folder) == ("stopped", 75, "rank 1 got a stop request")


def test_a_stop_by_the_watchdog_removes_the_stop_file(folder):
    (folder.path / "stop").touch()
    folder.status.write_start()
    folder.end_by_watchdog("the file stop", 75)
    assert not (folder.path / "stop").exists()  # the next start does not stop at once


def test_a_start_that_the_watchdog_ended_first_writes_no_status(folder):
    """The watchdog ends the run before the start writes "running", so no status is changed."""
    folder.end_by_watchdog("stopped", 75)
    with pytest.raises(AssertionError):
        folder.status.write_start()
    folder.status.end("failed", 1, "AssertionError")
    assert read_status(folder.status.path) is None


def test_a_second_interrupt_is_recorded_without_waiting_for_a_write(folder):
    folder.wait_for_writes = pytest.fail
    folder.status.write_start()
    folder.end_by_second_interrupt()
    assert final_status(folder)[:2] == ("failed", 130)


def test_an_update_of_the_status_keeps_its_other_fields(tmp_path):
    status = RunStatus(tmp_path / "status.json")
    status.take_ownership()
    status.write_start({"step": 0, "total_steps": 9})
    status.update(step=3)
    fields = read_status(tmp_path / "status.json")
    assert (fields["state"], fields["step"], fields["total_steps"]) == ("running", 3, 9)
    status.end("stopped", 75, "time_limit")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_another_rank_ends_the_status_only_if_its_owner_is_dead(tmp_path):
    """Rank 0 owns the folder. If it is killed, another rank calls `end_for_dead_owner`."""
    path = tmp_path / "status.json"
    running = identity() | {"state": "running", "started": time.time(), "step": 4}
    path.write_text(json.dumps(running | {"pids": [os.getppid()]}))
    end_for_dead_owner(path, "rank 0 ended")
    assert read_status(path)["state"] == "running"  # the owner lives
    path.write_text(json.dumps(running | {"pids": [NO_SUCH_PID]}))
    (tmp_path / OWNER).write_text(path.read_text())
    end_for_dead_owner(path, "rank 0 ended")
    fields = read_status(path)
    assert (fields["state"], fields["exit_code"], fields["step"]) == ("failed", 1, 4)
    assert fields["reason"] == "rank 0 ended"
    assert not (tmp_path / OWNER).exists()  # so another machine can start at once


def test_an_owner_on_another_machine_is_dead_if_its_heartbeat_stands_still(tmp_path, monkeypatch):
    """`end_for_dead_owner` sleeps between two readings of the heartbeat."""
    path = tmp_path / "status.json"
    fields = identity() | {"machine": "another", "state": "running", "heartbeat": time.time()}
    path.write_text(json.dumps(fields))

    def heartbeat_advances(_seconds):
        path.write_text(json.dumps(fields | {"heartbeat": time.time() + 1}))

    monkeypatch.setattr("pipeline.train.status.time.sleep", heartbeat_advances)
    end_for_dead_owner(path, "rank 0 ended")
    assert read_status(path)["state"] == "running"
    monkeypatch.setattr("pipeline.train.status.time.sleep", lambda _: None)
    end_for_dead_owner(path, "rank 0 ended")
    assert read_status(path)["state"] == "failed"


def test_a_base_without_all_tensors_is_refused_before_the_ranks_load_it(
    tmp_path, tiny_model, monkeypatch
):
    missing = "model.layers.0.input_layernorm.weight"
    base = shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors[missing]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(complete, "run_module", lambda *_, **__: {"missing": [missing]})
    rows = make_rows(tmp_path / "rows.jsonl")
    plan = make_plan(base, train_data=str(rows), output_dir=str(tmp_path / "run"))
    stops = StopRequests(tmp_path / "run", None, reads_stop_file=True)
    run = RunFolder(RunContext(plan=plan, session=SingleProcess(), stops=stops))
    with refused(base, missing):
        run.begin()
    assert not (tmp_path / "run").exists()
