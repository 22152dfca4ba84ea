"""Changes because of which a resumed run is not bitwise equal to an uninterrupted one."""

import pytest

from pipeline.train.checkpoint import Checkpoints, computation_changes
from tests.messages import assert_mentions
from tests.train.test_checkpoint import IDENTITY, write

pytestmark = pytest.mark.tensor


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2)


def test_changed_fast_paths_and_versions_are_reported_at_a_resume(checkpoints):
    """Either can change the rounding, so that the resumed run is not bitwise equal."""
    recorded = {"fast_paths": {"a": "on", "b": "off"}, "versions": {"torch": "1"}}
    of_earlier_version = write(checkpoints, 2)  # records neither
    checkpoints.metadata = recorded
    path = write(checkpoints, 3)
    assert computation_changes(path, recorded) == []
    # A fast path that the earlier version did not have is no change while it is off.
    changes = computation_changes(of_earlier_version, recorded)
    assert [change.split(":")[0] for change in changes] == ["a", "torch"]
    assert computation_changes(path, recorded | {"fast_paths": {"a": "on", "b": "other"}}) == []
    [change] = computation_changes(path, recorded | {"fast_paths": {"a": "one rank", "b": "off"}})
    assert_mentions(change, "a: on -> one rank")
    [change] = computation_changes(path, recorded | {"versions": {"torch": "2"}})
    assert_mentions(change, "torch", "1", "2")


def test_a_changed_division_over_ranks_and_changed_dropout_masks_are_reported(checkpoints):
    recorded = {"division": {"ranks": 4, "zero_stage": 2, "sequence_parallel_size": 2}}
    of_earlier_version = write(checkpoints, 2)  # records no division
    checkpoints.metadata = recorded
    path = write(checkpoints, 3)
    assert computation_changes(path, recorded, has_dropout=True) == []
    assert computation_changes(of_earlier_version, recorded, has_dropout=True) == []
    split_over_4 = {"division": recorded["division"] | {"sequence_parallel_size": 4}}
    [change] = computation_changes(path, split_over_4)
    assert_mentions(change, "sequence_parallel_size: 2 -> 4")
    _, dropout_change = computation_changes(path, split_over_4, has_dropout=True)
    assert_mentions(dropout_change, "lora_dropout")
    # The ZeRO stage does not change the dropout masks.
    zero3 = {"division": recorded["division"] | {"zero_stage": 3}}
    assert len(computation_changes(path, zero3, has_dropout=True)) == 1
