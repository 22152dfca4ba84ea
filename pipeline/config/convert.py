"""Convert the configuration of another training program to the text of a run file.

Three tables convert an option. OPTIONS in peer_options.py has a function for each option whose
value has another form in a run file. The Field of each setting lists its names in other programs
(`peers` of traits.py). VALUES in peers.py lists other spellings of a setting's values. An option
that is in none of these tables is listed in a comment of the run file; ADVICE in peers.py has the
reasons.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.load import value_problem
from pipeline.config.located import parse_value
from pipeline.config.peer_files import PeerConfig, Program
from pipeline.config.peer_options import OPTIONS, Outcome, micro_batches
from pipeline.config.peers import advice, value_advice
from pipeline.config.settings import RunSettings, is_set, settings_by
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
_NO_WRAPPING = 10**9  # line width for PyYAML, so that no value is broken into lines


@dataclass
class _Draft:
    """The settings of the run file, a comment for some of them, and the options left out."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    origins: dict[str, tuple[str, Any]] = field(default_factory=dict)  # setting -> option, value
    left_out: list[tuple[str, Any, str]] = field(default_factory=list)  # option, value, reason

    def drop(self, setting: str, reason: str) -> None:
        """Remove a setting; its option is listed with the reason."""
        if setting in self.values:
            value = self.values.pop(setting)
            self.left_out.append((*self.origins.get(setting, (setting, value)), reason))

    def add(self, option: str, value: Any, outcome: Outcome) -> None:
        """Add the settings of one option; a setting that an earlier option gave is not changed."""
        if not outcome.settings:
            self.left_out.append((option, value, outcome.note or _NO_COUNTERPART))
        for setting, converted in outcome.settings.items():
            if problem := value_problem(setting, converted):
                self.left_out.append((option, value, f"{setting}: {problem}"))
            elif self.values.setdefault(setting, converted) != converted:
                self.left_out.append((option, value, f"another option already sets {setting}"))
            elif setting not in self.origins:
                self.origins[setting] = (option, value)
                is_same = setting == option and converted == value
                origin = "" if is_same else option if converted == value else _short(option, value)
                self.comments[setting] = "; ".join(filter(None, (origin, outcome.note)))


def run_file_text(config: PeerConfig, gpus: int) -> str:
    """The text of a run file that trains as the configuration of the other program does.

    `gpus`: number of GPUs that the configuration is written for; it determines the global batch.
    Raises UserError if the configuration is not of a supervised fine-tuning run.
    """
    draft = _Draft()
    for option, value in config.options.items():
        if value not in (None, "", [], {}):  # these mean the program's default
            draft.add(option, value, _outcome(option, value, config))
    if not {"model", "train_data", "lora_r", "lr"} & draft.values.keys():
        raise UserError(
            f"{config.path}: no option of a training run, such as a model, data or learning_rate"
        )
    _set_batches(draft, config, gpus)
    _resolve_conflicts(draft)
    for setting, value in _DEFAULTS[config.program].items():
        if not {setting, settings_by("replaces").get(setting)} & draft.values.keys():
            draft.values[setting] = value
            draft.comments[setting] = f"default of {config.program}"
    if draft.comments.get("packing", "").startswith("default of"):
        draft.comments["packing"] += "; true is faster, and batch sizes then count packs"
    return _render(draft, config)


def _outcome(option: str, value: Any, config: PeerConfig) -> Outcome:
    """The settings that an option gives, or the reason why it gives none."""
    if function := OPTIONS.get(option):
        return function(value, config)
    setting = option if option in RunSettings.model_fields else settings_by("peers").get(option)
    if setting is None:
        return Outcome(note=advice(option) or _NO_COUNTERPART)
    value = {"yes": True, "on": True, "no": False, "off": False}.get(str(value), value)
    if setting.endswith("_strategy") and value is False:
        value = "no"
    is_valid = not value_problem(setting, value)
    if hint := value_advice(setting, value, is_valid=is_valid):
        # Many hints begin with the value to use: "auto: as few layers as memory needs".
        first_word, separator, rest = hint.replace(",", ":", 1).partition(":")
        converted = parse_value(first_word.strip().split(" ")[0], hint)
        if not value_problem(setting, converted):
            return Outcome({setting: converted}, rest.strip() if separator else "")
        return Outcome(note=hint)
    return Outcome({setting: value})


