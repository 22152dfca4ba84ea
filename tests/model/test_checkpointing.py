"""Checkpointed layers save the state of the random number generator only if there is dropout."""

import json
import shutil

import pytest
import torch

from pipeline.data.order.batches import build_batch
from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from pipeline.model.loss import SummedLoss
from tests.tiny import Documents, make_plan

pytestmark = pytest.mark.tensor


def saves_random_state(folder, monkeypatch, **settings):
    """Whether a forward pass reads the state of the random number generator."""
    settings = {"zero_stage": 2, "gradient_checkpointing": True} | settings
    plan = make_plan(folder, **settings)
    model = attach_adapter(load_base(plan, torch.device("cpu")), plan)
    batch, reads = build_batch(Documents(2), range(2)), []
    with monkeypatch.context() as patched:
        get_rng_state = torch.get_rng_state
        patched.setattr(torch, "get_rng_state", lambda: reads.append(1) or get_rng_state())
        model.train()
        SummedLoss(model)(batch.input_ids, batch.labels, batch.documents).backward()
    return len(reads) > 0


@pytest.mark.parametrize(("dropout", "is_saved"), [(0.0, False), (0.1, True)])
def test_the_random_state_is_saved_for_dropout_of_the_adapter(
    tiny_model, monkeypatch, dropout, is_saved
):
    assert saves_random_state(tiny_model, monkeypatch, lora_dropout=dropout) is is_saved


def test_the_random_state_is_saved_for_dropout_of_the_model(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    assert saves_random_state(folder, monkeypatch, lora_dropout=0.0)
