"""A user's own DeepSpeed JSON: held against the run file, then laid over the generated config.

DeepSpeed ignores keys it does not know; here they are refused. What a known key may say is the
rule table's business, which sees the merged config.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.settings import RunSettings, settings_by
from pipeline.errors import UserError
from pipeline.plan.deepspeed.keys import (
    REMOVED,
    REMOVED_FROM_ZERO,
    TOP_LEVEL,
    ZERO_OPTIMIZATION,
)

_Path = tuple[str, ...]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')


@dataclass(frozen=True)
class _Json:
    """A parsed file without its "auto" values, and the line of each key by its path."""

    path: str
    values: Mapping[str, Any]
    lines: Mapping[_Path, int]

    def place(self, key: _Path) -> str:
        """File, line and key."""
        return f"deepspeed_json: {self.path}:{self.lines[key]}: {'.'.join(key)}"

    def at(self, key: _Path) -> Any:
        """The value at a path, None where there is none."""
        found: Any = self.values
        for part in key:
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def with_json_constraints(path: str, settings: RunSettings) -> RunSettings:
    """The settings with what the JSON fixes. Raises UserError where the run file says otherwise.

    Called before anything is chosen, so that the choice is made for the values of the JSON.
    """
    found = _read(path)
    fixed: dict[str, Any] = {}
    for dotted, name in settings_by("deepspeed").items():
        key = tuple(dotted.split("."))
        value, setting = found.at(key), getattr(settings, name)
        if value is None or value == "nvme":  # nvme is refused by rule
            continue
        if name in settings.model_fields_set and setting not in ("auto", value):
            raise UserError(
                f"{found.place(key)}: {_shown(value)}, but the run file or its preset has "
                f"{name}: {_shown(setting)}; keep one of them"
            )
        _validate(settings, {name: value}, f"{found.place(key)}: {_shown(value)}")
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
    below: Mapping[str, Any], above: Mapping[str, Any], found: _Json, path: _Path
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


def _other_kind(found: _Json, key: _Path, value: Any, old: Any) -> str:
    return f"{found.place(key)}: {_shown(value)} is not {_kind(old)}, as in {_shown(old)}"


def _require_known(found: _Json, block: _Path, known: Iterable[str]) -> None:
    names = sorted(known)
    problems = []
    for key in found.at(block):
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "take it out"
            problems.append(f"{found.place((*block, key))}: no key that DeepSpeed reads; {hint}")
    if problems:
        raise UserError("\n".join(problems))


def _validate(settings: RunSettings, values: dict[str, Any], found: str) -> None:
    try:
        RunSettings.model_validate(settings.model_dump() | values)
    except ValidationError as error:
        said = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        shown = said.removeprefix("Value error, ").replace("Input should be", "must be")
        raise UserError(f"{found}: {shown}") from None


def _read(path: str) -> _Json:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed_json: {path}: cannot be read: {error}") from None
    try:
        values = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"deepspeed_json: {path}:{line}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed_json: {path}: expected a block in braces")
    return _Json(path, _without_auto(values), _lines(text, path))


def _without_auto(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block without "auto", which means what the plan generates."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if value != "auto"
    }


def _lines(text: str, path: str) -> dict[_Path, int]:
    """Line of each key in valid JSON. Raises UserError where a key is given twice in a block."""
    lines: dict[_Path, int] = {}
    open_keys: list[str] = []  # the current key of each open block, "" in a list
    last = ""
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word == ":":
            open_keys[-1] = json.loads(last)
            key, line = tuple(open_keys), text.count("\n", 0, token.start()) + 1
            if key in lines and "" not in key:
                raise UserError(
                    f"deepspeed_json: {path}:{line}: {'.'.join(key)}: given twice; the first is "
                    f"in line {lines[key]}"
                )
            lines[key] = line
        elif word in "{[":
            open_keys.append("")
        elif word in "}]":
            open_keys.pop()
        else:
            last = word
    return lines


def _shown(value: Any) -> str:
    return json.dumps(value)
