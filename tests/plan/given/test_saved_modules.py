"""modules_to_save: embeddings and head that are trained in full, in addition to the adapter."""

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
VOCAB_SIZE = 128256
MATRIX = VOCAB_SIZE * 4096  # weights of the embeddings, and of the head


def run(**settings):
    required = {"model": "m", "train_data": "t", "output_dir": "o"}
    return RunSettings.model_validate(required | settings)


def names(shape, *entries):
    """Full names of the modules that these entries of modules_to_save select."""
    return [module.name for module in saved_modules(shape, run(modules_to_save=list(entries)))]


def test_an_entry_is_the_full_name_of_a_module_or_its_last_part():
    assert names(UNTIED, "lm_head", "model.embed_tokens") == ["model.embed_tokens", "lm_head"]
    assert names(UNTIED, "embed_tokens") == ["model.embed_tokens"]
    assert names(UNTIED) == []


def test_tied_embeddings_and_head_are_one_module_whether_an_entry_has_one_or_the_other():
    (module,) = saved_modules(TIED, run(modules_to_save=["lm_head"]))
    assert (module.name, module.tied_name) == ("model.embed_tokens", "lm_head")
    assert module.is_head
    assert names(TIED, "embed_tokens", "lm_head") == ["model.embed_tokens"]


@pytest.mark.parametrize("name", ["q_proj", "norm", "tokens", ""])
def test_other_modules_are_refused(name):
    with refused("modules_to_save", "model.embed_tokens", "lm_head", "lora_target_modules"):
        names(UNTIED, name)


def test_embeddings_of_another_width_than_the_blocks_are_refused():
    with refused("modules_to_save", "embed_tokens"):  # such a shape has no name of embeddings
        names(replace(UNTIED, embeddings_name="", head_name=""), "embed_tokens")


EMBEDDINGS = run(modules_to_save=["embed_tokens"])
EMBEDDINGS_AND_HEAD = run(modules_to_save=["embed_tokens", "lm_head"])


def test_the_parameters_of_saved_modules_are_trainable():
    adapter = trainable_parameters(UNTIED, run())
    assert trainable_parameters(UNTIED, EMBEDDINGS_AND_HEAD) == adapter + 2 * MATRIX
    assert trainable_parameters(TIED, EMBEDDINGS_AND_HEAD) == adapter + MATRIX
    with_bias = replace(UNTIED, has_head_bias=True)
    num_trainable = trainable_parameters(with_bias, EMBEDDINGS_AND_HEAD)
    assert num_trainable == adapter + 2 * MATRIX + VOCAB_SIZE


@pytest.mark.parametrize(
    ("settings", "flops_per_weight"), [(run(), 4), (EMBEDDINGS, 4), (EMBEDDINGS_AND_HEAD, 6)]
)
def test_a_trained_head_has_two_more_flops_per_weight_for_its_weight_gradient(
    settings, flops_per_weight
):
    flops = sequence_flops(cost_per_token(UNTIED, settings, "bfloat16"))
    assert flops.per_logit == flops_per_weight * MATRIX
