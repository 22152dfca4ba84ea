"""Convert the configuration of another training program to the text of a run file.

An option is a key of the other program, a setting is a key of a run file. Three tables are used:

- OPTIONS in peer_options.py: a function for each option whose value has another form in a run file.
- The trait `peers` of each setting (traits.py): options with the same meaning and form of value.
- VALUES in peers.py: other spellings of a setting's values.

An option that is in none of these tables is listed in a comment of the run file, with the reason
that ADVICE in peers.py has for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.commands import command
from pipeline.config.load import value_problem
from pipeline.config.located import parse_value
from pipeline.config.peer_files import PeerConfig, Program
from pipeline.config.peer_options import OPTIONS, Outcome, batch_sizes
from pipeline.config.peers import advice, value_advice
from pipeline.config.settings import RunSettings, is_set, settings_by_trait
from pipeline.errors import UserError

_TRANSFORMERS = {"epochs": 3, "weight_decay": 0.0, "lr_scheduler_type": "linear", "warmup_ratio": 0}
# Defaults that differ from RankZero's. Read on 2026-11-30 in the packages of axolotl 0.19.0,
# LLaMA-Factory 0.9.5, ms-swift 4.6.0, torchtune 0.6.1, TRL 1.16.0 and transformers 5.23.0.
_DEFAULTS: Mapping[Program, Mapping[str, Any]] = {
    "axolotl": {
        "epochs": 1, "weight_decay": 0.0, "lora_dropout": 0.0, "max_length": 512, "packing": False,
    },
    "LLaMA-Factory": _TRANSFORMERS | {
        "lr": 5e-5, "lora_r": 8, "lora_dropout": 0.0, "max_length": 2048, "packing": False,
    },
    "ms-swift": {
        "lr": 1e-4, "epochs": 3, "weight_decay": 0.1, "warmup_ratio": 0, "lora_r": 8,
        "lora_alpha": 32, "packing": False,
    },
    "torchtune": {"packing": False},
    "TRL": _TRANSFORMERS | {"lr": 2e-5, "lora_r": 16, "lora_alpha": 32, "packing": False},
}  # fmt: skip
# Setting -> remark for a configuration that leaves the setting at its program's default.
_REMARKS: Mapping[Program, Mapping[str, str]] = {
    "ms-swift": {"max_length": "ms-swift's default is the longest sequence that the model takes"},
    "torchtune": {"max_length": "torchtune's default is the longest document"},
    "TRL": {
        "train_on": "TRL's default trains on every token of a conversation, which is train_on: all",
        "lora_target_modules": "TRL's default is peft's choice, for most models q_proj and v_proj",
    },
}
_REQUIRED = ("model", "train_data", "output_dir")
_NO_COUNTERPART = "no counterpart"
_NO_WARMUP = "the other program's constant schedule has no warm-up"
_NO_LIMIT = "no limit in TRL: set it to the length of the longest document"
_NO_WRAPPING = 10**9  # line width for PyYAML, so that no value is broken into lines


@dataclass(frozen=True)
class _LeftOut:
    """An option that the run file has only in a comment, with the reason."""

    option: str
    value: Any
    reason: str


@dataclass
class _Draft:
    """The settings of the run file, a comment for some of them, and the options left out."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    # setting -> the option from which it was converted, and that option's value
    origins: dict[str, tuple[str, Any]] = field(default_factory=dict)
    left_out: list[_LeftOut] = field(default_factory=list)

    def drop(self, setting: str, reason: str) -> None:
        """Remove a setting; its option is listed with the reason."""
        if setting in self.values:
            value = self.values.pop(setting)
            option, option_value = self.origins.get(setting, (setting, value))
            self.left_out.append(_LeftOut(option, option_value, reason))

    def add(self, option: str, value: Any, outcome: Outcome) -> None:
        """Add the settings of one option; a setting that an earlier option gave is not changed."""
        if not outcome.settings:
            self.left_out.append(_LeftOut(option, value, outcome.note or _NO_COUNTERPART))
        for setting, converted in outcome.settings.items():
            if problem := value_problem(setting, converted):
                self.left_out.append(_LeftOut(option, value, f"{setting}: {problem}"))
            elif self.values.setdefault(setting, converted) != converted:
                reason = f"another option already sets {setting}"
                self.left_out.append(_LeftOut(option, value, reason))
            else:
                self.origins.setdefault(setting, (option, value))
                if converted != value:
                    origin = _one_line(option, value)
                else:
                    origin = option if option != setting else ""
                # a second option may give the same value
                remarks = self.comments.get(setting), origin, outcome.note
                self.comments[setting] = "; ".join(filter(None, remarks))


