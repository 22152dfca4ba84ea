"""Checkpoints are written while training continues; failures are reported and repaired."""

import threading

import pytest
import torch

from pipeline.errors import RankZeroError
from pipeline.plan.cost.stopping import slow_stop_warning
from pipeline.train.checkpoint import Checkpoints, Identity, Progress, read_progress
from pipeline.train.writer import CheckpointWriter
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.tensor

WEIGHTS, MOMENTS = {"k": torch.randn(4)}, {"k/exp_avg": torch.randn(4)}
DEADLINE_S = 30  # for a thread of a test


@pytest.fixture
def checkpoints(tmp_path):
    identity = Identity(data="d", base="b", total_steps=9, adapter="lora_r 4")
    return Checkpoints(tmp_path / "checkpoints", identity, keep=2)


@pytest.fixture
def saved_steps():
    """The steps that the writer has reported as saved."""
    return []


@pytest.fixture
def writer(checkpoints, saved_steps):
    return CheckpointWriter(checkpoints, lambda: None, saved_steps.append)


def block_write(tmp_path, name):
    """A file in place of the temporary folder of a write, which therefore fails."""
    path = tmp_path / "checkpoints" / f".{name}.new"
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file where the folder should be")
    return path


def test_training_does_not_wait_and_only_one_write_is_in_flight(writer, checkpoints, monkeypatch):
    write_may_end, written, started = threading.Event(), [], []
    write = checkpoints.write

    def slow_write(weights, moments, progress):
        started.append(progress.step)
        assert len(started) == len(written) + 1
        assert write_may_end.wait(DEADLINE_S)
        write(weights, moments, progress)
        written.append(progress.step)

    monkeypatch.setattr(checkpoints, "write", slow_write)
    progress = Progress(step=3, optimizer_step=3)
    writer.save(WEIGHTS, MOMENTS, progress)
    assert written == []  # save() has returned
    progress.step = 4  # the loop continues; the write stays that of step 3
    second = threading.Thread(target=writer.save, args=(WEIGHTS, MOMENTS, progress))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it waits for the write in flight
    write_may_end.set()
    second.join(DEADLINE_S)
    assert writer.wait() is None
    assert written == [3, 4]
    assert checkpoints.newest()[0].name == "step-00000004"
    assert read_progress(checkpoints.newest()[0].with_name("step-00000003")).step == 3


def test_a_failed_write_is_reported_once_and_repaired_by_the_next(
    writer, checkpoints, saved_steps, tmp_path
):
    writer.save(WEIGHTS, MOMENTS, Progress(step=3))
    assert writer.wait() is None
    list(writer.finished_writes())
    obstacle = block_write(tmp_path, "step-00000004")
    writer.save(WEIGHTS, MOMENTS, Progress(step=4))
    assert "step 4 is not saved" in writer.wait()
    with refused("step 4", error=RankZeroError):
        writer.require_written()
    ((failure, _),) = writer.finished_writes()
    assert "step 4 is not saved" in failure
    assert list(writer.finished_writes()) == []
    assert checkpoints.newest()[0].name == "step-00000003"
    assert saved_steps == [3]
    obstacle.unlink()
    writer.save(WEIGHTS, MOMENTS, Progress(step=5))
    writer.require_written()
    assert checkpoints.newest()[0].name == "step-00000005"
    assert saved_steps == [3, 5]


def test_a_failed_checkpoint_is_reported_although_a_best_adapter_follows(
    writer, checkpoints, tmp_path
):
    obstacle = block_write(tmp_path, "step-00000004")
    writer.save(WEIGHTS, MOMENTS, Progress(step=4))
    writer.save_best(WEIGHTS, Progress(step=5, best_step=5, best_loss=1.0))
    assert "step 4 is not saved" in writer.wait()  # so that a stop writes it again
    (of_checkpoint, _), (of_best_adapter, _) = writer.finished_writes()  # failure and seconds
    assert "step 4 is not saved" in of_checkpoint
    assert of_best_adapter is None
    with refused("step 4", error=RankZeroError):
        writer.require_written()
    assert checkpoints.has_best(Progress(best_step=5))
    obstacle.unlink()
    writer.save(WEIGHTS, MOMENTS, Progress(step=6))
    writer.require_written()


def test_a_best_adapter_that_could_not_be_written_is_kept_in_memory(writer, checkpoints, tmp_path):
    progress = Progress(step=4, best_step=4, best_loss=1.0)
    obstacle = block_write(tmp_path, "best-00000004")
    writer.save_best(WEIGHTS, progress)
    assert "the best adapter (step 4) is not saved" in writer.wait()
    assert torch.equal(writer.best(progress)["k"], WEIGHTS["k"])  # from memory
    obstacle.unlink()
    writer.save(WEIGHTS, MOMENTS, progress)
    assert writer.wait() is None
    assert checkpoints.has_best(progress)  # the next save wrote it too
    assert torch.equal(writer.best(progress)["k"], WEIGHTS["k"])


def test_a_stop_longer_than_the_30_s_that_a_launcher_waits_gives_a_warning():
    """Arguments: seconds of a save, and of a micro-batch, after which the ranks agree to stop."""
    assert slow_stop_warning(20.0, 9.0) is None
    assert_mentions(slow_stop_warning(20.0, 11.0), "20 s", "11 s", "stop", "save_steps")
    # With short micro-batches the ranks agree every 5 s.
    assert_mentions(slow_stop_warning(26.0, 0.1), "26 s", "5 s")
