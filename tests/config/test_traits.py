"""Traits: facts about each setting, stored on its Field (pipeline/config/traits.py)."""

import re
from typing import get_args

import pytest
import yaml

from pipeline.config.load import dump_settings, load_settings
from pipeline.config.settings import (
    RunSettings,
    settings_by_trait,
    settings_with_change,
    settings_without_effect,
)
from pipeline.config.traits import Change
from pipeline.plan.deepspeed.keys import TOP_LEVEL, ZERO_OPTIMIZATION
from pipeline.plan.given.layout import Layout

pytestmark = pytest.mark.unit

NAMES = set(RunSettings.model_fields)


def test_each_setting_has_exactly_one_kind_of_change():
    """The kind says what a changed value means for a run that is started again."""
    groups = [settings_with_change(change) for change in get_args(Change)]
    assert all(groups), "a kind of change without a setting"
    assert sorted(name for group in groups for name in group) == sorted(NAMES)


def test_a_run_resumes_after_its_model_data_and_output_dir_have_moved():
    """The paths of model and data are not compared, only their contents; output_dir may change.

    The trait `change` is "base" for the model, "files" for data, and "run" for values that may
    change.
    """
    assert settings_with_change("base") == {"model", "model_revision"}
    assert settings_with_change("files") == {"train_data", "eval_data"}
    assert "output_dir" in settings_with_change("run")


def test_a_run_is_not_resumed_with_another_value_of_a_setting_that_affects_the_adapter():
    """The trait `change` of these settings is "result"."""
    names = {
        "lr",
        "lora_r",
        "seed",
        "global_batch_size",
        "bf16",
        "weight_decay",
        "load_in_4bit",
    }
    assert names <= settings_with_change("result")


def test_layout_fields_and_deepspeed_keys_of_traits_exist():
    assert settings_by_trait("layout").keys() <= Layout.__dataclass_fields__.keys()
    for key in settings_by_trait("deepspeed"):  # for example zero_optimization.stage
        top_level_key, _, nested_key = key.partition(".")
        assert top_level_key in TOP_LEVEL, key
        if top_level_key == "zero_optimization":
            assert nested_key.split(".")[0] in ZERO_OPTIMIZATION, key


def test_each_peer_name_belongs_to_one_setting_and_is_not_a_setting_here():
    """Peers: names of a setting in other training programs."""
    peers = [name for field in RunSettings.model_fields.values() for name in _peers(field)]
    assert len(peers) == len(set(peers)) == len(settings_by_trait("peers"))
    assert not NAMES & set(peers)


def _peers(field):
    return field.json_schema_extra["peers"] if field.json_schema_extra else []


REQUIRED = {"model": "m", "train_data": "t", "output_dir": "o"}
# Setting -> other settings with which it has no effect, and other settings with which it has one.
# `eval_data` is a number of rows.
WITHOUT_EFFECT = {
    "save_steps": ({"save_strategy": "epoch"}, {"save_strategy": "steps"}),
    "eval_steps": ({"eval_data": 9, "evaluation_strategy": "epoch"}, {"eval_data": 9}),
    "evals_per_epoch": ({}, {"eval_data": 9}),
    "bnb_4bit_quant_type": ({"load_in_8bit": True}, {"load_in_4bit": True}),
    "min_lr_ratio": ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "linear"}),
    "offload_param": ({"zero_stage": 2}, {"zero_stage": 3}),
    "dataloader_prefetch_factor": ({}, {"dataloader_num_workers": 2}),
    "offload_activations": ({"gradient_checkpointing": False}, {}),
    "run_name": ({}, {"trackers": ["wandb"]}),
    "max_rejected": ({"on_bad_row": "fail"}, {}),
    "chat_template": ({"data_format": "pre-tokenised"}, {"data_format": "messages"}),
    "split_turns": ({"data_format": "text"}, {}),
    "init_lora_weights": ({"init_adapter": "a"}, {}),
}
# Setting -> a value for the tests; defaults would not count as set by the user.
VALUES = {
    "save_steps": 100, "eval_steps": 5, "evals_per_epoch": 2, "bnb_4bit_quant_type": "nf4",
    "min_lr_ratio": 0.1, "offload_param": "cpu", "dataloader_prefetch_factor": 4, "run_name": "x",
    "max_rejected": 0.5, "chat_template": "chatml", "split_turns": True,
    "init_lora_weights": "gaussian", "offload_activations": True,
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_named_with_its_condition(name):
    others_without_effect, others_with_effect = WITHOUT_EFFECT[name]
    given = REQUIRED | {name: VALUES[name]}
    reasons = settings_without_effect(RunSettings.model_validate(given | others_without_effect))
    other_settings_in_reason = set(re.findall(r"\w+", reasons[name])) & (NAMES - {name})
    assert other_settings_in_reason
    assert not settings_without_effect(RunSettings.model_validate(given | others_with_effect))


@pytest.mark.parametrize("formats", [["text"], ["pre-tokenised", "text"]])
def test_settings_of_conversations_have_no_effect_on_rows_without_messages(formats):
    given = {"train_on_reasoning": False, "split_turns": True, "special_tokens_in_text": "reject"}
    settings = RunSettings.model_validate(REQUIRED | given)
    assert not settings_without_effect(settings)
    assert settings_without_effect(settings, formats).keys() == {
        "split_turns",
        "train_on_reasoning",
    }
    assert not settings_without_effect(settings, [*formats, "messages"])


def test_each_condition_names_another_setting_and_valid_values_of_it():
    """The trait `needs` is a list of conditions: KEY, KEY=A|B, !KEY or KEY!=A|B."""
    for name, field in RunSettings.model_fields.items():
        for condition in field.json_schema_extra["needs"] if field.json_schema_extra else ():
            key_and_negation, _, values = condition.partition("=")
            key = key_and_negation.strip("!")
            assert key in NAMES - {name}, condition
            for value in filter(None, values.split("|")):
                RunSettings.model_validate(REQUIRED | {key: yaml.safe_load(value)})


def test_default_values_in_a_run_yaml_are_not_reported_as_without_effect(tmp_path):
    """A run.yaml has all settings; here it has save_steps, which has no effect with "epoch"."""
    settings = RunSettings.model_validate(REQUIRED | {"save_strategy": "epoch"})
    assert not settings_without_effect(settings)
    (tmp_path / "run.yaml").write_text(dump_settings(settings))
    assert not settings_without_effect(load_settings(tmp_path / "run.yaml"))
