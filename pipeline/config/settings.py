"""RunSettings: the validated settings of a run file, and the checks of combinations of keys.

The keys are declared in data_keys.py, run_keys.py and adapter_keys.py. A setting may have traits,
which are facts about it for other packages, such as its key in a DeepSpeed config (traits.py).
pipeline/plan applies the settings to a model and a machine.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import regex
from pydantic import ConfigDict, PrivateAttr, field_validator, model_validator
from pydantic.config import JsonDict

from pipeline.config.adapter_keys import AdapterKeys
from pipeline.config.data_keys import DataKeys
from pipeline.config.data_names import DataSource, sources
from pipeline.config.frequency import Frequency, frequency
from pipeline.config.hub import snapshot_folder
from pipeline.config.presets import PRESETS, Preset
from pipeline.config.run_keys import RunKeys
from pipeline.config.traits import Change, traits

# Values that turn a setting off, or leave the choice to the plan.
_OFF: tuple[Any, ...] = (None, False, 0, "no", "none", [], {}, "auto")
_TIME = re.compile("[0-9]{1,6}:[0-9]{1,6}:[0-9]{1,6}")  # HH:MM:SS


class RunSettings(AdapterKeys, RunKeys, DataKeys):
    """The validated settings of a run, as a frozen pydantic model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Setting -> expanded path -> its text in the run file, for each path that expansion changed.
    _unexpanded_paths: dict[str, dict[str, str]] = PrivateAttr(default_factory=dict)

    @field_validator("time_limit", mode="before")
    @classmethod
    def _check_time_limit(cls, value: Any) -> str | None:
        if value is None:
            return None
        if not (isinstance(value, str) and _TIME.fullmatch(value) and _seconds(value)):
            raise ValueError("expected HH:MM:SS above zero, for example '03:50:00'")
        return str(value)

    @field_validator("eval_regex")
    @classmethod
    def _check_eval_regex(cls, value: str | None) -> str | None:
        try:
            regex.compile(value or "")
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _check_warmup_steps(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError("expected a whole number of steps, or a share below 1")
        return value

    @field_validator("trackers", "tracker_uploads", "accept_changes", "preset")
    @classmethod
    def _check_unique(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and (twice := {x for x in value if value.count(x) > 1}):
            raise ValueError(f"{min(twice)} is given twice")
        return value

    @model_validator(mode="before")
    @classmethod
    def _apply_dependent_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Set the defaults that depend on other keys of the run file.

        Raises ValueError if keys of the run file contradict each other.
        """
        values = dict(values)
        given = {key for key, value in values.items() if value is not None}
        # For example, `warmup_steps` sets the default of `warmup_ratio` to null.
        for replaced, key in settings_by_trait("replaces").items():
            if key not in given or not _may_be_null(replaced):
                continue
            if replaced in given:
                raise ValueError(f"{key} and {replaced}: both are given; set one of them to null")
            values[replaced] = None
        for strategy, steps, per_epoch in (
            ("evaluation_strategy", "eval_steps", "evals_per_epoch"),
            ("save_strategy", "save_steps", "saves_per_epoch"),
        ):
            if per_epoch in given and values.setdefault(strategy, "epoch") != "epoch":
                raise ValueError(f"{per_epoch}: needs {strategy}: epoch; remove {strategy}")
            if steps in given:
                values.setdefault(strategy, "steps")
            elif steps in values and values.get(strategy) == "steps":
                raise ValueError(f"{strategy}: steps needs {steps}")
        if "max_steps" in given:
            values.setdefault("epochs", "auto")
        elif values.get("epochs") == "auto":
            raise ValueError("epochs: auto needs max_steps; give one of the two as a number")
        return values

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.bf16 is True and self.fp16 is True:
            raise ValueError("bf16 and fp16: both are true; keep one of them")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: both are true; keep one of them")
        if self.split_turns and self.train_on == "all":
            raise ValueError(
                "split_turns: with train_on: all, each turn would be trained in every document "
                "that contains it; use train_on: assistant"
            )
        if self.init_adapter_resize and self.init_adapter is None:
            raise ValueError("init_adapter_resize: needs init_adapter")
        if self.init_adapter is not None and self.resume not in ("auto", "must", "never"):
            raise ValueError(
                "init_adapter and resume: a run starts from an adapter or from a checkpoint; "
                "remove one of them"
            )
        has_evaluations = self.eval_data is not None and self.evaluation_strategy != "no"
        for key in ("keep_best", "early_stopping_patience", "eval_generate"):
            if getattr(self, key) and not has_evaluations:
                raise ValueError(
                    f"{key}: needs eval_data and an evaluation_strategy of steps or epoch"
                )
        return self

    def with_unexpanded_paths(self, unexpanded: dict[str, dict[str, str]]) -> Self:
        """Record the text of paths before expansion: setting -> expanded path -> text."""
        self._unexpanded_paths.update(unexpanded)
        return self

    def dump_unexpanded(self) -> dict[str, Any]:
        """All values as JSON data, with paths as in the run file: `~` and `$NAME` are kept."""
        values = self.model_dump(mode="json")
        for key, texts in self._unexpanded_paths.items():
            values[key] = map_paths(values[key], partial(_unexpanded_path, texts))
        return values

    @property
    def model_folder(self) -> Path:
        """Folder of the base model; for a hub model, its snapshot in the local cache.

        If neither the folder nor the snapshot exists, the result is `model` as a path.
        """
        folder = Path(self.model)
        if folder.exists():
            return folder
        return snapshot_folder(self.model, revision=self.model_revision or "main") or folder

    @property
    def init_adapter_folder(self) -> Path | None:
        """Folder of `init_adapter`; for a hub adapter, its snapshot in the local cache."""
        if self.init_adapter is None:
            return None
        folder = Path(self.init_adapter)
        return folder if folder.exists() else snapshot_folder(self.init_adapter) or folder

    @property
    def train_sources(self) -> list[DataSource]:
        """`train_data` as a list of sources."""
        return sources(self.train_data)

    @property
    def eval_sources(self) -> list[DataSource]:
        """`eval_data` as a list of sources; empty if it is a share or number of training rows."""
        return [] if isinstance(self.eval_data, int | float) else sources(self.eval_data)

    @property
    def held_out(self) -> float | int | None:
        """Share (float) or number (int) of training rows to hold out.

        None if `eval_data` names files or is not set.
        """
        return self.eval_data if isinstance(self.eval_data, int | float) else None

    @property
    def alpha(self) -> float:
        """`lora_alpha` as a number; for `auto`, the alpha with which the scaling is 2."""
        if self.lora_alpha != "auto":
            return self.lora_alpha
        return 2.0 * (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)

    @property
    def adapter_options(self) -> dict[str, Any]:
        """The settings of AdapterKeys that differ from their defaults."""
        return {
            name: getattr(self, name)
            for name, field in AdapterKeys.model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        }

    @property
    def initialises_from_base(self) -> bool:
        """Whether A and B start as the principal part of each base weight: PiSSA and OLoRA.

        The base weight in memory then lacks this part.
        """
        return self.init_lora_weights not in (True, "gaussian", "eva", "loftq")

    @property
    def initialises_from_inputs(self) -> bool:
        """Whether A starts as the principal directions of each layer's inputs: EVA.

        A run with `init_adapter` starts with the values of that adapter instead.
        """
        return self.init_lora_weights == "eva" and self.init_adapter is None

    @property
    def corrects_quantisation(self) -> bool:
        """Whether A and B start with a correction of the 4-bit base: LoftQ.

        A run with `init_adapter` starts with the values of that adapter instead.
        """
        return self.init_lora_weights == "loftq" and self.init_adapter is None

    @property
    def is_quantised(self) -> bool:
        """Whether the base model is quantised to 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def evaluations(self) -> Frequency | None:
        """Frequency of evaluations on the held-out rows; None for never."""
        return frequency(self.evaluation_strategy, self.eval_steps, self.evals_per_epoch)

    @property
    def saves(self) -> Frequency | None:
        """Frequency of checkpoints; None for never."""
        return frequency(self.save_strategy, self.save_steps, self.saves_per_epoch)

    @property
    def time_limit_s(self) -> float | None:
        """`time_limit` in seconds."""
        return None if self.time_limit is None else _seconds(self.time_limit)


def _seconds(time: str) -> float:
    """Number of seconds in `HH:MM:SS`."""
    hours, minutes, seconds = (int(part) for part in time.split(":"))
    return 3600.0 * hours + 60 * minutes + seconds


def _unexpanded_path(texts: dict[str, str], path: str) -> str:
    """A path as in the run file. `texts`: expanded path -> its text in the run file."""
    return texts.get(path, path)


def map_paths(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to each path in the value of a setting.

    The value is a path, a mapping with the key `path`, or a list of these. A value of another type
    is returned unchanged.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_paths(item, change) for item in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return value | {"path": change(value["path"])}
    return value


def path_settings() -> list[str]:
    """Names of the settings whose value may be a path."""
    return [name for name in RunSettings.model_fields if _traits_of(name)["is_path"]]


def settings_with_change(*changes: Change) -> frozenset[str]:
    """Names of the settings whose trait `change` is one of `changes`.

    This trait is the effect of a changed value on a run that is resumed (traits.py).
    """
    names = RunSettings.model_fields
    return frozenset(name for name in names if _traits_of(name)["change"] in changes)


def settings_without_effect(
    settings: RunSettings, data_formats: Collection[str] = ()
) -> dict[str, str]:
    """Settings that the run file sets and that have no effect -> the reason.

    A setting has no effect if a condition of its trait `needs` is not met. A value that turns
    something off counts as not set, except `false` for a setting whose default is true. In a
    run.yaml, which has all settings, the default values count as not set, too. `data_formats`:
    formats of the rows, if they have been read.
    """
    names = settings.model_fields_set
    has_all_settings = names >= RunSettings.model_fields.keys()
    without_effect = {}
    for name in sorted(names):
        field, value = RunSettings.model_fields[name], getattr(settings, name)
        is_default = value == field.get_default(call_default_factory=True)
        is_off = value in _OFF and (is_default or value is not False)
        if is_off or (has_all_settings and is_default):
            continue
        for condition in _conditions(name):
            if not _is_met(condition, settings, data_formats):
                without_effect[name] = condition_text(condition)
                break
    if {"eval_steps", "evals_per_epoch"} & without_effect.keys():
        # Each of these keys sets evaluation_strategy, so the run file need not contain it.
        without_effect.pop("evaluation_strategy", None)
    return without_effect


def _conditions(name: str) -> list[str]:
    """The trait `needs` of a setting."""
    return cast("list[str]", _traits_of(name)["needs"])


def condition_text(condition: str) -> str:
    """A condition of the trait `needs` as text, such as "used only with save_strategy: steps"."""
    key, _, allowed = condition.partition("=")
    value = f": {allowed.replace('|', ' or ')}" if allowed else ""
    return f"{'not used with' if '!' in key else 'used only with'} {key.strip('!')}{value}"


def _is_met(condition: str, settings: RunSettings, data_formats: Collection[str]) -> bool:
    """Whether settings meet a condition of the trait `needs`.

    `KEY` is met if the key has a value that is not off, `KEY=A|B` if the key has one of these
    values; `!KEY` and `KEY!=A|B` are met in the opposite case. If rows have been read, the values
    of `data_format` are the formats of the rows.
    """
    left_side, separator, allowed = condition.partition("=")
    key, is_negated = left_side.strip("!"), "!" in left_side
    if not separator:
        return (getattr(settings, key) not in _OFF) != is_negated
    values = data_formats if key == "data_format" and data_formats else [getattr(settings, key)]
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return any((text in allowed.split("|")) != is_negated for text in texts)


def settings_by_trait(trait: Literal["layout", "deepspeed", "peers", "replaces"]) -> dict[str, str]:
    """Mapping from each value of a trait to the name of the setting that has this value.

    For example, `settings_by_trait("peers")["learning_rate"]` is "lr", because `lr` has the name
    `learning_rate` in other programs. traits.py explains the traits.
    """
    by_value: dict[str, str] = {}
    for name in RunSettings.model_fields:
        values: Any = _traits_of(name)[trait] or []
        by_value |= dict.fromkeys([values] if isinstance(values, str) else values, name)
    return by_value


def is_set(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key has a value other than null, false and `auto`."""
    return values.get(key) not in (None, False, "auto")


def preset_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The merged values of the presets that a run file names; later presets override earlier ones.

    `given`: the values of the run file. A key of a preset is left out if another key of the run
    file replaces it. Unknown names are ignored here; RunSettings refuses them.
    """
    values: dict[str, Any] = {}
    names: Any = given.get("preset")
    for name in names if isinstance(names, list) else [names]:
        if name in get_args(Preset):
            values |= PRESETS[name]
    replaced_by = settings_by_trait("replaces")
    return {
        key: value for key, value in values.items() if not is_set(replaced_by.get(key, ""), given)
    }


def replaced_preset_values(settings: RunSettings) -> dict[str, str]:
    """Keys whose preset value is not used in a run -> the reason."""
    run_values = vars(settings)
    values = preset_values({"preset": settings.preset})
    return {
        key: f"{other} is set, which replaces the preset's {key}: {values[key]}"
        for key, other in settings_by_trait("replaces").items()
        if key in values and run_values[key] != values[key] and is_set(other, run_values)
    }


def _may_be_null(name: str) -> bool:
    """Whether the type of a setting allows None."""
    return type(None) in get_args(RunSettings.model_fields[name].annotation)


def _traits_of(name: str) -> JsonDict:
    """All traits of a setting."""
    extra = RunSettings.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else traits()
