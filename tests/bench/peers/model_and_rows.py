"""The model with its adapter, and the tokenised rows, for the bare loop and the Trainer."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def lora_config(case):
    return LoraConfig(
        r=case["lora_r"], lora_alpha=case["lora_alpha"], lora_dropout=case["lora_dropout"],
        target_modules=case["targets"], task_type="CAUSAL_LM",
    )  # fmt: skip


def quantisation(case):
    if not case["load_in_4bit"]:
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip


def load_model(case, **options):
    """The base in bf16 or 4 bits, with the adapter; `options` are of `get_peft_model`."""
    model = AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=torch.bfloat16, quantization_config=quantisation(case)
    )
    if case["load_in_4bit"]:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=case["gradient_checkpointing"]
        )
    model.config.use_cache = False
    return get_peft_model(model, lora_config(case), **options)


def tokenised_rows(case):
    """The tokenizer, and the token ids and labels of each row, a question with its answer.

    Labels are -100 except in the answer, the assistant's turn.
    """
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    rows = []
    for line in Path(case["rows"]).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        ids = token_ids(tokenizer, messages)
        prompt = token_ids(tokenizer, messages[:1], add_generation_prompt=True)
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        rows.append(
            {"input_ids": ids[: case["max_length"]], "labels": labels[: case["max_length"]]}
        )
    return tokenizer, rows


def token_ids(tokenizer, messages, **options):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
