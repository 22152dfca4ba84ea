"""Advice: what to write instead of an option, or a value, of another training program.

A run file with such options is refused with one message, which has a line of advice for each. The
trait "peers" of a setting has its names in other programs.
"""

import pytest

from pipeline.config.load import load_settings
from pipeline.config.peers import ADVICE, advice, value_advice
from pipeline.config.peers import VALUES as ADVICE_ON_VALUES
from pipeline.config.settings import RunSettings, settings_by_trait
from pipeline.errors import UserError
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit

AXOLOTL = """
base_model: org/name
load_in_4bit: true
datasets:
  - path: org/data
    type: chat_template
val_set_size: 0.05
output_dir: ./out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_target_linear: true
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
wandb_project: x
flash_attention: true
special_tokens:
"""
ADVICE_FOR_AXOLOTL = {
    "base_model": "model", "datasets": "train_data", "val_set_size": "eval_data: 0.05",
    "adapter": "load_in_4bit: true", "sequence_len": "max_length", "sample_packing": "packing",
    "lora_target_linear": "lora_target_modules: all-linear", "micro_batch_size": "batch_size",
    "num_epochs": "epochs", "optimizer": "AdamW", "lr_scheduler": "lr_scheduler_type",
    "learning_rate": "lr", "wandb_project": "tracker_project",
    "flash_attention": "use_flash_attention", "special_tokens": "chat_template",
}  # fmt: skip


