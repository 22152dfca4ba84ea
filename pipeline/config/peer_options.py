"""Options of other training programs whose value has another form in a run file.

A function converts the value of one option. It also gets the whole configuration, because some
options depend on others. Options whose value keeps its form need no function (config/traits.py).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


_FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # paths that `datasets` reads as files
# Name of a module in torchtune -> its name in transformers.
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Name of a column in LLaMA-Factory's dataset_info.json -> its name in the setting `columns`.
_DATA_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "system": "system",
    "messages": "conversations", "tools": "tools",
}  # fmt: skip
_IS_DETECTED = "the format of each row is detected"


def batch_sizes(
    batch_size: Any, accumulation_steps: Any, program: Program, gpus: int
) -> tuple[int, int]:
    """Micro-batch size and accumulation steps, each with the program's default if it is no int."""
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

    torchtune has further options for the MLP and the head.
    """
    names = value.split(",") if isinstance(value, str) and "," in value else value
    if isinstance(names, str):
        if names.replace("_", "-") in ("all", "all-linear", "auto"):
            return Outcome({"lora_target_modules": "auto"}, "all linear layers except routers")
        is_pattern = bool(set(names) & set("*|()[\\^$"))
        return Outcome({"lora_target_modules": names if is_pattern else [names]})
    if not isinstance(names, list):
        return Outcome(note="expected names of modules")
    modules = [_MODULES.get(str(name).strip(), str(name).strip()) for name in names]
    if config.options.get("apply_lora_to_mlp"):
        modules += ["gate_proj", "up_proj", "down_proj"]
    if config.options.get("apply_lora_to_output"):
        modules.append("lm_head")
    if any(name.replace("_", "-") == "all-linear" for name in modules):
        return Outcome({"lora_target_modules": "auto"}, "all linear layers except routers")
    return Outcome({"lora_target_modules": modules})


def _pissa(value: Any, config: PeerConfig) -> Outcome:
    """LLaMA-Factory's `pissa_init`; the option `pissa_iter` is -1 for the exact decomposition."""
    if value is not True:
        return Outcome(note="init_lora_weights: true is the default")
    iterations = config.options.get("pissa_iter", 16)
    name = "pissa" if iterations == -1 else f"pissa_niter_{iterations}"
    return Outcome({"init_lora_weights": name})


def _trackers(value: Any, _config: PeerConfig) -> Outcome:
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    supported = {name: name for name in ("wandb", "tensorboard", "mlflow", "trackio")}
    # Class names of torchtune.
    supported |= {"wandblogger": "wandb", "tensorboardlogger": "tensorboard"}
    trackers = [supported[name] for name in names if name in supported]
    others = [name for name in names if name not in supported and name not in ("none", "[]")]
    note = f"{', '.join(others)}: not one of the trackers of docs/trackers.md" if others else ""
    if trackers:
        return Outcome({"trackers": trackers}, note)
    return Outcome(note=note or "no tracker")


def _use_wandb(value: Any, _config: PeerConfig) -> Outcome:
    if value is True:
        return Outcome({"trackers": ["wandb"]})
    return Outcome(note="no tracker")


def _wandb_project(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"trackers": ["wandb"], "tracker_project": str(value)})


def _chat_template(value: Any, _config: PeerConfig) -> Outcome:
    if str(value).endswith((".jinja", ".jinja2", ".j2")):
        return Outcome({"chat_template": value})
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


def _data_sets(value: Any, config: PeerConfig) -> Outcome:
    """`train_data` and `columns` from the data sets of any of the programs.

    An item is a mapping (axolotl, torchtune), a name in dataset_info.json (LLaMA-Factory), a hub
    name, or a hub name with a number of rows, such as `org/name#500` (ms-swift).
    """
    items = value if isinstance(value, list) else str(value).split(",")
    default_limit = config.options.get("max_samples") or config.options.get("max_train_samples")
    registry = _registered_data_sets(config)
    sources: list[Any] = []
    notes: list[str] = []
    columns: dict[str, str] = {}
    for item in items:
        if isinstance(item, dict):
            name, num_rows, description = "", "", item
        else:
            name, _, num_rows = str(item).partition("#")
            description = registry.get(str(item).strip(), {})
        path, note = _data_path(name, description, config)
        limit = int(num_rows) if num_rows.isdigit() else default_limit
        sources.append({"path": path, "limit": limit} if isinstance(limit, int) else path)
        notes += [note] if note else []
        columns |= _renamed_columns(description)
    settings: dict[str, Any] = {"train_data": sources[0] if len(sources) == 1 else sources}
    if columns:
        settings["columns"] = columns
    return Outcome(settings, "; ".join(dict.fromkeys(notes)))