def run_file_text(config: PeerConfig, gpus: int) -> str:
    """The text of a run file that trains as the configuration of the other program does.

    `gpus`: number of GPUs that the configuration is written for; it determines the global batch.
    Raises UserError if the configuration is not one of supervised fine-tuning.
    """
    draft = _Draft()
    for option, value in config.options.items():
        if option == "max_length" and value is None and config.program == "TRL":
            draft.left_out.append(_LeftOut(option, value, _NO_LIMIT))
        elif value not in (None, "", [], {}):  # these mean the program's default
            draft.add(option, value, _convert_option(option, value, config))
    if not {"model", "train_data", "lora_r", "lr"} & draft.values.keys():
        raise UserError(
            f"{config.path}: no option of a training run, such as a model, data or learning_rate"
        )
    _set_batches(draft, config, gpus)
    _add_held_out_split(draft, config)
    _resolve_conflicts(draft)
    replaced_by = settings_by_trait("replaces")  # e.g. "epochs" -> "max_steps"
    for setting, value in _DEFAULTS[config.program].items():
        if setting not in draft.values and replaced_by.get(setting) not in draft.values:
            draft.values[setting] = value
            draft.comments[setting] = f"default of {config.program}"
    if draft.comments.get("packing", "").startswith("default of"):
        draft.comments["packing"] += "; true is faster, and batch sizes then count packs"
    return _render(draft, config)


def _convert_option(option: str, value: Any, config: PeerConfig) -> Outcome:
    """Convert an option to settings, or to the reason why there are none."""
    if function := OPTIONS.get(option):
        return function(value, config)
    setting = (
        option if option in RunSettings.model_fields else settings_by_trait("peers").get(option)
    )
    if setting is None:
        return Outcome(note=advice(option) or _NO_COUNTERPART)
    value = {"yes": True, "on": True, "no": False, "off": False}.get(str(value), value)
    if setting.endswith("_strategy") and value is False:
        value = "no"
    is_valid = not value_problem(setting, value)
    if hint := value_advice(setting, value, is_valid=is_valid):
        # Many hints begin with the value to use: "auto: as few layers as memory needs".
        start, _, explanation = hint.replace(",", ":", 1).partition(":")
        converted = parse_value(start.strip().split(" ")[0], hint)
        if not value_problem(setting, converted):
            return Outcome({setting: converted}, explanation.strip())
        return Outcome(note=hint)
    if isinstance(value, str) and "," in value and not is_valid:
        value = [name.strip() for name in value.split(",")]
    return Outcome({setting: value})


def _add_held_out_split(draft: _Draft, config: PeerConfig) -> None:
    """Set `eval_data` to the split that TRL evaluates: `test`, if no option names another one."""
    name, _, split = str(draft.values.get("train_data")).partition(":")
    is_evaluated = draft.values.get("evaluation_strategy", "no") != "no"
    if config.program == "TRL" and is_evaluated and split and "eval_data" not in draft.values:
        draft.values["eval_data"] = f"{name}:{config.options.get('dataset_test_split', 'test')}"
        draft.comments["eval_data"] = "dataset_test_split"


