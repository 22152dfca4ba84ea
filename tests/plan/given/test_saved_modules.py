"""modules_to_save: names, counts, costs, and refusals of modules that are trained in full."""

from dataclasses import replace

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.per_token import cost_per_token, sequence_flops
from pipeline.plan.given.adapter_counts import trainable_parameters
from pipeline.plan.given.saved_modules import saved_modules
from pipeline.plan.given.shape import shape_of
from tests.messages import refused
from tests.plans import LLAMA_8B

pytestmark = pytest.mark.unit

UNTIED = shape_of(LLAMA_8B, "model")
TIED = replace(UNTIED, is_tied=True)
MATRIX = 128256 * 4096


def run(**values):
    return RunSettings.model_validate({"model": "m", "train_data": "t", "output_dir": "o"} | values)


def names(shape, *entries):
    return [module.name for module in saved_modules(shape, run(modules_to_save=list(entries)))]


def test_names_may_be_full_or_last_parts():
    assert names(UNTIED, "lm_head", "model.embed_tokens") == ["model.embed_tokens", "lm_head"]
    assert names(UNTIED, "embed_tokens") == ["model.embed_tokens"]
    assert names(UNTIED) == []


def test_a_tied_pair_is_one_module_whichever_is_named():
    (module,) = saved_modules(TIED, run(modules_to_save=["lm_head"]))
    assert (module.name, module.tied_name) == ("model.embed_tokens", "lm_head")
    assert module.is_head
    assert names(TIED, "embed_tokens", "lm_head") == ["model.embed_tokens"]


@pytest.mark.parametrize("name", ["q_proj", "norm", "tokens", ""])
def test_other_modules_are_refused(name):
    with refused("modules_to_save", "model.embed_tokens", "lm_head", "lora_target_modules"):
        names(UNTIED, name)


def test_embeddings_of_another_width_are_refused():
    with refused("modules_to_save", "embed_tokens"):
        names(replace(UNTIED, embeddings_name="", head_name=""), "embed_tokens")


def test_trained_modules_are_counted_and_a_trained_head_costs_a_weight_gradient():
    both = run(modules_to_save=["embed_tokens", "lm_head"])
    embeddings = run(modules_to_save=["embed_tokens"])
    plain = trainable_parameters(UNTIED, run())
    assert trainable_parameters(UNTIED, both) == plain + 2 * MATRIX
    assert trainable_parameters(TIED, both) == plain + MATRIX
    assert trainable_parameters(replace(UNTIED, has_head_bias=True), both) == (
        plain + 2 * MATRIX + 128256
    )
    per_logit = [
        sequence_flops(cost_per_token(UNTIED, settings, "bfloat16")).per_logit
        for settings in (run(), embeddings, both)
    ]
    assert per_logit == [4 * MATRIX, 4 * MATRIX, 6 * MATRIX]
