"""The arithmetic of the tables in docs/scale.md agrees with the plan's speed model."""

from dataclasses import replace

import pytest

from docs.scale_tables import (
    BASES,
    Case,
    gpus_worth_using,
    hardware,
    link_bytes,
    link_seconds,
    settings_of,
    shape_of,
    with_tables,
)
from pipeline.plan.cost.per_token import cost_per_token
from pipeline.plan.cost.speed import step_seconds
from pipeline.plan.given.layout import SequenceProfile

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sharding", ["ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize("gpus", [8, 64])
def test_a_step_on_slow_links_takes_as_long_as_sending_its_bytes(base, sharding, gpus):
    """The links are so slow that everything else is negligible.

    The speed model assumes that 0.7 of a link's nominal rate is reached.
    """
    slow = 1e5  # bytes per second
    case = Case(
        model="8b", base=base, sharding=sharding, gpus=gpus, network=25e9, global_batch=4 * gpus
    )
    layout, settings = case.best().layout, settings_of(base, 4 * gpus)
    shape = shape_of("8b")
    machine = replace(hardware(), network=slow, node_link=slow)
    speed = step_seconds(shape, settings, layout, machine, SequenceProfile(tokens=2048))
    sent = link_bytes(cost_per_token(shape, settings, layout.training_dtype), layout)
    assert link_seconds(speed) == pytest.approx(sent / (0.7 * slow), rel=1e-3)


def test_more_gpus_are_worthwhile_until_a_doubling_gains_little():
    # Keys: number of GPUs; values: seconds of a step.
    assert gpus_worth_using({8: 8.0, 16: 4.0, 32: 2.1}) == 32
    assert gpus_worth_using({8: 8.0, 16: 4.0, 32: 3.9, 64: 1.0}) == 16
    assert gpus_worth_using({16: 4.0}) == 16


def test_tables_replace_the_text_between_their_markers():
    tables = (
        "growing-8b", "growing-70b", "growing-405b", "networks", "fixed", "hours", "break-even",
    )  # fmt: skip
    page = "\n".join(f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->" for name in tables)
    new_page = with_tables(page)
    assert "old" not in new_page
    assert new_page.count("before") == len(tables)
    assert with_tables(new_page) == new_page
