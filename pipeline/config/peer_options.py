"""Options of other training programs whose value has another form in a run file.

A function converts the value of one option. It also gets the whole configuration, because some
options depend on others. Options whose value keeps its form need no function (config/traits.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.commands import DOCS
from pipeline.config.peer_data import convert_data_sets
from pipeline.config.peer_files import PeerConfig, Program
from pipeline.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """Result of converting one option.

    `settings`: names and values of the settings. `note`: a comment on these settings, or the reason
    why there are none.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


# Name of a module in torchtune -> its name in transformers.
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def batch_sizes(
    batch_size: Any, accumulation_steps: Any, program: Program, gpus: int
) -> tuple[int, int]:
    """Micro-batch size and accumulation steps; the program's default for one that is not an int."""
    if not isinstance(batch_size, int):
        batch_size = 8 if program in ("TRL", "LLaMA-Factory") else 1
    if not isinstance(accumulation_steps, int):
        is_swift = program == "ms-swift"  # whose default is a global batch of 16
        accumulation_steps = max(1, 16 // (batch_size * gpus)) if is_swift else 1
    return batch_size, accumulation_steps


def _training_method(value: Any, _config: PeerConfig) -> Outcome:
    """`adapter`, `finetuning_type`, `tuner_type`: lora, qlora or another method."""
    if value in ("qlora", "lora", True):
        settings = {"load_in_4bit": True} if value == "qlora" else {}
        return Outcome(settings, "LoRA is always trained")
    raise UserError(f"the configuration trains with {value!r}; RankZero trains LoRA and QLoRA")


def _training_stage(value: Any, _config: PeerConfig) -> Outcome:
    """`stage` and `rl`: sft, pt (pre-training) or a kind of reinforcement learning."""
    if value in ("sft", False):
        return Outcome(note="supervised fine-tuning is the only kind of training")
    if value == "pt":
        return Outcome({"train_on": "all"}, "pre-training: rows of plain text")
    raise UserError(
        f"the configuration is for {value!r}; RankZero only does supervised fine-tuning"
    )


def _quantisation_bits(value: Any, _config: PeerConfig) -> Outcome:
    if value in (4, 8):
        return Outcome({f"load_in_{value}bit": True})
    return Outcome(note="the base is quantised to 4 or 8 bits, or not at all")


def _data_type(value: Any, _config: PeerConfig) -> Outcome:
    name = str(value).removeprefix("torch.").lower()
    if name in ("bf16", "bfloat16"):
        return Outcome({"bf16": True})
    if name in ("fp16", "float16"):
        return Outcome({"fp16": True})
    if name in ("fp32", "float32"):
        return Outcome({"bf16": False, "fp16": False})
    return Outcome(note="bf16 where the device supports it, else fp16")


def _held_out(value: Any, _config: PeerConfig) -> Outcome:
    """`val_size`, `val_set_size`: a share below 1 or a number of rows."""
    if not value:
        return Outcome(note="no rows are held out")
    is_share = isinstance(value, float) and value < 1
    return Outcome({"eval_data": value if is_share else int(value)})


def _train_on_inputs(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"train_on": "all" if value else "assistant"})


def _mask_history(value: Any, _config: PeerConfig) -> Outcome:
    if value:
        return Outcome({"train_on": "last-assistant"})
    return Outcome(note="all assistant turns are trained by default")


def _assistant_only_loss(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"train_on": "assistant" if value else "all"})


def _target_all_linear(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"lora_target_modules": "all-linear"} if value else {}, "")


def _target_modules(value: Any, config: PeerConfig) -> Outcome:
    """Target modules: `all` in some spelling, names separated by commas, or a list of names.

    torchtune has a further option for the MLP.
    """
    names = value.split(",") if isinstance(value, str) and "," in value else value
    if isinstance(names, str):
        if names.lower().replace("_", "-") in ("all", "all-linear", "auto"):
            return Outcome({"lora_target_modules": "auto"}, "all linear layers except routers")
        is_pattern = bool(set(names) & set("*|()[\\^$"))
        return Outcome({"lora_target_modules": names if is_pattern else [names]})
    if not isinstance(names, list):
        return Outcome(note="expected names of modules")
    modules = [_MODULES.get(str(name).strip(), str(name).strip()) for name in names]
    if config.options.get("apply_lora_to_mlp"):
        modules += ["gate_proj", "up_proj", "down_proj"]
    if any(name.lower().replace("_", "-") in ("all", "all-linear") for name in modules):
        return Outcome({"lora_target_modules": "auto"}, "all linear layers except routers")
    return Outcome({"lora_target_modules": modules})


