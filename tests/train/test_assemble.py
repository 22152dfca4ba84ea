"""The phases of the heartbeat while the training state is assembled."""

from unittest.mock import MagicMock

import pytest

from pipeline.cluster.heartbeat import UNWATCHED_PHASES, Heartbeat
from pipeline.plan.given.class_proof import Proof
from pipeline.train import assemble

pytestmark = pytest.mark.tensor

# Names in assemble.py of functions and classes that load or create something.
REPLACED = (
    "Engine", "PeakBytes", "ProgressDisplay", "TrainingState", "held_out_questions", "open_split",
)  # fmt: skip


def test_the_wait_for_the_hashes_of_the_base_has_no_time_limit(monkeypatch):
    for name in REPLACED:
        monkeypatch.setattr(assemble, name, MagicMock())
    monkeypatch.setattr(assemble, "require_proof", lambda plan: Proof())
    monkeypatch.setattr(assemble, "build_model", lambda *_: (None, {}))
    context = MagicMock(heartbeat=Heartbeat(), is_debug=False)
    context.session.rank_zero_first = lambda work: work()
    context.settings.init_adapter = None
    phases = []
    folder = MagicMock(resumed=None, checkpoints=None)
    folder.open = lambda step: phases.append(context.heartbeat.phase)
    assemble.assemble(context, folder, MagicMock(eval=None))
    assert phases
    assert set(phases) <= set(UNWATCHED_PHASES)
    assert context.heartbeat.phase not in UNWATCHED_PHASES
