"""Writes beside the training: one at a time, failures told and made up for."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.cluster.stop import StopRequests
from pipeline.errors import RankZeroError
from pipeline.plan.cost.stopping import slow_stop_warning
from pipeline.train import finish, run
from pipeline.train.checkpoint import Checkpoints, Identity, Progress
from pipeline.train.saving import Saver
from pipeline.train.status import RunStatus, read_status
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

WEIGHTS, MOMENTS = {"k": torch.randn(4)}, {"k/exp_avg": torch.randn(4)}
DEADLINE_S = 30


@pytest.fixture
def checkpoints(tmp_path):
    identity = Identity(data="d", base="b", total_steps=9, adapter="lora_r 4")
    return Checkpoints(tmp_path / "checkpoints", identity, keep=2)


@pytest.fixture
def saver(checkpoints):
    return Saver(checkpoints, lambda: None)


def test_the_training_does_not_wait_and_only_one_write_is_in_flight(
    saver, checkpoints, monkeypatch
):
    gate, written, at_work = threading.Event(), [], []
    write = checkpoints.write

    def slow(weights, moments, progress):
        at_work.append(progress.step)
        assert len(at_work) == len(written) + 1
        assert gate.wait(DEADLINE_S)
        write(weights, moments, progress)
        written.append(progress.step)

    monkeypatch.setattr(checkpoints, "write", slow)
    progress = Progress(step=3, optimizer_step=3)
    saver.save(WEIGHTS, MOMENTS, progress)
    assert written == []  # and here we are
    progress.step = 4  # the loop goes on; what is being written stays step 3
    second = threading.Thread(target=saver.save, args=(WEIGHTS, MOMENTS, progress))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # waits for the one in flight
    gate.set()
    second.join(DEADLINE_S)
    assert saver.wait() is None
    assert written == [3, 4]
    assert checkpoints.newest()[0].name == "step-00000004"
    assert checkpoints.read_progress(checkpoints.newest()[0].with_name("step-00000003")).step == 3


def test_a_failed_write_is_told_once_and_made_up_for(saver, checkpoints, tmp_path):
    saver.save(WEIGHTS, MOMENTS, Progress(step=3))
    assert saver.wait() is None
    list(saver.news())
    blocked = tmp_path / "checkpoints/.step-00000004.new"
    blocked.write_text("a file where the folder should be")
    saver.save(WEIGHTS, MOMENTS, Progress(step=4))
    assert "step 4 is not saved" in saver.wait()
    with pytest.raises(RankZeroError, match="step 4 is not saved"):
        saver.require_written()
    ((failure, _),) = saver.news()
    assert "step 4 is not saved" in failure
    assert list(saver.news()) == []
    assert checkpoints.newest()[0].name == "step-00000003"
    blocked.unlink()
    saver.save(WEIGHTS, MOMENTS, Progress(step=5))
    saver.require_written()
    assert checkpoints.newest()[0].name == "step-00000005"


def test_a_lost_checkpoint_is_told_though_a_best_is_written_after_it(saver, checkpoints, tmp_path):
    blocked = tmp_path / "checkpoints/.step-00000004.new"
    blocked.parent.mkdir()
    blocked.write_text("a file where the folder should be")
    saver.save(WEIGHTS, MOMENTS, Progress(step=4))
    saver.keep_best(WEIGHTS, Progress(step=5, best_step=5, best_loss=1.0))
    assert "step 4 is not saved" in saver.wait()  # so a stop writes it again
    assert ["step 4 is not saved" in (failure or "") for failure, _ in saver.news()] == [
        True,
        False,
    ]
    with pytest.raises(RankZeroError, match="step 4 is not saved"):
        saver.require_written()
    assert checkpoints.has_best(Progress(best_step=5))
    blocked.unlink()
    saver.save(WEIGHTS, MOMENTS, Progress(step=6))
    saver.require_written()


def test_a_best_adapter_that_could_not_be_written_is_not_lost(saver, checkpoints, tmp_path):
    progress = Progress(step=4, best_step=4, best_loss=1.0)
    blocked = tmp_path / "checkpoints/.best-00000004.new"
    blocked.parent.mkdir()
    blocked.write_text("a file where the folder should be")
    saver.keep_best(WEIGHTS, progress)
    assert "the best adapter, of step 4 is not saved" in saver.wait()
    assert torch.equal(saver.best(progress)["k"], WEIGHTS["k"])  # from memory
    blocked.unlink()
    saver.save(WEIGHTS, MOMENTS, progress)
    assert saver.wait() is None
    assert checkpoints.has_best(progress)  # the next save wrote it too
    assert torch.equal(saver.best(progress)["k"], WEIGHTS["k"])


def test_a_stop_that_a_launcher_would_not_wait_for_is_warned_of():
    assert slow_stop_warning(20.0, 9.0) is None
    assert "20 + 11 s" in slow_stop_warning(20.0, 11.0)


@pytest.fixture
def publish(saver, tmp_path, tiny_model, monkeypatch):
    """Publish with that failure: saved, error -> what is said."""

    def fail(saved, error: Exception | None) -> str:
        plan = make_plan(tiny_model)
        training = SimpleNamespace(
            plan=plan, folder=tmp_path, progress=Progress(step=9), saver=saver, saved=saved
        )

        def refuse(*given, **named):
            raise RankZeroError("adapter cannot be written") from error

        monkeypatch.setattr(finish, "publish_adapter", refuse)
        with pytest.raises(RankZeroError) as caught:
            finish._publish(training, WEIGHTS)
        return str(caught.value)

    return fail


@pytest.mark.parametrize("error", [RankZeroError("not finite"), ValueError("out of memory")])
def test_a_write_in_flight_outlives_an_error(saver, checkpoints, tmp_path, monkeypatch, error):
    write, failed = checkpoints.write, threading.Event()

    def slow(*given):
        assert failed.wait(DEADLINE_S)
        time.sleep(0.2)
        write(*given)

    def work():
        saver.save(WEIGHTS, MOMENTS, Progress(step=3))
        failed.set()
        raise error

    monkeypatch.setattr(checkpoints, "write", slow)
    status = RunStatus(tmp_path / "status.json")
    status.own()
    status.claim()
    stops = StopRequests(tmp_path, None, is_first=True)
    last_word = run._LastWord(tmp_path, stops, status, saver.wait_at_most)
    with pytest.raises(type(error)):
        run._owned(status, last_word, work)
    assert checkpoints.newest()[0].name == "step-00000003"  # the process may end now
    assert read_status(status.path)["state"] == "failed"


def test_a_lost_connection_is_the_watchdogs_to_explain(tmp_path):
    status, stops = RunStatus(tmp_path / "status.json"), StopRequests(tmp_path, None, is_first=True)
    status.own()
    status.claim()

    def work():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        run._owned(status, run._LastWord(tmp_path, stops, status), work)
    assert read_status(status.path)["state"] == "running"


@pytest.mark.parametrize("is_first", [True, False])
def test_the_watchdog_has_the_last_word(tmp_path, is_first):
    """Its process is there for a moment more, and the main thread meets what follows."""
    status = RunStatus(tmp_path / "status.json")
    status.own()
    status.claim()
    last_word = run._LastWord(tmp_path, StopRequests(tmp_path, None, is_first=True), status)

    def work():
        if is_first:
            last_word("rank 1 was asked to stop", 75)
            status.claim()
        raise RuntimeError("Connection closed by peer")

    with pytest.raises((RuntimeError, AssertionError)):
        run._owned(status, last_word, work)
    if not is_first:
        last_word("rank 1 was asked to stop", 75)
    said = read_status(status.path)
    assert (said["state"], said["reason"]) == ("stopped", "rank 1 was asked to stop")


def test_after_the_last_word_no_start_is_claimed(tmp_path):
    status = RunStatus(tmp_path / "status.json")
    status.own()
    run._LastWord(tmp_path, StopRequests(tmp_path, None, is_first=True), status)("stopped", 75)
    with pytest.raises(AssertionError):
        status.claim()
    status.end("failed", 1, "AssertionError")
    assert read_status(status.path) is None


def test_an_adapter_that_cannot_be_written_says_what_is_kept(publish, saver, tmp_path):
    full = OSError("no space left")
    assert "there is no checkpoint: a new start begins anew" in publish(None, full)
    go_on = "is there: start again to go on"
    assert f"the checkpoint of step 6 {go_on}" in publish(Progress(step=6), full)  # resumed from
    saver.save(WEIGHTS, MOMENTS, Progress(step=8))
    assert f"the checkpoint of step 8 {go_on}" in publish(Progress(step=8), full)
    (tmp_path / "checkpoints/.step-00000009.new").write_text("a file where the folder should be")
    saver.save(WEIGHTS, MOMENTS, Progress(step=9))
    said = publish(Progress(step=9), full)
    assert "step 9 is not saved" in said
    assert "what was written before is untouched: start again" in said


def test_a_wrong_adapter_promises_nothing_of_a_new_start(publish):
    assert publish(Progress(step=6), None) == "adapter cannot be written"
