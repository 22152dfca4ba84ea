"""A model that is not a causal language model is detected by its config.json."""

import pytest

from pipeline.plan.given.objective import bidirectional, other_head
from pipeline.plan.given.shape import shape_of
from tests.plans import LLAMA_8B

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("values", "entry"),
    [
        ({"is_causal": False}, "is_causal: False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: all"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: True"),
        ({"architectures": ["LlamaBidirectionalModel"]}, "LlamaBidirectionalModel"),
        ({"architectures": ["MistralBiModel"]}, "MistralBiModel"),
        ({"architectures": ["LlamaBidirectionalForCausalLM"]}, "LlamaBidirectionalForCausalLM"),
        ({"architectures": ["Qwen2ForMaskedLM"]}, "Qwen2ForMaskedLM"),
    ],
)
def test_the_entry_that_makes_a_model_bidirectional_is_named(values, entry):
    assert entry in bidirectional(values)
    assert entry in shape_of(LLAMA_8B | values, "m").bidirectional


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Xyz"])
@pytest.mark.parametrize(
    "head",
    ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel",
     "ForRewardModel", "ForProcessReward", "ForScore"],
)  # fmt: skip
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_other_than_a_language_model_head_is_named(family, head, is_tied):
    name = f"{family}{head}"
    assert name in other_head({"architectures": [name]}, is_tied=is_tied)
    shape = shape_of(LLAMA_8B | {"architectures": [name]}, "m")
    assert name in shape.other_head


def test_a_backbone_has_a_head_only_if_its_embeddings_are_tied():
    config = {"architectures": ["LlamaModel"]}
    assert "LlamaModel" in other_head(config, is_tied=False)
    assert not other_head(config, is_tied=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM"], "is_causal": True},
        {"architectures": ["GPT2LMHeadModel"], "is_encoder_decoder": False},
        {"architectures": ["Mistral3ForConditionalGeneration"]},
        {"architectures": ["Gemma4ForConditionalGeneration"],
         "use_bidirectional_attention": "vision"},
        {"architectures": ["OwnModel"], "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}},
    ],
)  # fmt: skip
def test_a_causal_language_model_is_accepted(values):
    assert not bidirectional(values)
    assert not other_head(values, is_tied=False)
