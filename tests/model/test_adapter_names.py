"""The target modules handed to peft match the planned layers and no other module."""

import pytest

from pipeline.model.adapter import expected_shapes
from tests.model.models import cache_shape
from tests.models.kinds import ALL
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor


def test_a_layer_whose_name_ends_with_a_number_is_adapted_by_its_full_name(tmp_path):
    """Zamba 2 has layers named `0` and `1`, as its blocks are."""
    from transformers import AutoConfig

    model_type, keys = ALL["zamba2"]
    AutoConfig.for_model(model_type, **keys).save_pretrained(tmp_path)
    cache_shape(tmp_path)
    plan = make_plan(tmp_path)
    assert any(name.endswith(".0") for name in plan.shape.linears)
    shapes = expected_shapes(plan)
    assert sum(rows * columns for rows, columns in shapes.values()) == plan.trainable