def _set_batches(draft: _Draft, config: PeerConfig, gpus: int) -> None:
    """Replace batch size and accumulation by `global_batch_size`, which holds for any GPU count."""
    sizes = ("batch_size", "gradient_accumulation_steps")
    given = {key: draft.values.pop(key, None) for key in sizes}
    if "global_batch_size" in draft.values:
        return
    size = draft.values.get("sequence_parallel_size", 1)
    groups = max(1, gpus // size) if isinstance(size, int) and size > 1 else gpus
    micro, steps = micro_batches(given, config.program, groups)
    draft.values["global_batch_size"] = micro * steps * groups
    unit = f"{gpus} GPUs (--gpus)"
    if groups != gpus:
        unit = f"{groups} groups of {size} GPUs that share sequences (--gpus {gpus})"
    draft.comments["global_batch_size"] = (
        f"micro-batches of {micro} x {steps} accumulation steps x {unit}"
    )


def _resolve_conflicts(draft: _Draft) -> None:
    """Remove settings that other settings of the draft replace, such as `epochs` by `max_steps`.

    The programs do the same. Flags are kept: if two exclude each other, such as bf16 and fp16, a
    comment says so.
    """
    if draft.values.get("warmup_steps") == 0:
        draft.drop("warmup_steps", "0 steps: warmup_ratio applies")
        draft.values.setdefault("warmup_ratio", 0)
    strategies = {"evaluation_strategy": "evals_per_epoch", "save_strategy": "saves_per_epoch"}
    for dropped, kept in {**settings_by("replaces"), **strategies}.items():
        if is_set(kept, draft.values) and not isinstance(draft.values.get(dropped), bool):
            draft.drop(dropped, f"{kept} replaces it")
    if "eval_data" not in draft.values or draft.values.get("evaluation_strategy") == "no":
        for key in ("keep_best", "early_stopping_patience"):
            draft.drop(key, "needs eval_data and evaluations")


def _render(draft: _Draft, config: PeerConfig) -> str:
    """The run file: settings in the order of docs/configuration.md, then the options left out."""
    lines = [f"# Converted from {config.path.name} ({config.program}) by launch/convert.py."]
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
        ("Not taken over:", True),
    ):
        entries = [e for e in draft.left_out if (e[2] != _NO_COUNTERPART) == has_reason]
        lines += ["", f"# {title}"] if entries else []
        for option, value, reason in entries:
            suffix = f"  ({reason.removesuffix('; remove it')})" if has_reason else ""
            lines.append(f"#   {_short(option, value)}{suffix}")
    return "\n".join(lines) + "\n"


def _setting_lines(setting: str, value: Any, comment: str) -> list[str]:
    if value is None:
        return [f"# {setting}: required, and not in the file"]
    has_mappings = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    is_flow = isinstance(value, list | dict) and not has_mappings
    text = _yaml(value, is_flow=True) if is_flow else _yaml({setting: value})
    text = f"{setting}: {text}" if is_flow else text
    first, *others = text.rstrip().split("\n")
    return [f"{first:<40}  # {comment}" if comment else first, *others]


def _combination_problem(values: Mapping[str, Any]) -> str:
    """The first combination of settings that is refused; empty if there is none."""
    try:
        RunSettings.model_validate({**dict.fromkeys(_REQUIRED, "unknown"), **values})
    except ValidationError as error:
        message: str = error.errors()[0]["msg"]
        return " ".join(message.removeprefix("Value error, ").split())
    return ""


def _short(option: str, value: Any) -> str:
    """`option: value` in one line of limited length."""
    text = f"{option}: {_yaml(value, is_flow=True).removesuffix('...').strip()}"
    return text if len(text) <= 80 else text[:77] + "..."


def _yaml(value: Any, *, is_flow: bool = False) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=is_flow, sort_keys=False, allow_unicode=True, width=_NO_WRAPPING
    )
    return text.strip()
