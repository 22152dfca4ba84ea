"""Options of other training programs whose value has another form in a run file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.peer_files import PeerConfig, Program
from pipeline.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """Settings to which an option is converted.

    `note`: a comment on these settings, or the reason why there are none.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # paths that `datasets` reads as files
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_DATA_COLUMNS = {  # LLaMA-Factory's dataset_info.json -> name of the column in RankZero
    "prompt": "instruction", "query": "input", "response": "output", "system": "system",
    "messages": "conversations", "tools": "tools",
}  # fmt: skip
_IS_DETECTED = "the format of each row is detected"


def micro_batches(given: Mapping[str, Any], program: Program, gpus: int) -> tuple[int, int]:
    """Micro-batch size and accumulation steps; the program's default for each that is not given."""
    micro, steps = given["batch_size"], given["gradient_accumulation_steps"]
    if not isinstance(micro, int):
        micro = 8 if program in ("TRL", "LLaMA-Factory") else 1
    if not isinstance(steps, int):
        steps = max(1, 16 // (micro * gpus)) if program == "ms-swift" else 1
    return micro, steps


def _method(value: Any, _config: PeerConfig) -> Outcome:
    """`adapter`, `finetuning_type`, `tuner_type`: lora, qlora or a kind that is not LoRA."""
    if value in ("qlora", "lora", True):
        settings = {"load_in_4bit": True} if value == "qlora" else {}
        return Outcome(settings, "LoRA is always trained")
    raise UserError(f"the configuration trains with {value!r}; RankZero trains LoRA and QLoRA")


def _stage(value: Any, _config: PeerConfig) -> Outcome:
    if value in ("sft", False):
        return Outcome(note="supervised fine-tuning is the only kind of training")
    if value == "pt":
        return Outcome({"train_on": "all"}, "pre-training: rows of plain text")
    raise UserError(
        f"the configuration is for {value!r}; RankZero only does supervised fine-tuning"
    )


def _bits(value: Any, _config: PeerConfig) -> Outcome:
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
    if not value:
        return Outcome(note="no rows are held out")
    is_share = isinstance(value, float) and value < 1
    return Outcome({"eval_data": value if is_share else int(value)})


def _trains_prompt(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"train_on": "all" if value else "assistant"})


def _trains_last(value: Any, _config: PeerConfig) -> Outcome:
    if value:
        return Outcome({"train_on": "last-assistant"})
    return Outcome(note="all assistant turns are trained by default")


def _trains_answers(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"train_on": "assistant" if value else "all"})


def _all_linear(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"lora_target_modules": "all-linear"} if value else {}, "")


def _targets(value: Any, config: PeerConfig) -> Outcome:
    """Target modules: `all` in some spelling, names separated by commas, or a list of names."""
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
    """LLaMA-Factory's `pissa_init`; its `pissa_iter` is -1 for the exact decomposition."""
    if value is not True:
        return Outcome(note="init_lora_weights: true is the default")
    iterations = config.options.get("pissa_iter", 16)
    name = "pissa" if iterations == -1 else f"pissa_niter_{iterations}"
    return Outcome({"init_lora_weights": name})


def _trackers(value: Any, _config: PeerConfig) -> Outcome:
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    known = {name: name for name in ("wandb", "tensorboard", "mlflow", "trackio")}
    known |= {"wandblogger": "wandb", "tensorboardlogger": "tensorboard"}  # torchtune's
    chosen = [known[name] for name in names if name in known]
    others = [name for name in names if name not in known and name not in ("none", "[]")]
    note = f"{', '.join(others)}: not one of the trackers of docs/trackers.md" if others else ""
    return Outcome({"trackers": chosen}, note) if chosen else Outcome(note=note or "no tracker")


def _wandb(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"trackers": ["wandb"]} if value is True else {}, "no tracker")


def _wandb_project(value: Any, _config: PeerConfig) -> Outcome:
    return Outcome({"trackers": ["wandb"], "tracker_project": str(value)})


def _template(value: Any, _config: PeerConfig) -> Outcome:
    if str(value).endswith((".jinja", ".jinja2", ".j2")):
        return Outcome({"chat_template": value})
    return Outcome(note="the model's own chat template is used; chat_template takes another")


def _checkpointing(value: Any, _config: PeerConfig) -> Outcome:
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
    return Outcome(note="the plan makes DeepSpeed's configuration (zero_stage); deepspeed_json "
                   "takes a file of your own")  # fmt: skip


def _resume(value: Any, _config: PeerConfig) -> Outcome:
    if isinstance(value, bool):
        return Outcome(note="a run that is started again always resumes (resume: auto)")
    return Outcome(note="checkpoints of other programs cannot be resumed; init_adapter starts from "
                   "an adapter")  # fmt: skip


def _applied_elsewhere(_value: Any, _config: PeerConfig) -> Outcome:
    return Outcome(note="part of another setting")


