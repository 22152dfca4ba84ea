"""Traits: facts about each setting, stored on its Field (pipeline/config/traits.py)."""

from typing import get_args

import pytest

from pipeline.config.settings import RunSettings, settings_by, settings_with
from pipeline.config.traits import Change
from pipeline.plan.deepspeed.keys import TOP_LEVEL, ZERO_OPTIMIZATION
from pipeline.plan.given.layout import Layout

pytestmark = pytest.mark.unit

NAMES = set(RunSettings.model_fields)


def test_each_setting_has_exactly_one_kind_of_change():
    """The kind says what a changed value means for a run that is started again."""
    groups = [settings_with(change) for change in get_args(Change)]
    assert all(groups), "a kind of change without a setting"
    assert sorted(name for group in groups for name in group) == sorted(NAMES)


def test_a_changed_path_alone_does_not_make_another_run():
    """A run resumes from another output_dir, and from moved models and data with the same content.

    Settings with the change "base" or "files" are compared by content; those with "run" may differ.
    """
    assert settings_with("base") == {"model", "model_revision"}
    assert settings_with("files") == {"train_data", "eval_data"}
    assert "output_dir" in settings_with("run")


def test_settings_that_affect_the_adapter_have_the_change_result():
    """After a change of kind "result", the run is not resumed."""
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


def test_each_peer_name_belongs_to_one_setting_and_is_not_a_setting_here():
    """Peers: names of a setting in other training programs."""
    peers = [name for field in RunSettings.model_fields.values() for name in _peers(field)]
    assert len(peers) == len(set(peers)) == len(settings_by("peers"))
    assert not NAMES & set(peers)


def _peers(field):
    return field.json_schema_extra["peers"] if field.json_schema_extra else []