def _head(value: Any, _config: PeerConfig) -> Outcome:
    """Torchtune's `apply_lora_to_output`."""
    if value is True:
        return Outcome(note="no LoRA on the head; modules_to_save: [lm_head] trains it in full")
    return Outcome(note="the head is not adapted")


def _pissa(value: Any, config: PeerConfig) -> Outcome:
    """LLaMA-Factory's `pissa_init`; the option `pissa_iter` is -1 for the exact decomposition."""
    if value is not True:
        return Outcome(note="init_lora_weights: true is the default")
    iterations = config.options.get("pissa_iter", 16)
    name = "pissa" if iterations == -1 else f"pissa_niter_{iterations}"
    return Outcome({"init_lora_weights": name})


_TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")


def _trackers(value: Any, config: PeerConfig) -> Outcome:
    """All trackers of the configuration, from any option that names or sets up one."""
    trackers, others = _named_trackers(config)
    note = f"{', '.join(others)}: not one of the trackers of {DOCS}/trackers.md" if others else ""
    if not trackers:
        return Outcome(note=note or "no tracker; metrics.jsonl has every step")
    return Outcome({"trackers": trackers}, note if isinstance(value, str | list) else "")


def _named_trackers(config: PeerConfig) -> tuple[list[str], list[str]]:
    """The trackers of a configuration, and those that RankZero does not have."""
    options = config.options
    reported = options.get("report_to") or []
    listed = reported if isinstance(reported, list) else str(reported).split(",")
    names = [str(name).strip().lower() for name in listed]
    names += [str(options.get("metric_logger", "")).lower().removesuffix("logger")]
    names += [name for name in _TRACKERS if options.get(f"use_{name}") is True]
    names += [name for name, keys in _TRACKER_KEYS.items() if any(options.get(k) for k in keys)]
    known = [name for name in _TRACKERS if name in names]
    no_trackers = (*_TRACKERS, "none", "[]", "", "disk", "stdout")
    return known, [name for name in dict.fromkeys(names) if name not in no_trackers]


# Tracker -> options that turn it on.
_TRACKER_KEYS = {
    "wandb": ("wandb_project",), "trackio": ("trackio_project_name",),
    "mlflow": ("mlflow_experiment_name", "mlflow_tracking_uri"),
}  # fmt: skip


def _tracker_project(value: Any, config: PeerConfig) -> Outcome:
    trackers, _ = _named_trackers(config)
    return Outcome({"trackers": trackers, "tracker_project": str(value)})


def _chat_template(value: Any, _config: PeerConfig) -> Outcome:
    if str(value).endswith((".jinja", ".jinja2", ".j2")):
        return Outcome({"chat_template": value})
    if "{%" in str(value) or "{{" in str(value):
        return Outcome(note="write this template to FILE.jinja and set chat_template: FILE.jinja; "
                       "without it the model's own is used")  # fmt: skip
    return Outcome(note="the model's own chat template is used; chat_template takes another")