def test_a_run_file_of_axolotl_gets_one_message_with_a_line_for_each_option(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text(AXOLOTL)
    with pytest.raises(UserError) as error:
        load_settings(path)
    lines = str(error.value).splitlines()
    # base_model and datasets stand for model and train_data, which are not reported as missing.
    assert len(lines) == len(ADVICE_FOR_AXOLOTL)
    keys = [line.partition(":")[0] for line in AXOLOTL.splitlines()]
    for line, (key, expected) in zip(lines, ADVICE_FOR_AXOLOTL.items(), strict=True):
        line_number = keys.index(key) + 1
        assert_mentions(line, f"RUN.yaml:{line_number}: {key}:", expected)


@pytest.mark.parametrize("name", settings_by_trait("peers"))
def test_a_name_of_another_program_is_answered_with_the_setting(name):
    assert_mentions(advice(name), settings_by_trait("peers")[name])


@pytest.mark.parametrize("key", ["--learning-rate", "Learning_Rate", "learning-rate"])
def test_an_option_may_have_upper_case_hyphens_and_leading_dashes(key):
    assert_mentions(advice(key), "lr")


@pytest.mark.parametrize(
    ("option", "replacement"),
    [
        ("optim", "AdamW"), ("optimizer", "AdamW"), ("group_by_length", "packing"),
        ("device_map", "zero_stage"), ("fsdp_config", "ZeRO"),
        ("use_wandb", "trackers"), ("comet_ml_project", "trackers"),
        ("per_device_eval_batch_size", "batch_size"), ("max_samples", "limit"),
        ("adam_beta2", "deepspeed_json"), ("adam_epsilon", "deepspeed_json"),
        ("num_gpus", "launcher"), ("use_galore", "AdamW"), ("label_smoothing_factor", "loss"),
        ("rope_scaling", "config.json"), ("response_template", "train_on: assistant"),
        ("dataloader_pin_memory", "memory-mapped"), ("ddp_bucket_cap_mb", "DeepSpeed"),
        ("add_tokens", "new_tokens"), ("new_special_tokens", "new_tokens"),
        ("peft_layers_pattern", "layers_to_transform"), ("loftq_bits", "init_lora_weights: loftq"),
        ("peft_trainable_token_indices", "modules_to_save"), ("peft", "init_lora_weights: loftq"),
        ("peft_autocast_adapter_dtype", "fp32"), ("peft_layer_replication", "not supported"),
        ("peft_ensure_weight_tying", "modules_to_save"),
        ("lora_bias", "LoRA"), ("quantization_bit", "load_in_4bit: true"),
    ],
)  # fmt: skip
def test_the_advice_on_an_option_without_a_setting_has_its_replacement(option, replacement):
    assert_mentions(advice(option), replacement)


def test_the_table_of_advice_has_no_setting_and_no_other_name_of_a_setting():
    for name in [*RunSettings.model_fields, *settings_by_trait("peers")]:
        assert name not in ADVICE


def test_each_advice_is_one_short_line():
    assert all("\n" not in text and len(text) < 130 for text in ADVICE.values())


def test_an_unknown_name_gets_a_similar_setting_or_the_page_of_all_settings(tmp_path):
    assert advice("lora_rnk") is None
    path = tmp_path / "RUN.yaml"
    path.write_text("model: m\ntrain_data: t\noutput_dir: o\nlora_rnk: 8\nqqqq: 1\n")
    with pytest.raises(UserError) as error:
        load_settings(path)
    first, second = str(error.value).splitlines()
    assert_mentions(first, "RUN.yaml:4", "lora_rnk", "lora_r")
    assert_mentions(second, "RUN.yaml:5", "qqqq", "docs/configuration.md")


BASE = "model: m\ntrain_data: t.jsonl\noutput_dir: o\n"
# Lines with a value of another program, and facts that the message has about it.
VALUES_OF_PEERS = {
    "lr_scheduler_type: constant_with_warmup": ["constant"],
    "lr_scheduler: cosine_with_restarts": ["lr_scheduler_type", "linear, cosine and constant"],
    "lr_scheduler_type: polynomial": ["linear, cosine and constant"],
    "lr_scheduler: cosine_with_min_lr": ["lr_scheduler_type", "min_lr_ratio"],
    "optim: adamw_bnb_8bit": ["AdamW"],
    "bf16: full": ["true", "fp32 masters"],
    "gradient_checkpointing: unsloth": ["true"],
    "lora_target: all": ["lora_target_modules", "all-linear"],
    "lora_target_modules: all": ["all-linear"],
    "lora_target_linear: true": ["lora_target_modules: all-linear"],
    "max_steps: -1": ["leave it out"],
    "save_strategy: best": ["keep_best"],
    "eval_strategy: false": ["evaluation_strategy", '"no"'],
    "evaluation_strategy: false": ['"no"'],
    "val_set_size: 0.05": ["eval_data: 0.05"],
    "sample_packing: auto": ["packing", "true"],
    "resume_from_checkpoint: true": ["resume", "auto"],
    "resume: true": ["auto"],
    "zero_stage: 0": ["1"],
    "flash_attn: fa2": ["use_flash_attention", "true"],
    "chat_template: tokenizer_default": ["model"],
    "template: llama3": ["chat_template", "model"],
    "fp16:": ["leave it out"],
    "datasets: [{path: org/data, type: chat_template, split: train}]":
        ["train_data", "type", "format", "split", "ORG/NAME:train"],
    "truncation_strategy: delete": ["over_length", "drop"],
}  # fmt: skip


@pytest.mark.parametrize("line", VALUES_OF_PEERS)
def test_a_value_of_another_program_is_answered_with_the_value_to_write(tmp_path, line):
    path = tmp_path / "RUN.yaml"
    path.write_text(BASE + line + "\n")
    with pytest.raises(UserError) as error:
        load_settings(path)
    (message,) = str(error.value).splitlines()
    assert_mentions(message, "RUN.yaml:4", line.split(":")[0], *VALUES_OF_PEERS[line])


def test_advice_on_many_values_is_in_one_message(tmp_path):
    line_of_key = {line.split(":")[0]: line for line in VALUES_OF_PEERS}  # one line for each key
    path = tmp_path / "RUN.yaml"
    path.write_text(BASE + "\n".join(line_of_key.values()) + "\n")
    with pytest.raises(UserError) as error:
        load_settings(path)
    keys_in_message = [line.split(": ")[1] for line in str(error.value).splitlines()]
    assert sorted(keys_in_message) == sorted(line_of_key)


def test_a_valid_value_gets_no_advice():
    settings = RunSettings.model_validate({"model": "m", "train_data": "t", "output_dir": "o"})
    for setting in ADVICE_ON_VALUES:
        assert value_advice(setting, getattr(settings, setting), is_valid=True) is None
    assert value_advice("eval_steps", 50) is None
