"""If the final adapter cannot be written, the message names the checkpoint to resume from."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import RankZeroError
from pipeline.train import finish
from pipeline.train.checkpoint import Checkpoints, Identity, Progress
from pipeline.train.writer import CheckpointWriter
from tests.messages import assert_mentions
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor

WEIGHTS, MOMENTS = {"k": torch.randn(4)}, {"k/exp_avg": torch.randn(4)}
DISK_IS_FULL = OSError("no space left")


@pytest.fixture
def writer(tmp_path):
    identity = Identity(data="d", base="b", total_steps=9, adapter="lora_r 4")
    checkpoints = Checkpoints(tmp_path / "checkpoints", identity, keep=2)
    return CheckpointWriter(checkpoints, lambda: None, lambda step: None)


@pytest.fixture
def failure_message(writer, tmp_path, tiny_model, monkeypatch):
    """Function that publishes the adapter of a run, which fails with `cause`; the message.

    `resumed`: progress of the checkpoint from which the run was resumed.
    """

    def publish(resumed: Progress | None, cause: Exception | None) -> str:
        run = SimpleNamespace(  # the attributes of a TrainingState that publishing reads
            plan=make_plan(tiny_model),
            folder=SimpleNamespace(path=tmp_path, checkpoints=SimpleNamespace(initial={})),
            progress=Progress(step=9), writer=writer, saved=resumed,
        )  # fmt: skip

        def fail(*_, **__):
            raise RankZeroError("adapter cannot be written") from cause

        monkeypatch.setattr(finish, "publish_adapter", fail)
        with pytest.raises(RankZeroError) as caught:
            finish._publish(run, WEIGHTS)
        return str(caught.value)

    return publish


def test_without_a_checkpoint_the_message_says_that_a_new_start_begins_at_step_0(failure_message):
    assert_mentions(failure_message(None, DISK_IS_FULL), "no checkpoint", "step 0")


def test_the_resumed_checkpoint_is_named(failure_message):
    assert_mentions(
        failure_message(Progress(step=6), DISK_IS_FULL), "checkpoint of step 6", "start again"
    )


def test_the_latest_written_checkpoint_is_named(failure_message, writer):
    writer.save(WEIGHTS, MOMENTS, Progress(step=8))
    assert_mentions(
        failure_message(Progress(step=6), DISK_IS_FULL), "checkpoint of step 8", "start again"
    )


def test_a_checkpoint_that_could_not_be_written_is_named(failure_message, writer, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/.step-00000009.new").write_text("a file where the folder should be")
    writer.save(WEIGHTS, MOMENTS, Progress(step=9))
    message = failure_message(Progress(step=6), DISK_IS_FULL)
    assert_mentions(message, "step 9 is not saved", "start again")


def test_a_failure_that_a_new_start_would_repeat_suggests_no_new_start(failure_message):
    """An error without an OSError as its cause is about the weights, such as NaN."""
    assert failure_message(Progress(step=6), None) == "adapter cannot be written"
