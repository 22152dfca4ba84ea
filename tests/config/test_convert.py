"""Configurations of other training programs are converted to run files with the same training.

Expected values that a configuration below does not have are the defaults of its program. The
expected global batch size is the product of micro-batch, accumulation steps and GPUs.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.config.convert import run_file_text
from pipeline.config.load import load_settings
from pipeline.config.peer_files import PeerConfig, read_peer_config
from pipeline.config.peers import ADVICE
from pipeline.config.settings import RunSettings, settings_by_trait
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.unit

AXOLOTL = """
base_model: org/base-8b
load_in_4bit: true
adapter: qlora
datasets:
  - path: org/chats
    type: chat_template
    split: train_sft
  - path: json
    data_files: rows/own.jsonl
    field_messages: dialogue
val_set_size: 0.02
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
evals_per_epoch: 2
wandb_project: bakery
flux_capacitor: 88
output_dir: ./out
"""
LLAMA_FACTORY = """
model_name_or_path: org/base-4b
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset: identity,chats
dataset_dir: registry
template: chatml
cutoff_len: 512
max_samples: 100
mask_history: true
output_dir: saves/first
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
max_steps: 50
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
bf16: true
quantization_bit: 4
report_to: none
eval_strategy: steps
eval_steps: 0.25
save_steps: 0.5
"""
SWIFT = r"""#!/bin/bash
MODEL=org/base-7b
CUDA_VISIBLE_DEVICES=0,1 swift sft \
    --model $MODEL \
    --tuner_type lora \
    --dataset 'org/alpaca#500' rows/own.jsonl \
    --torch_dtype bfloat16 \
    --target_modules all-linear \
    --split_dataset_ratio 0.01 \
    --max_length=2048 \
    --output_dir output
"""
TORCHTUNE = """
output_dir: out/lora
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: base/tokenizer.model
  max_seq_len: 1024
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_8b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: base
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: true
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
batch_size: 2
gradient_accumulation_steps: 8
epochs: 1
"""
TRL = """
model_name_or_path: org/base-1b
dataset_name: org/chats
use_peft: true
per_device_train_batch_size: 4
output_dir: out
"""


def converted(folder: Path, text: str, *, name: str = "config.yaml", gpus: int = 1) -> RunSettings:
    """Settings of the run file to which this configuration for `gpus` GPUs is converted."""
    return load_settings(write_run_file(folder, text, name=name, gpus=gpus))


def write_run_file(folder: Path, text: str, *, name: str = "config.yaml", gpus: int = 1) -> Path:
    """Write the configuration of another program and the run file to which it is converted."""
    (folder / name).write_text(text)
    run_file = folder / "RUN.yaml"
    run_file.write_text(run_file_text(read_peer_config(folder / name), gpus))
    return run_file


def assert_settings(settings: RunSettings, **expected: Any) -> None:
    """Assert that these settings have the expected values; others are not compared."""
    assert settings.model_dump(include=set(expected)) == expected


def test_a_config_of_axolotl_becomes_the_same_training(tmp_path: Path) -> None:
    settings = converted(tmp_path, AXOLOTL, gpus=2)
    assert_settings(
        settings, model="org/base-8b", load_in_4bit=True, eval_data=0.02, max_length=4096,
        train_data=["org/chats:train_sft", "rows/own.jsonl"], columns={"messages": "dialogue"},
        packing=True, lora_r=32, lora_alpha=16, lora_dropout=0.0,
        lora_target_modules="all-linear", global_batch_size=16, epochs=3, lr=2e-4, warmup_steps=10,
        warmup_ratio=None, lr_scheduler_type="cosine", weight_decay=0.0, evals_per_epoch=2,
        trackers=["wandb"], tracker_project="bakery", output_dir="./out",
    )  # fmt: skip


def test_a_config_of_llama_factory_and_its_dataset_info_become_the_same_training(
    tmp_path: Path,
) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry/dataset_info.json").write_text(
        '{"identity": {"file_name": "identity.json"}, "chats": {"hf_hub_url": "org/chats",'
        ' "formatting": "sharegpt", "columns": {"messages": "dialogue"}}}'
    )
    weight_and_limit = {"weight": 1.0, "limit": 100}  # max_samples: 100
    assert_settings(
        converted(tmp_path, LLAMA_FACTORY), model="org/base-4b", lora_r=16, lora_dropout=0.0,
        lora_target_modules=["q_proj", "v_proj"], columns={"conversations": "dialogue"},
        train_data=[
            {"path": "registry/identity.json", **weight_and_limit},
            {"path": "org/chats:train", **weight_and_limit},
        ],
        max_length=512, train_on="last-assistant", global_batch_size=8, lr=1e-4, max_steps=50,
        epochs="auto", lr_scheduler_type="constant", warmup_ratio=0, weight_decay=0.0, bf16=True,
        load_in_4bit=True, packing=False, trackers=[], eval_steps=0.25, save_steps=0.5,
    )  # fmt: skip


def test_a_shell_script_of_ms_swift_becomes_the_same_training(tmp_path: Path) -> None:
    assert_settings(
        converted(tmp_path, SWIFT, name="train.sh", gpus=2), model="org/base-7b", bf16=True,
        train_data=[{"path": "org/alpaca:train", "weight": 1.0, "limit": 500}, "rows/own.jsonl"],
        lora_target_modules="auto", eval_data=0.01, max_length=2048, output_dir="output", lr=1e-4,
        lora_r=8, lora_alpha=32, weight_decay=0.1, global_batch_size=16, epochs=3, packing=False,
    )  # fmt: skip


def test_a_config_of_torchtune_becomes_the_same_training(tmp_path: Path) -> None:
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert_settings(
        converted(tmp_path, TORCHTUNE), model="base", output_dir="out/lora", load_in_4bit=True,
        train_data="yahma/alpaca-cleaned:train", max_length=1024, lora_target_modules=modules,
        lora_r=8, lora_alpha=16, packing=True, lr=3e-4, warmup_steps=100,
        lr_scheduler_type="cosine", global_batch_size=16, epochs=1,
    )  # fmt: skip


def test_each_nested_option_of_torchtune_is_converted_or_named_in_the_run_file(
    tmp_path: Path,
) -> None:
    options_without_setting = """
