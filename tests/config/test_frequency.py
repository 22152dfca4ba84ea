"""The steps at which a run evaluates and saves, and refusal of keys that contradict each other."""

from itertools import pairwise

import pytest

from pipeline.config.frequency import Frequency
from pipeline.config.load import dump_settings, load_settings
from tests.messages import refused

pytestmark = pytest.mark.unit


@pytest.fixture
def load(tmp_path):
    """Function that writes a run file with these settings and loads it."""

    def write_and_load(**values):
        path = tmp_path / "RUN.yaml"
        lines = "".join(f"{key}: {value}\n" for key, value in values.items())
        path.write_text(f"model: m\ntrain_data: t\noutput_dir: o\n{lines}")
        return load_settings(path)

    return write_and_load


def steps_due(frequency, *, steps_per_epoch, total_steps):
    steps = range(1, total_steps + 1)
    return [step for step in steps if frequency.is_due(step, steps_per_epoch, total_steps)]


def test_an_interval_of_steps_continues_across_epochs():
    every_4_steps = Frequency(times=1, period=4)
    assert steps_due(every_4_steps, steps_per_epoch=6, total_steps=13) == [4, 8, 12]


def test_an_interval_below_1_is_a_fraction_of_the_run_rounded_up(load):
    settings = load(eval_steps=0.25, save_steps="0.5")
    assert settings.saves == Frequency(times=1, period=0.5)
    due = steps_due(settings.evaluations, steps_per_epoch=6, total_steps=13)
    assert due == [4, 8, 12]
    assert len(steps_due(Frequency(1, 0.07), steps_per_epoch=50, total_steps=100)) == 14
    short = steps_due(settings.evaluations, steps_per_epoch=1, total_steps=2)
    assert short == [1, 2]


@pytest.mark.parametrize("value", ["0", "1.5", "0.0", "-0.5", "1.0"])
def test_an_interval_that_is_neither_whole_nor_a_fraction_is_refused(load, value):
    with refused("RUN.yaml:4", "eval_steps", value):
        load(eval_steps=value)


def test_an_evaluation_once_per_epoch_is_due_at_the_last_step_of_the_epoch():
    once_per_epoch = Frequency(times=1)
    assert steps_due(once_per_epoch, steps_per_epoch=6, total_steps=13) == [6, 12]


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("times", [1, 2, 3, 4, 9])
def test_each_epoch_has_the_requested_number_of_evaluations_at_even_distances(
    times, steps_per_epoch
):
    due = steps_due(
        Frequency(times), steps_per_epoch=steps_per_epoch, total_steps=3 * steps_per_epoch
    )
    assert len(due) == 3 * min(times, steps_per_epoch)  # at most one evaluation after each step
    last_steps_of_epochs = {steps_per_epoch, 2 * steps_per_epoch, 3 * steps_per_epoch}
    assert last_steps_of_epochs <= set(due)
    gaps = [later - earlier for earlier, later in pairwise([0, *due])]
    assert max(gaps) - min(gaps) <= 1


def test_eval_steps_needs_no_evaluation_strategy(load):
    assert load(eval_steps=7).evaluations == Frequency(times=1, period=7)
    assert load(eval_steps=7, evaluation_strategy="epoch").evaluations == Frequency(times=1)
    assert load().evaluations == Frequency(times=1)


def test_evals_and_saves_per_epoch_need_no_strategy(load):
    assert load(evals_per_epoch=4).evaluations == Frequency(times=4)
    assert load(saves_per_epoch=2).saves == Frequency(times=2)


def test_strategy_no_means_never(load):
    settings = load(evaluation_strategy="no", save_strategy="no")
    assert (settings.evaluations, settings.saves) == (None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"evals_per_epoch": 4, "eval_steps": 10},
        {"saves_per_epoch": 4, "save_steps": 10},
        {"warmup_steps": 10, "warmup_ratio": 0.1},
        {"evals_per_epoch": 4, "evaluation_strategy": "steps"},
        {"saves_per_epoch": 4, "save_strategy": "no"},
        {"evaluation_strategy": "steps", "eval_steps": "null"},
    ],
)
def test_two_keys_that_contradict_each_other_are_refused(load, values):
    with refused("RUN.yaml", *values):
        load(**values)


@pytest.mark.parametrize("value", ["1.5", "-1", "yes", "1e3000"])
def test_warmup_steps_that_are_neither_whole_nor_a_fraction_are_refused(load, value):
    with refused("RUN.yaml:4", "warmup_steps"):
        load(warmup_steps=value)


@pytest.mark.parametrize(
    "values",
    [
        {"warmup_steps": 10},
        {"evals_per_epoch": 4, "saves_per_epoch": 3},
        {"eval_steps": 7},
        {"eval_steps": 0.25},
        {"max_steps": 100},
        {"epochs": 2.5},
    ],
)
def test_dumped_settings_load_as_the_same_settings(load, tmp_path, values):
    settings = load(**values)
    (tmp_path / "run.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "run.yaml") == settings


def test_whole_epochs_are_dumped_as_an_integer(load):
    """Otherwise a run of an earlier version with `epochs: 3` in run.yaml would count as changed."""
    assert "epochs: 3\n" in dump_settings(load(epochs="3.0"))


def test_epochs_are_auto_only_if_max_steps_is_set(load):
    assert load(max_steps=5).epochs == "auto"
    assert load(max_steps=5, epochs=2).epochs == 2
    assert load().epochs == 1
    with refused("RUN.yaml:4", "epochs", "max_steps"):
        load(epochs="auto")
