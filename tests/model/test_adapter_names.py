"""The target modules handed to peft match the planned layers and no other module."""

import pytest
import torch

from pipeline.model.adapter import attach_adapter, expected_shapes, trainable
from pipeline.model.base import load_base
from tests.model.models import cache_shape, make_own_code
from tests.models.kinds import ALL
from tests.tiny import make_plan, make_tokenizer

pytestmark = pytest.mark.tensor


def test_a_layer_whose_name_ends_with_a_number_is_adapted_by_its_full_name(tmp_path):
    """Zamba 2 has linear layers named `0` and `1`, like the decoder layers in the list `layers`."""
    from transformers import AutoConfig

    model_type, keys = ALL["zamba2"]
    AutoConfig.for_model(model_type, **keys).save_pretrained(tmp_path)
    cache_shape(tmp_path)
    plan = make_plan(tmp_path)
    assert any(name.endswith(".0") for name in plan.shape.linears)
    shapes = expected_shapes(plan)
    assert sum(rows * columns for rows, columns in shapes.values()) == plan.trainable


def test_a_model_with_its_own_code_gets_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))
    folder = make_own_code(tmp_path / "model")
    make_tokenizer().save_pretrained(folder)
    plan = make_plan(folder, trust_remote_code=True)
    model = attach_adapter(load_base(plan, torch.device("cpu")), plan)
    assert type(model.get_base_model()).__name__ == "OwnForCausalLM"
    assert sum(p.numel() for p in trainable(model).values()) == plan.trainable
