"""A model that is not a causal language model is detected by its config.json."""

import pytest

from pipeline.plan.given.objective import bidirectional_entry, other_head
from pipeline.plan.given.shape import shape_of
from tests.plans import LLAMA_8B

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("config_keys", "entry"),
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
def test_the_reason_has_the_entry_of_config_json_that_makes_a_model_bidirectional(
    config_keys, entry
):
    assert entry in bidirectional_entry(config_keys)
    assert entry in shape_of(LLAMA_8B | config_keys, "m").bidirectional_entry


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Xyz"])
@pytest.mark.parametrize(
    "head",
    ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel",
     "ForRewardModel", "ForProcessReward", "ForScore"],
)  # fmt: skip
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_reason_has_the_class_of_a_model_without_a_language_model_head(family, head, is_tied):
    class_name = f"{family}{head}"
    assert class_name in other_head({"architectures": [class_name]}, is_tied=is_tied)
    shape = shape_of(LLAMA_8B | {"architectures": [class_name]}, "m")
    assert class_name in shape.other_head


def test_a_model_saved_without_its_head_is_accepted_only_if_the_embeddings_are_the_head():
    config = {"architectures": ["LlamaModel"]}
    assert "LlamaModel" in other_head(config, is_tied=False)
    assert not other_head(config, is_tied=True)


@pytest.mark.parametrize(
    "config_keys",
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
def test_a_causal_language_model_is_accepted(config_keys):
    assert not bidirectional_entry(config_keys)
    assert not other_head(config_keys, is_tied=False)