def sources_of(value: Any, config: PeerConfig) -> Outcome:
    """`train_data` from a list of data sets, as each of the programs names them."""
    items = value if isinstance(value, list) else str(value).split(",")
    limit = config.options.get("max_samples") or config.options.get("max_train_samples")
    registry = _registered_data_sets(config)
    sources: list[Any] = []
    notes: list[str] = []
    columns: dict[str, str] = {}
    for item in items:
        entry = item if isinstance(item, dict) else registry.get(str(item).strip(), {})
        name, _, rows = ("" if isinstance(item, dict) else str(item)).partition("#")  # ms-swift
        path, note = _path_of(name, entry, config)
        size = int(rows) if rows.isdigit() else limit
        sources.append({"path": path, "limit": size} if isinstance(size, int) else path)
        notes += [note] if note else []
        columns |= _columns_of(entry)
    settings: dict[str, Any] = {"train_data": sources[0] if len(sources) == 1 else sources}
    if columns:
        settings["columns"] = columns
    return Outcome(settings, "; ".join(dict.fromkeys(notes)))


def _path_of(name: Any, entry: Mapping[str, Any], config: PeerConfig) -> tuple[str, str]:
    """Path or hub name of a data set with its split, and a note; `entry`: its description."""
    if file := entry.get("file_name"):
        folder = Path(str(config.options.get("dataset_dir", "data")))
        return str(folder / str(file)), ""
    path = str(entry.get("path") or entry.get("hf_hub_url") or name).strip()
    files = entry.get("data_files")
    if files and (path in _FILE_BUILDERS or not _is_hub_name(path)):
        path = str(files[0] if isinstance(files, list) else files)
    notes = [f"several data_files of {path}"] if isinstance(files, list) and files[1:] else []
    notes += [
        f"{key}: {entry[key]}: name the files of this configuration"
        for key in ("name", "subset")
        if entry.get(key)
    ]
    if entry.get("type"):
        notes.append(_IS_DETECTED)
    if not entry and config.program == "LLaMA-Factory":
        notes.append("a name in dataset_info.json: replace it by the path or hub name of the data")
        return path, "; ".join(notes)
    if _is_hub_name(path):
        split = entry.get("split") or entry.get("train_on_split")
        split = split or config.options.get("dataset_train_split") or "train"
        path = f"{path}:{split}"
    return path, "; ".join(notes)


def _is_hub_name(path: str) -> bool:
    """Whether a data set is `ORG/NAME` on the hub, not a file or folder."""
    parts = path.split("/")
    return (
        len(parts) == 2
        and all(parts)
        and parts[0] not in (".", "..", "~", "data")
        and ("." not in parts[1] or not parts[1].endswith((".json", ".jsonl", ".csv", ".parquet")))
    )


def _columns_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """The setting `columns` from the description of a data set."""
    columns: dict[str, str] = {}
    if isinstance(field_name := entry.get("field_messages"), str):
        is_sharegpt = field_name == "conversations"
        columns |= {} if is_sharegpt else {"messages": field_name}
    named = entry.get("columns")
    for theirs, name in named.items() if isinstance(named, dict) else ():
        if (ours := _DATA_COLUMNS.get(theirs)) and name and name != ours:
            columns[ours] = str(name)
    return {ours: name for ours, name in columns.items() if ours != name}


def _registered_data_sets(config: PeerConfig) -> Mapping[str, Any]:
    """LLaMA-Factory's dataset_info.json beside the configuration; empty if there is none."""
    folder = Path(str(config.options.get("dataset_dir", "data")))
    for path in (folder, config.path.parent / folder):
        try:
            entries = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return entries if isinstance(entries, dict) else {}
    return {}


# Option -> function that converts its value.
OPTIONS: Mapping[str, Callable[[Any, PeerConfig], Outcome]] = {
    **dict.fromkeys(("adapter", "finetuning_type", "train_type", "tuner_type"), _method),
    **dict.fromkeys(("stage", "rl", "rlhf_type"), _stage),
    **dict.fromkeys(("quantization_bit", "quant_bits"), _bits),
    **dict.fromkeys(("torch_dtype", "dtype", "mixed_precision"), _data_type),
    **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio"), _held_out),
    **dict.fromkeys(("train_on_inputs", "train_on_input", "train_on_prompt"), _trains_prompt),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), _trains_answers),
    "mask_history": _trains_last,
    "lora_target_linear": _all_linear,
    **dict.fromkeys(
        ("lora_target_modules", "target_modules", "lora_target", "lora_attn_modules"), _targets
    ),
    **dict.fromkeys(("apply_lora_to_mlp", "apply_lora_to_output"), _applied_elsewhere),
    **dict.fromkeys(
        ("max_samples", "max_train_samples", "dataset_train_split", "pissa_iter"),
        _applied_elsewhere,
    ),
    "pissa_init": _pissa,
    **dict.fromkeys(("report_to", "metric_logger"), _trackers),
    "use_wandb": _wandb,
    **dict.fromkeys(("wandb_project",), _wandb_project),
    **dict.fromkeys(("template", "chat_template"), _template),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "enable_activation_checkpointing"),
        _checkpointing,
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "attn_impl", "use_flash_attn"),
        _attention,
    ),
    **dict.fromkeys(("deepspeed", "deepspeed_config"), _deepspeed),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), _resume),
    **dict.fromkeys(
        ("datasets", "dataset", "dataset_name", "train_dataset", "dataset_path"), sources_of
    ),
}
