"""What the plan may choose beside the stage changes no number: hpZ, offload, live parameters."""

from dataclasses import replace

import pytest

from pipeline.plan.zero import deepspeed_config
from tests.engine import train_tiny as tiny
from tests.engine.test_equality import NF4, assert_same, reference
from tests.engine.train_tiny import train_tiny
from tests.ranks import run_ranks
from tests.tiny import make_plan


def planned(folder, world_size, documents, changes, zero, **settings):
    """A plan whose layout and DeepSpeed config are changed as `auto` may choose them."""
    plan = make_plan(folder, world_size, documents, **settings)
    layout = replace(plan.layout, **changes)
    config = deepspeed_config(plan.shape, plan.settings, layout, is_cuda=False)
    config["zero_optimization"] |= zero
    return replace(plan, choice=replace(plan.choice, layout=layout), deepspeed=config)


def train_changed(session, folder, settings, changes, zero=None):
    def make(folder, world_size, documents=None, **settings):
        return planned(folder, world_size, documents, changes, zero or {}, **settings)

    tiny.make_plan = make
    return train_tiny(session, folder, settings)


@pytest.mark.parametrize("kind", [{}, NF4], ids=["lora", "nf4"])
@pytest.mark.parametrize(
    ("world_size", "settings", "changes"),
    [
        (4, {"batch_size": 2}, {"hpz_partition_size": 2}),
        (4, {"batch_size": 1, "gradient_checkpointing": True}, {"hpz_partition_size": 2}),
        (2, {"batch_size": 2}, {"offload_param": "cpu"}),
        (2, {"batch_size": 2, "gradient_checkpointing": True}, {"offload_param": "cpu"}),
        (4, {"batch_size": 2}, {"hpz_partition_size": 2, "offload_param": "cpu"}),
    ],
)
def test_numbers(tiny_model, tmp_path, kind, world_size, settings, changes):
    expected = reference(tiny_model, tmp_path, kind)
    found = run_ranks(
        train_changed,
        tiny_model,
        kind | settings | {"zero_stage": 3},
        changes,
        tmp_path=tmp_path,
        world_size=world_size,
    )
    assert_same(found[0], expected)
