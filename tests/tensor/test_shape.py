"""Parameter counts from config.json equal transformers' and peft's, on the meta device."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.adapter import expected_shapes, file_key, lora_config
from tests.tiny import make_plan

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("smollm3", {}),
    ("phi3", {"lora_target_modules": PHI3}),
]


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_counts_equal_the_real_model(tmp_path, kind, change):
    settings = {key: change[key] for key in change if key.startswith("lora")}
    keys = SMALL | {key: change[key] for key in change if not key.startswith("lora")}
    if kind in ("phi3", "qwen2"):
        keys = {key: value for key, value in keys.items() if key != "head_dim"}
    config = AutoConfig.for_model(kind, **keys)
    config.save_pretrained(tmp_path)
    plan = make_plan(tmp_path, lora_r=4, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == plan.shape.parameters
        wrapped = get_peft_model(model, lora_config(plan.settings))
    found = {
        file_key(name): tuple(p.shape) for name, p in wrapped.named_parameters() if p.requires_grad
    }
    assert found == expected_shapes(plan)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == plan.trainable
