"""A remembered proof decides what a plan allows; without one the checks run in a subprocess."""

import json

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.given import class_proof
from pipeline.plan.given.class_proof import (
    Proof,
    adapted_names,
    cached_proof,
    ensure_proof,
    proof_file,
    write_proof,
)
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.plan.render import plan_json, plan_text
from tests.messages import assert_mentions, refused
from tests.plans import CPU, LLAMA_8B, SMOLLM2

pytestmark = pytest.mark.unit

LEAKS = Proof(errors={"loss": 2e-7}, without_packs=["1 of 4 blocks keep documents separate"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    return folder


def settings_for(model, **settings):
    values = {"model": str(model), "train_data": "t", "output_dir": "o", "bf16": False}
    return RunSettings.model_validate(values | settings)


def planned(settings):
    return make_plan(
        settings, read_shape(str(settings.model_folder)), CPU, nodes=1, ranks_per_node=2
    )


def remember(settings, proof):
    shape = read_shape(str(settings.model_folder))
    names = adapted_names(shape, settings)
    write_proof(proof_file(settings.model_folder, names, trust_remote_code=False), proof)


def test_packs_that_the_user_did_not_ask_for_are_left_out_where_the_class_mixes_documents(model):
    settings = settings_for(model)
    remember(settings, LEAKS)
    plan = planned(settings)
    assert plan.settings.packing is False
    assert_mentions(plan.why["packing"], "1 of 4 blocks")
    assert "packs of" not in plan_text(plan)


def test_packs_that_the_user_asked_for_are_refused_where_the_class_mixes_documents(model):
    settings = settings_for(model, packing=True)
    remember(settings, LEAKS)
    with refused("packing", "1 of 4 blocks", "rule class-packs"):
        planned(settings)


def test_what_the_proof_refuses_is_no_plan(model):
    settings = settings_for(model)
    remember(settings, Proof(refusals=["loss differs by 1.0e-01 (at most 1e-05)"]))
    with refused("loss differs by 1.0e-01", "rule class-refused"):
        planned(settings)


def test_wrong_gradients_of_re_entrant_blocks_choose_another_stage(model):
    settings = settings_for(model, gradient_checkpointing=True)
    remember(settings, Proof(without_reentrant=["gradients differ by 0.5"]))
    assert planned(settings).layout.zero_stage < 3
    with refused("0.5", "rule class-re-entrant"):
        planned(settings.model_copy(update={"zero_stage": 3}))


def test_the_errors_stand_in_the_plan(model):
    settings = settings_for(model)
    remember(settings, LEAKS)
    values = plan_json(planned(settings))
    assert values["proof"]["errors"] == {"loss": 2e-7}
    assert_mentions(values["choice"]["why"]["proof"], "2.0e-07", "loss")


@pytest.mark.parametrize(
    "change",
    [{"lora_target_modules": ["q_proj"]}, {"trust_remote_code": True}],
)
def test_a_proof_is_of_the_adapted_layers_and_of_the_code_that_runs(model, change):
    settings = settings_for(model)
    remember(settings, LEAKS)
    shape = read_shape(str(model))
    assert cached_proof(shape, settings).errors == LEAKS.errors
    assert cached_proof(shape, settings.model_copy(update=change)) is None


def test_a_proof_is_of_the_config(model):
    settings = settings_for(model)
    remember(settings, LEAKS)
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    assert cached_proof(read_shape(str(model)), settings) is None


def test_a_known_family_is_not_checked_before_the_plan(model, monkeypatch):
    monkeypatch.setattr(class_proof, "_run_checks", None)
    ensure_proof(settings_for(model), read_shape(str(model)))


def test_a_cache_that_cannot_be_written_is_named(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "file"))
    shape = read_shape(str(model))
    object.__setattr__(shape, "is_from_class", True)
    with refused("RANKZERO_CACHE", str(tmp_path / "file")):
        ensure_proof(settings_for(model), shape)