profiler: {_component_: torchtune.training.setup_torch_profiler, schedule: {wait_steps: 5}}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss, num_output_chunks: 8}
"""
    config = TORCHTUNE.replace("lr: 3e-4", "lr: 3e-4\n  fused: true\n  betas: [0.9, 0.99]")
    text = write_run_file(tmp_path, config + options_without_setting).read_text()
    for option, value in {
        "profiler._component_": "setup_torch_profiler", "profiler.schedule.wait_steps": "5",
        "loss._component_": "LinearCrossEntropyLoss", "loss.num_output_chunks": "8",
        "optimizer.fused": "true", "optimizer.betas": "0.99", "tokenizer.path": "tokenizer.model",
    }.items():  # fmt: skip
        (line,) = [line for line in text.splitlines() if option in line]
        assert_mentions(line, value)
    assert load_settings(tmp_path / "RUN.yaml").lr == 3e-4


def test_options_that_a_config_of_trl_lacks_get_the_defaults_of_trl(tmp_path: Path) -> None:
    assert_settings(
        converted(tmp_path, TRL, gpus=2), train_data="org/chats:train", lr=2e-5, epochs=3,
        lora_r=16, lora_alpha=32, lr_scheduler_type="linear", warmup_ratio=0, weight_decay=0.0,
        global_batch_size=8, packing=False,
    )  # fmt: skip


def test_fp16_false_does_not_replace_bf16(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, AXOLOTL + "bf16: auto\nfp16: false\n")
    lines = run_file.read_text().splitlines()
    lines_without_comments = {line.partition("#")[0].strip() for line in lines}
    assert {"bf16: auto", "fp16: false"} <= lines_without_comments


@pytest.mark.parametrize("program", [LLAMA_FACTORY, TRL])
def test_a_constant_schedule_has_no_warmup(tmp_path: Path, program: str) -> None:
    """In transformers the schedule `constant` ignores the setting for the warm-up."""
    config = program.replace("lr_scheduler_type: constant_with_warmup\n", "")
    config += "lr_scheduler_type: constant\nwarmup_steps: 20\n"
    settings = converted(tmp_path, config)
    assert_settings(settings, lr_scheduler_type="constant", warmup_ratio=0, warmup_steps=None)
    assert_mentions((tmp_path / "RUN.yaml").read_text(), "warmup_steps: 20", "no warm-up")


@pytest.mark.parametrize(
    ("options", "ratio"), [("{min_lr_rate: 0.1}", 0.1), ("{min_lr: 2e-6}", 0.02)]
)
def test_the_last_learning_rate_of_a_schedule_is_taken_over(
    tmp_path: Path, options: str, ratio: float
) -> None:
    config = LLAMA_FACTORY.replace("constant_with_warmup", "cosine_with_min_lr")
    settings = converted(tmp_path, f"{config}lr_scheduler_kwargs: {options}\n")
    assert_settings(settings, lr_scheduler_type="cosine", min_lr_ratio=ratio)


def test_every_tracker_of_a_configuration_is_taken_over(tmp_path: Path) -> None:
    config = AXOLOTL + "mlflow_tracking_uri: http://mlflow\nuse_tensorboard: true\n"
    trackers = ["wandb", "tensorboard", "mlflow"]
    assert_settings(converted(tmp_path, config), trackers=trackers, tracker_project="bakery")
    config = TRL + "report_to: wandb,trackio\n"
    assert_settings(converted(tmp_path, config), trackers=["wandb", "trackio"])


def test_options_in_a_section_and_lists_with_commas_are_taken_over(tmp_path: Path) -> None:
    config = AXOLOTL + "bnb_config_kwargs: {bnb_4bit_quant_type: fp4}\n"
    assert_settings(converted(tmp_path, config), bnb_4bit_quant_type="fp4")
    config = LLAMA_FACTORY + "additional_target: embed_tokens, lm_head\n"
    assert_settings(converted(tmp_path, config), modules_to_save=["embed_tokens", "lm_head"])


def test_padding_free_does_not_turn_packing_on(tmp_path: Path) -> None:
    assert_settings(converted(tmp_path, TRL + "padding_free: true\n"), packing=False)


def test_the_run_file_tells_the_user_to_write_an_inline_chat_template_to_a_file(
    tmp_path: Path,
) -> None:
    config = AXOLOTL + "chat_template_jinja: '{% for m in messages %}{{ m }}{% endfor %}'\n"
    text = write_run_file(tmp_path, config).read_text()
    assert_settings(load_settings(tmp_path / "RUN.yaml"), chat_template="model")
    assert_mentions(text, "chat_template_jinja", "FILE.jinja")


def test_a_script_path_is_not_a_value_of_the_launcher_option_before_it(tmp_path: Path) -> None:
    script = SWIFT.replace("swift sft", "torchrun --nproc_per_node 2 swift/cli/sft.py")
    text = write_run_file(tmp_path, script, name="train.sh").read_text()
    assert "nproc_per_node: 2 " in text
    assert "sft.py" not in text


def test_max_length_null_of_trl_is_explained_in_the_run_file(tmp_path: Path) -> None:
    text = write_run_file(tmp_path, TRL + "max_length: null\n").read_text()
    assert_mentions(text, "max_length: null", "longest document")


def test_steps_per_epoch_of_torchtune_count_for_each_epoch(tmp_path: Path) -> None:
    config = TORCHTUNE.replace("epochs: 1", "epochs: 3\nmax_steps_per_epoch: 200")
    assert_settings(converted(tmp_path, config), max_steps=600)


def test_lora_on_the_head_is_left_out_and_the_run_file_names_the_alternative(
    tmp_path: Path,
) -> None:
    config = TORCHTUNE.replace("lora_rank: 8", "lora_rank: 8\n  apply_lora_to_output: true")
    text = write_run_file(tmp_path, config).read_text()
    assert "lm_head" not in load_settings(tmp_path / "RUN.yaml").lora_target_modules
    assert_mentions(text, "apply_lora_to_output", "modules_to_save: [lm_head]")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("pissa_init: true", "pissa_niter_16"),
        ("pissa_init: true\npissa_iter: 4", "pissa_niter_4"),
        ("pissa_init: true\npissa_iter: -1", "pissa"),
        ("pissa_init: false", True),
    ],
)
def test_pissa_options_of_llama_factory_become_init_lora_weights(
    tmp_path: Path, options: str, expected: object
) -> None:
    config = LLAMA_FACTORY.replace("quantization_bit: 4\n", "")  # PiSSA needs an unquantised base
    config = f"{config}{options}\npissa_convert: true\n"
    assert_settings(converted(tmp_path, config), init_lora_weights=expected)


def test_a_context_parallel_group_counts_as_one_gpu_in_the_global_batch(tmp_path: Path) -> None:
    config = AXOLOTL + "context_parallel_size: 4\n"
    micro_batch, accumulation_steps, groups = 2, 4, 8 // 4
    assert_settings(
        converted(tmp_path, config, gpus=8),
        sequence_parallel_size=4,
        global_batch_size=micro_batch * accumulation_steps * groups,
    )


# Options of other programs (peers) with and without a setting here, settings, an unknown name.
OPTIONS = sorted(
    {*settings_by_trait("peers"), *RunSettings.model_fields, "unheard_of"}
    | {pattern.replace("*", "x").replace("?", "x") for pattern in ADVICE}
)
VALUES = st.one_of(
    st.booleans(), st.integers(-1, 99), st.floats(0, 2), st.sampled_from(["cosine", "all", "x y"]),
    st.lists(st.sampled_from(["a", "b"]), max_size=2), st.just({"a": 1}),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=8))
@example({"eval_data": 1, "eval_dataset": 1})  # two options with the same value for one setting
def test_any_options_give_a_run_file_that_names_them_all(options: dict[str, Any]) -> None:
    # A random value of these options would be refused as another kind of training.
    kinds = ("adapter", "finetuning_type", "train_type", "tuner_type", "stage", "rl", "rlhf_type")
    options = {name: value for name, value in options.items() if name not in kinds}
    options |= {"model": "org/base", "lora_r": 8}
    text = run_file_text(PeerConfig(Path("c.yaml"), "TRL", options), 1)
    assert isinstance(yaml.safe_load(text), dict)
    factors_of_global_batch_size = ("batch_size", "gradient_accumulation_steps")
    for option, value in options.items():
        setting = settings_by_trait("peers").get(option, option)
        is_factor = setting in factors_of_global_batch_size
        assert is_factor or value in ("", [], {}) or option in text


@pytest.mark.parametrize("line", ["rl: dpo", "adapter: vera", "stage: rm"])
def test_another_kind_of_training_is_refused(tmp_path: Path, line: str) -> None:
    config = "base_model: a\n" + line
    with refused(line.split()[1]):
        write_run_file(tmp_path, config)


def test_a_config_of_accelerate_without_training_options_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path / "config.yaml", "learning_rate"):
        write_run_file(tmp_path, "mixed_precision: bf16\nnum_machines: 2\n")