def _gradient_checkpointing(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome(
        note="the plan recomputes as few layers as memory needs (gradient_checkpointing)"
    )


def _attention(value: Any, _config: PeerConfig) -> Outcome:
    if "flash" in str(value) or value in ("fa2", True):
        return Outcome(
            note="PyTorch's own kernels are the default; use_flash_attention: true uses flash-attn"
        )
    return Outcome(note="PyTorch's own kernels are the default")


def _scheduler_options(value: Any, config: PeerConfig) -> Outcome:
    """`lr_scheduler_kwargs` of transformers: the last learning rate of a cosine schedule."""
    options = value if isinstance(value, dict) else {}
    rate, last = config.options.get("learning_rate"), options.get("min_lr")
    if "min_lr_rate" in options:
        return Outcome({"min_lr_ratio": options["min_lr_rate"]})
    if isinstance(rate, float) and isinstance(last, float):
        return Outcome({"min_lr_ratio": float(f"{last / rate:.6g}")})
    return Outcome(note="min_lr_ratio is the final learning rate as a share of lr")


def _steps_of_an_epoch(value: Any, config: PeerConfig) -> Outcome:
    """Torchtune's `max_steps_per_epoch`."""
    epochs = config.options.get("epochs", 1)
    if not isinstance(value, int) or not isinstance(epochs, int):
        return Outcome(note="max_steps: steps of the run")
    return Outcome({"max_steps": value * epochs}, f"{epochs} epochs" if epochs > 1 else "")


def _activation_offloading(value: Any, _config: PeerConfig) -> Outcome:
    if value is True:
        return Outcome({"offload_activations": True})
    return Outcome(note="offload_activations: auto uses it only if the run does not fit otherwise")


def _deepspeed(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome(note="the plan generates DeepSpeed's configuration; deepspeed_json takes a file "
                   "whose keys replace generated ones")  # fmt: skip


def _resume(value: Any, _config: PeerConfig) -> Outcome:
    if isinstance(value, bool):
        return Outcome(note="a run that is started again always resumes (resume: auto)")
    return Outcome(note="checkpoints of other programs cannot be resumed; init_adapter starts from "
                   "an adapter")  # fmt: skip


def _read_with_another_option(_value: Any, _config: PeerConfig) -> Outcome:
    """An option that the function of another option reads, such as `max_samples` for `datasets`."""
    return Outcome(note="part of another setting")


def _training_data(value: Any, config: PeerConfig) -> Outcome:
    limits = ("max_samples", "max_train_samples", "train_dataset_sample")
    limit = next(filter(None, (config.options.get(name) for name in limits)), None)
    data = convert_data_sets(value, config, limit)
    columns = {"columns": data.columns} if data.columns else {}
    return Outcome({"train_data": data.value, **columns}, data.note)


def _held_out_data(value: Any, config: PeerConfig) -> Outcome:
    data = convert_data_sets(value, config)
    if data.has_slice:  # the other rows may be training data
        return Outcome(note="a part of a split: write its rows to a file, and name it in eval_data")
    return Outcome({"eval_data": data.value}, data.note)


def _text_column(value: Any, _config: PeerConfig) -> Outcome:
    if value == "text":
        return Outcome(note="the column text is read")
    return Outcome({"columns": {"text": str(value)}})


# Option -> function that converts its value. A function has the name of one of its options.
OPTIONS: Mapping[str, Callable[[Any, PeerConfig], Outcome]] = {
    **dict.fromkeys(("adapter", "finetuning_type", "train_type", "tuner_type"), _training_method),
    **dict.fromkeys(("stage", "rl", "rlhf_type"), _training_stage),
    **dict.fromkeys(("quantization_bit", "quant_bits"), _quantisation_bits),
    **dict.fromkeys(("torch_dtype", "dtype", "mixed_precision"), _data_type),
    **dict.fromkeys(
        (
            "val_size",
            "val_set_size",
            "split_dataset_ratio",
            "dataset_test_ratio",
            "test_split_size",
        ),
        _held_out,
    ),
    **dict.fromkeys(("train_on_inputs", "train_on_input", "train_on_prompt"), _train_on_inputs),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), _assistant_only_loss),
    "mask_history": _mask_history,
    "lora_target_linear": _target_all_linear,
    **dict.fromkeys(
        ("lora_target_modules", "target_modules", "lora_target", "lora_attn_modules"),
        _target_modules,
    ),
    "apply_lora_to_mlp": _read_with_another_option,
    "apply_lora_to_output": _head,
    **dict.fromkeys(
        (
            "max_samples",
            "max_train_samples",
            "train_dataset_sample",
            "dataset_train_split",
            "dataset_test_split",
            "pissa_iter",
        ),
        _read_with_another_option,
    ),
    "pissa_init": _pissa,
    **dict.fromkeys(("report_to", "metric_logger"), _trackers),
    **dict.fromkeys(("use_wandb", "use_tensorboard", "use_mlflow", "use_trackio"), _trackers),
    **dict.fromkeys(
        ("wandb_project", "mlflow_experiment_name", "trackio_project_name"), _tracker_project
    ),
    **dict.fromkeys(
        ("template", "chat_template", "chat_template_jinja", "chat_template_path"), _chat_template
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "enable_activation_checkpointing"),
        _gradient_checkpointing,
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "attn_impl", "use_flash_attn"),
        _attention,
    ),
    **dict.fromkeys(("deepspeed", "deepspeed_config"), _deepspeed),
    "lr_scheduler_kwargs": _scheduler_options,
    "max_steps_per_epoch": _steps_of_an_epoch,
    **dict.fromkeys(
        ("activation_offloading", "enable_activation_offloading"), _activation_offloading
    ),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), _resume),
    **dict.fromkeys(
        (
            "datasets",
            "dataset",
            "dataset_name",
            "train_dataset",
            "dataset_path",
            "dataset_id_or_path",
        ),
        _training_data,
    ),
    **dict.fromkeys(("test_datasets", "eval_dataset", "val_dataset"), _held_out_data),
    "dataset_text_field": _text_column,
}
