"""A user's own DeepSpeed JSON: held against the run file, then laid over the generated config.

DeepSpeed ignores keys it does not know; here they are refused. What a known key may say is the
rule table's business, which sees the merged config.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.located import KeyPath, Located, read_located
from pipeline.config.settings import RunSettings, settings_by
from pipeline.errors import UserError
from pipeline.plan.deepspeed.keys import (
    REMOVED,
    REMOVED_FROM_ZERO,
    TOP_LEVEL,
    ZERO_OPTIMIZATION,
)


def with_json_constraints(path: str, settings: RunSettings) -> RunSettings:
    """The settings with what the JSON fixes. Raises UserError where the run file says otherwise.

    Called before anything is chosen, so that the choice is made for the values of the JSON.
    """
    found = _read(path)
    fixed: dict[str, Any] = {}
    for dotted, name in settings_by("deepspeed").items():
        key = tuple(dotted.split("."))
        value, setting = _at(found, key), getattr(settings, name)
        if value is None or value == "nvme":  # nvme is refused by rule
            continue
        if name in settings.model_fields_set and setting not in ("auto", value):
            raise UserError(
                f"{_place(found, key)}: {_shown(value)}, but the run file or its preset has "
                f"{name}: {_shown(setting)}; keep one of them"
            )
        _validate(settings, {name: value}, f"{_place(found, key)}: {_shown(value)}")
        fixed[name] = value
    _validate(settings, fixed, f"deepspeed_json: {path}: {_shown(fixed)}")
    return settings.model_copy(update=fixed)


def overlay(generated: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The generated config with the JSON's keys laid over it, block by block.

    Raises UserError for keys that DeepSpeed does not read, and for values of another kind than
    the ones they replace. Keys that DeepSpeed removed pass: each has its rule.
    """
    found = _read(path)
    _require_known(found, (), TOP_LEVEL | REMOVED.keys())
    if isinstance(found.values.get("zero_optimization"), Mapping):
        known = ZERO_OPTIMIZATION | REMOVED_FROM_ZERO.keys()
        _require_known(found, ("zero_optimization",), known)
    return _merged(generated, found.values, found, ())


def _merged(
    below: Mapping[str, Any], above: Mapping[str, Any], found: Located, path: KeyPath
) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if value is None and key in below:  # null is "leave it out"
            continue
        if isinstance(value, Mapping):
            if old is not None and not isinstance(old, Mapping):
                raise UserError(_other_kind(found, (*path, key), value, old))
            merged[key] = _merged(old or {}, value, found, (*path, key))
        else:
            if old is not None and _kind(value) != _kind(old):
                raise UserError(_other_kind(found, (*path, key), value, old))
            merged[key] = value
    return merged


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "a block in braces"


def _other_kind(found: Located, key: KeyPath, value: Any, old: Any) -> str:
    return f"{_place(found, key)}: {_shown(value)} is not {_kind(old)}, as in {_shown(old)}"


def _require_known(found: Located, block: KeyPath, known: Iterable[str]) -> None:
    names = sorted(known)
    problems = []
    for key in _at(found, block):
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "take it out"
            problems.append(f"{_place(found, (*block, key))}: no key that DeepSpeed reads; {hint}")
    if problems:
        raise UserError("\n".join(problems))


def _validate(settings: RunSettings, values: dict[str, Any], found: str) -> None:
    try:
        RunSettings.model_validate(settings.model_dump() | values)
    except ValidationError as error:
        said = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        shown = said.removeprefix("Value error, ").replace("Input should be", "must be")
        raise UserError(f"{found}: {shown}") from None


def _read(path: str) -> Located:
    """The file without its "auto" values."""
    located = read_located(Path(path), "JSON", label="deepspeed_json: ")
    return replace(located, values=_without_auto(located.values))


def _at(located: Located, key: KeyPath) -> Any:
    """The value at a path, None where there is none."""
    value: Any = located.values
    for part in key:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _place(located: Located, key: KeyPath) -> str:
    """File, line and key."""
    return f"{located.place(*key)}: {'.'.join(key)}"


def _without_auto(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block without "auto", which means what the plan generates."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if value != "auto"
    }


def _shown(value: Any) -> str:
    return json.dumps(value)
