"""Settings of adapted layers and their r have the same effect as in peft, or are refused."""

import pytest
from peft.utils.other import get_pattern_key

from pipeline.plan.given.adapter_counts import adapted_layers, pattern_value
from tests.messages import refused
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor


def test_layers_to_transform_exclude_modules_and_rank_pattern_determine_the_adapted_layers(
    tiny_model,
):
    """The attention of layer 1 remains, with r of 2 by pattern and 4 by default (tests/tiny.py)."""
    plan = make_plan(
        tiny_model,
        layers_to_transform=[1],
        exclude_modules=r".*mlp.*",
        rank_pattern={"[qk]_proj": 2},
    )
    lora_r = {layer.name: layer.r for layer in adapted_layers(plan.shape, plan.settings)}
    prefix = "model.layers.1.self_attn"
    assert lora_r == {
        f"{prefix}.q_proj": 2,
        f"{prefix}.k_proj": 2,
        f"{prefix}.v_proj": 4,
        f"{prefix}.o_proj": 4,
    }


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"layers_to_transform": [0, 2]}, ["layers_to_transform", "2", "0 to 1"]),
        ({"exclude_modules": ["k_prj"]}, ["exclude_modules", "k_prj"]),
        ({"exclude_modules": "k_(proj"}, ["k_(proj", "regular expression"]),
        ({"exclude_modules": r".*"}, ["exclude_modules", "no layer"]),
        ({"rank_pattern": {"proj": 2}}, ["rank_pattern", "proj"]),
        ({"alpha_pattern": {"q_proj": 2.0, "x": 1.0}}, ["alpha_pattern", "x"]),
        ({"rank_pattern": {"(": 2}}, ["regular expression"]),
    ],
)
def test_a_setting_that_is_no_pattern_or_selects_no_layer_is_refused(tiny_model, settings, facts):
    with refused(*facts):
        make_plan(tiny_model, **settings)


@pytest.mark.parametrize("pattern", [
    {"q_proj": 2}, {"proj": 2}, {r"layers\.1\.\w+\.q_proj": 2}, {"v_proj": 3, ".*_proj": 2},
    {"model.layers.1.self_attn.q_proj": 2}, {"layers": 2}, {r"layers.1.*": 2},
])  # fmt: skip
def test_the_value_of_a_rank_pattern_for_a_layer_is_that_of_peft(pattern):
    default = 7
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.11.mlp.v_proj", "x.xq_proj"):
        value_of_peft = pattern.get(get_pattern_key(pattern, name), default)
        assert pattern_value(pattern, name, default) == value_of_peft