def _set_batches(draft: _Draft, config: PeerConfig, gpus: int) -> None:
    """Replace batch size and accumulation by `global_batch_size`, which fits any number of GPUs."""
    batch_size = draft.values.pop("batch_size", None)
    accumulation = draft.values.pop("gradient_accumulation_steps", None)
    if "global_batch_size" in draft.values:
        return
    group_size = draft.values.get("sequence_parallel_size", 1)
    num_groups = gpus
    if isinstance(group_size, int) and group_size > 1:
        num_groups = max(1, gpus // group_size)
    micro_batch, steps = batch_sizes(batch_size, accumulation, config.program, num_groups)
    draft.values["global_batch_size"] = micro_batch * steps * num_groups
    replicas = f"{gpus} GPUs (--gpus)"
    if num_groups != gpus:
        replicas = f"{num_groups} groups of {group_size} GPUs that share sequences (--gpus {gpus})"
    draft.comments["global_batch_size"] = (
        f"micro-batches of {micro_batch} x {steps} accumulation steps x {replicas}"
    )


def _resolve_conflicts(draft: _Draft) -> None:
    """Remove settings that other settings of the draft replace, such as `epochs` by `max_steps`.

    The other programs also ignore them. Flags are kept: if two flags exclude each other, such as
    bf16 and fp16, `_combination_problem` adds a comment.
    """
    if draft.values.get("warmup_steps") == 0:
        draft.drop("warmup_steps", "0 steps: warmup_ratio applies")
        draft.values.setdefault("warmup_ratio", 0)
    strategies = {"evaluation_strategy": "evals_per_epoch", "save_strategy": "saves_per_epoch"}
    for replaced, replacement in {**settings_by_trait("replaces"), **strategies}.items():
        is_flag = isinstance(draft.values.get(replaced), bool)
        if is_set(replacement, draft.values) and not is_flag:
            draft.drop(replaced, f"{replacement} replaces it")
    if draft.origins.get("lr_scheduler_type", ("", ""))[1] == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            draft.drop(key, _NO_WARMUP)
        draft.values["warmup_ratio"], draft.comments["warmup_ratio"] = 0, _NO_WARMUP
    if "eval_data" not in draft.values or draft.values.get("evaluation_strategy") == "no":
        for key in ("keep_best", "early_stopping_patience"):
            draft.drop(key, "needs eval_data and evaluations")


def _render(draft: _Draft, config: PeerConfig) -> str:
    """The run file: settings in the order of docs/configuration.md, then the options left out."""
    lines = [f"# Converted from {config.path.name} ({config.program}) by {command('convert')}."]
    values = dict.fromkeys(_REQUIRED) | draft.values
    for setting in RunSettings.model_fields:
        if setting in values:
            lines += _setting_lines(setting, values[setting], draft.comments.get(setting, ""))
    for setting, remark in _REMARKS.get(config.program, {}).items():
        if setting not in draft.values:
            lines.append(f"# {setting} is left at RankZero's default. {remark}.")
    if problem := _combination_problem(draft.values):
        lines.append(f"# To be changed: {problem}")
    for title, has_reason in (
        ("Without a counterpart in RankZero:", False),
        ("Not converted:", True),
    ):
        entries = [
            entry for entry in draft.left_out if (entry.reason != _NO_COUNTERPART) == has_reason
        ]
        lines += ["", f"# {title}"] if entries else []
        for entry in entries:
            suffix = f"  ({entry.reason.removesuffix('; remove it')})" if has_reason else ""
            lines.append(f"#   {_one_line(entry.option, entry.value)}{suffix}")
    return "\n".join(lines) + "\n"


def _setting_lines(setting: str, value: Any, comment: str) -> list[str]:
    """The YAML lines of one setting; the comment is at the end of the first line."""
    if value is None:
        return [f"# {setting}: required, and not in the file"]
    has_mappings = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if isinstance(value, list | dict) and not has_mappings:
        text = f"{setting}: {_yaml(value, is_flow=True)}"  # in brackets: `key: [a, b]`
    else:
        text = _yaml({setting: value})
    first, *others = text.rstrip().split("\n")
    return [f"{first:<40}  # {comment}" if comment else first, *others]


def _combination_problem(values: Mapping[str, Any]) -> str:
    """Message about the first combination of settings that is refused; empty if there is none."""
    try:
        RunSettings.model_validate({**dict.fromkeys(_REQUIRED, "unknown"), **values})
    except ValidationError as error:
        message: str = error.errors()[0]["msg"]
        return " ".join(message.removeprefix("Value error, ").split())
    return ""


def _one_line(option: str, value: Any) -> str:
    """`option: value` in one line of limited length."""
    text = f"{option}: {_yaml(value, is_flow=True).removesuffix('...').strip()}"
    return text if len(text) <= 80 else text[:77] + "..."


def _yaml(value: Any, *, is_flow: bool = False) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=is_flow, sort_keys=False, allow_unicode=True, width=_NO_WRAPPING
    )
    return text.strip()
