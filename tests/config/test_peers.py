"""Options of other programs: each gets a hint, all of them in one message."""

import pytest

from pipeline.config.load import load_settings
from pipeline.config.peers import ADVICE, advice
from pipeline.config.settings import RunSettings, settings_by
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
MEANT = {
    "base_model": "model", "datasets": "train_data", "val_set_size": "eval_data: 0.05",
    "adapter": "load_in_4bit: true", "sequence_len": "max_length", "sample_packing": "packing",
    "lora_target_linear": "lora_target_modules: all-linear", "micro_batch_size": "batch_size",
    "num_epochs": "epochs", "optimizer": "AdamW", "lr_scheduler": "lr_scheduler_type",
    "learning_rate": "lr", "wandb_project": "metrics.jsonl",
    "flash_attention": "use_flash_attention", "special_tokens": "chat_template",
}  # fmt: skip


def test_a_peers_run_file_gets_one_message_with_a_line_for_each_option(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text(AXOLOTL)
    with pytest.raises(UserError) as error:
        load_settings(path)
    lines = str(error.value).splitlines()
    assert len(lines) == len(MEANT)  # model and train_data are not missed on top of it
    for line, (key, meant) in zip(lines, MEANT.items(), strict=True):
        number = (
            AXOLOTL.splitlines().index(next(s for s in AXOLOTL.splitlines() if s.startswith(key)))
            + 1
        )
        assert_mentions(line, f"RUN.yaml:{number}: {key}:", meant)


@pytest.mark.parametrize("name", settings_by("peers"))
def test_a_peers_name_of_a_setting_names_the_setting(name):
    assert_mentions(advice(name), settings_by("peers")[name])


@pytest.mark.parametrize("key", ["--learning-rate", "Learning_Rate", "learning-rate"])
def test_a_name_is_known_however_it_is_spelt(key):
    assert_mentions(advice(key), "lr")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("optim", "AdamW"), ("optimizer", "AdamW"), ("group_by_length", "packing"),
        ("device_map", "zero_stage"), ("report_to", "metrics.jsonl"), ("fsdp_config", "ZeRO"),
        ("per_device_eval_batch_size", "batch_size"), ("max_samples", "limit"),
        ("adam_beta2", "deepspeed_json"), ("adam_epsilon", "deepspeed_json"),
        ("lora_bias", "LoRA"), ("quantization_bit", "load_in_4bit: true"),
    ],
)  # fmt: skip
def test_an_option_without_a_setting_says_what_does_its_work(key, reason):
    assert_mentions(advice(key), reason)


def test_no_pattern_hides_a_setting_or_a_peers_name():
    for name in [*RunSettings.model_fields, *settings_by("peers")]:
        assert name not in ADVICE
    assert all("\n" not in text and len(text) < 130 for text in ADVICE.values())


def test_a_name_of_nobody_is_near_to_a_setting_or_sent_to_the_page(tmp_path):
    assert advice("lora_rnk") is None
    path = tmp_path / "RUN.yaml"
    path.write_text("model: m\ntrain_data: t\noutput_dir: o\nlora_rnk: 8\nqqqq: 1\n")
    with pytest.raises(UserError) as error:
        load_settings(path)
    first, second = str(error.value).splitlines()
    assert_mentions(first, "RUN.yaml:4", "lora_rnk", "lora_r")
    assert_mentions(second, "RUN.yaml:5", "qqqq", "docs/configuration.md")
