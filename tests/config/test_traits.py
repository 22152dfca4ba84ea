"""Traits on the Fields of settings, from which the other packages derive their tables."""

from typing import get_args

import pytest

from pipeline.config.settings import RunSettings, settings_by, settings_with
from pipeline.config.traits import Change
from pipeline.plan.deepspeed.keys import TOP_LEVEL, ZERO_OPTIMIZATION
from pipeline.plan.given.layout import Layout

pytestmark = pytest.mark.unit

NAMES = set(RunSettings.model_fields)


def test_each_setting_belongs_to_exactly_one_kind_of_change():
    groups = [settings_with(change) for change in get_args(Change)]
    assert all(groups), "a kind of change without a setting"
    assert sorted(name for group in groups for name in group) == sorted(NAMES)


def test_paths_of_a_run_do_not_identify_it():
    """Runs are compared by the content of their data and weights, not by paths."""
    assert settings_with("base") == {"model", "model_revision"}
    assert settings_with("files") == {"train_data", "eval_data"}
    assert "output_dir" in settings_with("run")


def test_settings_that_affect_the_weights_count_as_result():
    names = {
        "lr",
        "lora_r",
        "seed",
        "global_batch_size",
        "bf16",
        "weight_decay",
        "load_in_4bit",
    }
    assert names <= settings_with("result")


def test_layout_fields_and_deepspeed_keys_of_traits_exist():
    assert settings_by("layout").keys() <= Layout.__dataclass_fields__.keys()
    for key in settings_by("deepspeed"):
        block, _, inner = key.partition(".")
        assert block in TOP_LEVEL, key
        assert block != "zero_optimization" or inner.split(".")[0] in ZERO_OPTIMIZATION, key


def test_a_name_of_another_program_belongs_to_one_setting_and_is_none_itself():
    peers = [name for field in RunSettings.model_fields.values() for name in _peers(field)]
    assert len(peers) == len(set(peers)) == len(settings_by("peers"))
    assert not NAMES & set(peers)


def _peers(field):
    return field.json_schema_extra["peers"] if field.json_schema_extra else []
