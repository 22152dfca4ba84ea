"""Base models and adapters for tests of merging, and the contents of their folders."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.adapter.merge import merge_adapters
from pipeline.adapter.merge_plan import MergeOptions, WeightedAdapter
from tests.tiny import make_model

SEVEN_PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
CASES = {  # options of `make_model`
    "tied": {"tied": True, "dtype": "float32", "shards": 1},
    "untied-shards": {"tied": False, "dtype": "float32", "shards": 3},
    "tied-bf16-shards": {"tied": True, "dtype": "bfloat16", "shards": 3},
    "untied-fp16": {"tied": False, "dtype": "float16", "shards": 1},
}


def make_adapter(base, folder, targets=SEVEN_PROJECTIONS, **options):
    """Save an adapter with peft; its A and B matrices are random."""
    options = {"r": 4, "lora_alpha": 12} | options
    config = LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def make_pair(folder, case):
    """Write a base model to folder/base and an adapter for it to folder/adapter."""
    make_adapter(make_model(folder / "base", **CASES[case]), folder / "adapter")
    return folder


def tensors(folder):
    """All tensors in the safetensors files of a folder, by name."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def contents(folder):
    """The bytes of all files in a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def merge_adapter(base, adapter, out, **options):
    """Merge one adapter."""
    return merge_adapters(base, [WeightedAdapter(adapter)], out, MergeOptions(**options))
