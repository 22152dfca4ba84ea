"""The number of steps and warm-up steps of a run."""

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.plan import Schedule

pytestmark = pytest.mark.unit


def schedule(steps_per_epoch, **settings):
    run = RunSettings(model="m", train_data="t", output_dir="o", **settings)
    return Schedule.of(run, steps_per_epoch)


@pytest.mark.parametrize(
    ("settings", "total_steps"),
    [
        ({}, 30),
        ({"epochs": 3.0}, 90),
        ({"epochs": 0.5}, 15),
        ({"epochs": 8.3}, 249),  # 30 * 8.3 in floating point is slightly more
        ({"epochs": 1e-9}, 1),
        ({"epochs": 2, "max_steps": 50}, 50),
        ({"epochs": 2, "max_steps": 500}, 60),
        ({"max_steps": 500}, 500),  # the data is repeated
        ({"max_steps": 7}, 7),
    ],
)
def test_a_run_with_30_steps_per_epoch_ends_after_its_epochs_or_its_max_steps(
    settings, total_steps
):
    run_schedule = schedule(30, **settings)
    assert (run_schedule.steps_per_epoch, run_schedule.total_steps) == (30, total_steps)


@pytest.mark.parametrize(
    ("settings", "warmup_steps"),
    [
        ({}, 3),  # the default, 0.03 of 100 steps
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 0.25}, 25),
        ({"warmup_steps": 1}, 1),
        ({"warmup_steps": 20}, 20),
        ({"warmup_steps": 2000}, 100),
    ],
)
def test_the_warm_up_is_a_number_of_steps_or_a_fraction_of_the_100_steps(settings, warmup_steps):
    assert schedule(100, **settings).warmup_steps == warmup_steps
