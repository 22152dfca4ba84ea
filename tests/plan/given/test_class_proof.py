"""Proof: cached results of checks whether a model class is trained correctly; they restrict a plan.

The checks compare loss and gradients with those of the class. A class mixes documents if tokens of
a pack depend on its other documents.
"""

import json
from dataclasses import asdict, replace

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.given import class_proof
from pipeline.plan.given.class_proof import (
    Proof,
    adapted_names,
    cached_proof,
    ensure_proof,
    proof_file,
)
from pipeline.plan.given.shape import read_shape
from pipeline.plan.given.torch_process import cached_result
from pipeline.plan.plan import make_plan
from pipeline.plan.render import plan_json, plan_text
from tests.messages import assert_mentions, refused
from tests.plans import CPU, LLAMA_8B, SMOLLM2

pytestmark = pytest.mark.unit

MIXING = Proof(errors={"loss": 2e-7}, without_packs=["1 of 4 blocks keep documents separate"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """A model folder with a config.json only."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    return folder


def settings_for(model, **settings):
    values = {"model": str(model), "train_data": "t", "output_dir": "o", "bf16": False}
    return RunSettings.model_validate(values | settings)


def plan_for(settings):
    return make_plan(
        settings, read_shape(str(settings.model_folder)), CPU, nodes=1, ranks_per_node=2
    )


def store(settings, proof):
    """Write a proof to the cache, as if the checks of the model class had these results."""
    shape = read_shape(str(settings.model_folder))
    names = adapted_names(shape, settings)
    path = proof_file(settings.model_folder, names, trust_remote_code=False)
    cached_result(path, lambda: asdict(proof))


def test_packing_is_off_by_default_for_a_class_that_mixes_documents(model):
    settings = settings_for(model)
    store(settings, MIXING)
    plan = plan_for(settings)
    assert plan.settings.packing is False
    assert_mentions(plan.why["packing"], "1 of 4 blocks")
    assert "packs of" not in plan_text(plan)


def test_packing_true_is_refused_for_a_class_that_mixes_documents(model):
    settings = settings_for(model, packing=True)
    store(settings, MIXING)
    with refused("packing", "1 of 4 blocks", "rule class-packs"):
        plan_for(settings)


def test_a_class_that_the_checks_refuse_has_no_plan(model):
    settings = settings_for(model)
    store(settings, Proof(refusals=["loss differs by 1.0e-01 (at most 1e-05)"]))
    with refused("loss differs by 1.0e-01", "rule class-refused"):
        plan_for(settings)


def test_wrong_gradients_of_re_entrant_checkpointing_exclude_zero_3(model):
    settings = settings_for(model, gradient_checkpointing=True)
    store(settings, Proof(without_reentrant=["gradients differ by 0.5"]))
    assert plan_for(settings).layout.zero_stage < 3
    with refused("0.5", "rule class-re-entrant"):
        plan_for(settings.model_copy(update={"zero_stage": 3}))


def test_the_plan_has_the_errors_of_the_checks(model):
    settings = settings_for(model)
    store(settings, MIXING)
    values = plan_json(plan_for(settings))
    assert values["proof"]["errors"] == {"loss": 2e-7}
    assert_mentions(values["choice"]["why"]["proof"], "2.0e-07", "loss")


@pytest.mark.parametrize(
    "change",
    [{"lora_target_modules": ["q_proj"]}, {"trust_remote_code": True}],
)
def test_a_cached_proof_depends_on_adapted_layers_and_model_code(model, change):
    settings = settings_for(model)
    store(settings, MIXING)
    shape = read_shape(str(model))
    assert cached_proof(shape, settings).errors == MIXING.errors
    assert cached_proof(shape, settings.model_copy(update=change)) is None


def test_a_cached_proof_depends_on_the_model_config(model):
    settings = settings_for(model)
    store(settings, MIXING)
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    assert cached_proof(read_shape(str(model)), settings) is None


def test_a_known_family_is_planned_without_the_checks(model, monkeypatch):
    monkeypatch.setattr(class_proof, "_run_checks", None)
    ensure_proof(settings_for(model), read_shape(str(model)))


def test_a_cache_that_cannot_be_written_is_refused_with_its_path(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKZERO_CACHE", str(tmp_path / "file"))
    shape = replace(read_shape(str(model)), is_from_class=True)  # no known family: needs checks
    with refused("RANKZERO_CACHE", str(tmp_path / "file")):
        ensure_proof(settings_for(model), shape)