def _data_path(name: str, description: Mapping[str, Any], config: PeerConfig) -> tuple[str, str]:
    """Path of a data set, or its hub name with the split; and a note, which may be empty.

    `description`: the mapping that describes the data set, empty if there is only a name.
    """
    if file := description.get("file_name"):
        folder = Path(str(config.options.get("dataset_dir", "data")))
        return str(folder / str(file)), ""
    path = str(description.get("path") or description.get("hf_hub_url") or name).strip()
    files = description.get("data_files")
    if files and (path in _FILE_BUILDERS or not _is_hub_name(path)):
        path = str(files[0] if isinstance(files, list) else files)
    notes = []
    if isinstance(files, list) and len(files) > 1:
        notes.append(f"several data_files of {path}")
    subsets = {key: description[key] for key in ("name", "subset") if description.get(key)}
    notes += [
        f"{key}: {value}: name the files of this configuration" for key, value in subsets.items()
    ]
    if description.get("type"):
        notes.append(_IS_DETECTED)
    if not description and config.program == "LLaMA-Factory":
        notes.append("a name in dataset_info.json: replace it by the path or hub name of the data")
        return path, "; ".join(notes)
    if _is_hub_name(path):
        split = description.get("split") or description.get("train_on_split")
        split = split or config.options.get("dataset_train_split") or "train"
        path = f"{path}:{split}"
    return path, "; ".join(notes)


def _is_hub_name(path: str) -> bool:
    """Whether a text has the form of a hub name, `ORG/NAME`, and not that of a relative path."""
    organisation, _, name = path.partition("/")
    is_pair = bool(organisation and name) and "/" not in name
    is_file = name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    return is_pair and not is_file and organisation not in (".", "..", "~", "data")


def _renamed_columns(description: Mapping[str, Any]) -> dict[str, str]:
    """The setting `columns` for a data set: name of a column in RankZero -> name in the data."""
    columns: dict[str, str] = {}
    messages = description.get("field_messages")
    if isinstance(messages, str) and messages != "conversations":  # this name is sharegpt's own
        columns["messages"] = messages
    factory_columns = description.get("columns")  # LLaMA-Factory
    if isinstance(factory_columns, dict):
        for factory_name, data_name in factory_columns.items():
            column = _DATA_COLUMNS.get(factory_name)
            if column and data_name:
                columns[column] = str(data_name)
    return {column: data_name for column, data_name in columns.items() if column != data_name}


def _registered_data_sets(config: PeerConfig) -> Mapping[str, Any]:
    """LLaMA-Factory's dataset_info.json, in `dataset_dir`: name -> description of a data set.

    Empty if there is no such file.
    """
    folder = Path(str(config.options.get("dataset_dir", "data")))
    for path in (folder, config.path.parent / folder):
        try:
            entries = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return entries if isinstance(entries, dict) else {}
    return {}


# Option -> function that converts its value. A function has the name of one of its options.
OPTIONS: Mapping[str, Callable[[Any, PeerConfig], Outcome]] = {
    **dict.fromkeys(("adapter", "finetuning_type", "train_type", "tuner_type"), _training_method),
    **dict.fromkeys(("stage", "rl", "rlhf_type"), _training_stage),
    **dict.fromkeys(("quantization_bit", "quant_bits"), _quantisation_bits),
    **dict.fromkeys(("torch_dtype", "dtype", "mixed_precision"), _data_type),
    **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio"), _held_out),
    **dict.fromkeys(("train_on_inputs", "train_on_input", "train_on_prompt"), _train_on_inputs),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), _assistant_only_loss),
    "mask_history": _mask_history,
    "lora_target_linear": _target_all_linear,
    **dict.fromkeys(
        ("lora_target_modules", "target_modules", "lora_target", "lora_attn_modules"),
        _target_modules,
    ),
    **dict.fromkeys(("apply_lora_to_mlp", "apply_lora_to_output"), _read_with_another_option),
    **dict.fromkeys(
        ("max_samples", "max_train_samples", "dataset_train_split", "pissa_iter"),
        _read_with_another_option,
    ),
    "pissa_init": _pissa,
    **dict.fromkeys(("report_to", "metric_logger"), _trackers),
    "use_wandb": _use_wandb,
    **dict.fromkeys(("wandb_project",), _wandb_project),
    **dict.fromkeys(("template", "chat_template"), _chat_template),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "enable_activation_checkpointing"),
        _gradient_checkpointing,
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "attn_impl", "use_flash_attn"),
        _attention,
    ),
    **dict.fromkeys(("deepspeed", "deepspeed_config"), _deepspeed),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), _resume),
    **dict.fromkeys(
        ("datasets", "dataset", "dataset_name", "train_dataset", "dataset_path"), _data_sets
    ),
}
