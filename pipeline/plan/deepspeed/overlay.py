"""The user's own DeepSpeed JSON (`deepspeed_json`), which is merged into the generated config.

First `with_json_constraints` compares it with the run file, so that the search for a layout uses
its values. Then `overlay` merges it. Unknown keys are refused, because DeepSpeed would ignore them
at the top level. The rules (plan/rules/) check the merged config.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.located import KeyPath, Located, read_located
from pipeline.config.settings import RunSettings, settings_by_trait
from pipeline.errors import UserError
from pipeline.plan.deepspeed.keys import (
    BLOCKS,
    CHOICES,
    FLAGS,
    LISTS,
    SHORT_NAMES,
    TEXTS,
    WHOLE_NUMBERS,
)

_ZERO = "zero_optimization"


def with_json_constraints(path: str, settings: RunSettings) -> RunSettings:
    """The settings with the values of the JSON, such as zero_stage from zero_optimization.stage.

    The search for a layout then tries only these values. Raises UserError for a key that has
    another value in the run file, and for a key that DeepSpeed does not read.
    """
    user_json = _read_json_config(path)
    constraints: dict[str, Any] = {}
    for dotted_path, name in settings_by_trait("deepspeed").items():
        key = tuple(dotted_path.split("."))
        value, setting = _value_at(user_json, key), getattr(settings, name)
        if value is None or value == "nvme":  # the rule nvme-not-yet refuses nvme
            continue
        if name in settings.model_fields_set and setting not in ("auto", value):
            raise UserError(
                f"{_location_of(user_json, key)}: {_as_json(value)}, but the run file or its "
                f"preset has {name}: {_as_json(setting)}; keep one of them"
            )
        _validate(settings, {name: value}, f"{_location_of(user_json, key)}: {_as_json(value)}")
        constraints[name] = value
    _validate(settings, constraints, f"deepspeed_json: {path}: {_as_json(constraints)}")
    return settings.model_copy(update=constraints)


def overlay(generated: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The generated config with the user's JSON merged into it, key by key also within blocks.

    Raises UserError for a key that DeepSpeed does not read, and for a value of another type than
    the value that it replaces. Keys that DeepSpeed removed are accepted here, because rules refuse
    them later (plan/rules/deepspeed.py).
    """
    user_json = _read_json_config(path)
    return _merge(generated, user_json.values, user_json, ())


def _merge(
    generated: Mapping[str, Any], block: Mapping[str, Any], user_json: Located, path: KeyPath
) -> dict[str, Any]:
    """A generated block with the user's block merged into it; `path`: key path of the block."""
    merged = dict(generated)
    for key, value in block.items():
        old = generated.get(key)
        is_block = isinstance(value, Mapping)
        if old is not None and _type_name(value) != _type_name(old):
            location = _location_of(user_json, (*path, key))
            raise UserError(
                f"{location}: {_as_json(value)} is not {_type_name(old)}; the generated config has "
                f"{_as_json(old)}"
            )
        merged[key] = _merge(old or {}, value, user_json, (*path, key)) if is_block else value
    return merged


def _type_name(value: Any) -> str:
    """The JSON type of a value, in words for messages."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "a block in braces"


def _validate(settings: RunSettings, values: dict[str, Any], location: str) -> None:
    """Raise UserError if the settings with these values are not valid."""
    try:
        RunSettings.model_validate(settings.model_dump() | values)
    except ValidationError as error:
        messages = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        text = messages.removeprefix("Value error, ").replace("Input should be", "must be")
        raise UserError(f"{location}: {text}") from None


def _read_json_config(path: str) -> Located:
    """Read and check the JSON file.

    Keys whose value is "auto" or null are left out, because these mean the generated value. Short
    names of ZeRO-3's keys are replaced by the full names. Raises UserError for unknown keys, also
    if their value is "auto" or null.
    """
    user_json = read_located(Path(path), "JSON", label="deepspeed_json: ")
    _require_known(user_json)
    values, lines = _without_auto(user_json.values), dict(user_json.lines)
    zero = values.get(_ZERO)
    for short, full in SHORT_NAMES.items():
        if not isinstance(zero, dict) or short not in zero:
            continue
        if full in zero:
            raise UserError(
                f"{_location_of(user_json, (_ZERO, short))}: another name of {full} in line "
                f"{lines[_ZERO, full]}; keep one of them"
            )
        zero[full] = zero.pop(short)
        lines[_ZERO, full] = lines[_ZERO, short]
    user_json = replace(user_json, values=values, lines=lines)
    _require_values(user_json)
    return user_json


def _require_known(user_json: Located) -> None:
    """Raise UserError for keys that DeepSpeed does not read."""
    problems = []
    for key in user_json.lines:
        names = BLOCKS.get(key[:-1])
        if names is not None and key[-1] not in names:
            near = difflib.get_close_matches(key[-1], sorted(names), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            problems.append(
                f"{_location_of(user_json, key)}: DeepSpeed does not read this key; {hint}"
            )
    if problems:
        raise UserError("\n".join(problems))


def _require_values(user_json: Located) -> None:
    """Raise UserError for values that DeepSpeed would refuse only after the model is loaded."""
    problems = []
    for key in user_json.lines:
        value = _value_at(user_json, key)
        if value is not None and (expected := _expected_values(key, value)):
            problems.append(f"{_location_of(user_json, key)}: {_as_json(value)} is not {expected}")
    if problems:
        raise UserError("\n".join(problems))


def _expected_values(key: KeyPath, value: Any) -> str | None:
    """Description of the values that the key accepts; None if `value` is one of them."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in BLOCKS and not isinstance(value, Mapping):
        return "a block in braces"
    if key in FLAGS and not isinstance(value, bool):
        return "true or false"
    if key in TEXTS and not isinstance(value, str):
        return "text"
    if key in LISTS and not isinstance(value, list):
        return "a list"
    if (least := WHOLE_NUMBERS.get(key)) is not None:
        is_right = is_number and least <= value < 2**63 and value == int(value)
        return None if is_right else f"a whole number of at least {least}"
    if key in CHOICES and value not in CHOICES[key]:
        return " or ".join(CHOICES[key])
    if key == ("optimizer", "params", "betas"):
        is_pair = isinstance(value, list) and len(value) == 2
        is_right = is_pair and all(
            isinstance(beta, int | float) and 0 <= beta < 1 for beta in value
        )
        return None if is_right else "a list of two numbers from 0 to below 1"
    if key == ("optimizer", "params", "eps") and not (is_number and 0 < value < 1):
        return "a number above 0 and below 1"
    return None


def _without_auto(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block without keys whose value is "auto" or null, also in blocks within it."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if value not in ("auto", None)
    }


def _value_at(user_json: Located, key: KeyPath) -> Any:
    """The value at a path; None if the key is missing."""
    value: Any = user_json.values
    for part in key:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _location_of(user_json: Located, key: KeyPath) -> str:
    """File, line and dotted key for a message; the key has the name that the file uses."""
    name_in_file = key
    if len(key) == 2 and key[0] == _ZERO:  # the file may have the name without `stage3_`
        short_key = (_ZERO, key[1].removeprefix("stage3_"))
        if short_key in user_json.lines:
            name_in_file = short_key
    return f"{user_json.location(*key)}: {'.'.join(name_in_file)}"


def _as_json(value: Any) -> str:
    return json.dumps(value)
