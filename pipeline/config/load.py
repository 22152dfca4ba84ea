"""Run file + `key=value` overrides -> RunSettings, with messages that name file, line and key."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.data_names import DataNames, DataSource
from pipeline.config.hub import HubSplit, snapshot_folder
from pipeline.config.presets import PRESETS
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError


class _RunFileLoader(yaml.SafeLoader):
    """SafeLoader with the plain values of YAML 1.2.

    `3e-4` is a number, `no` is a word, and `12:00:00` or `2024-01-01` are text.
    """


_YAML_1_1 = (":float", ":int", ":bool", ":timestamp")
_RunFileLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_YAML_1_1)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (  # the first that matches wins: whole numbers before others
    ("int", r"^[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.inf|\.nan)$",
        "-+.0123456789",
    ),
    ("bool", "^(true|false|True|False)$", "tTfF"),
):
    _RunFileLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
    )


def load_settings(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run file and apply presets and `key=value` overrides.

    Precedence: defaults < presets < run file < overrides. A `model` that is no folder but the name
    of a snapshot in the hub's local cache becomes that snapshot's folder, revision and all, and a
    hub data set that lies there gets its revision. Raises UserError that lists every wrong key with
    the place it was read from.
    """
    values, places = _read_file(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"command line: {override!r}: expected key=value, e.g. lr=1e-4")
        values[key] = _parse(text, f"command line: {override}")
        places[key] = "command line"
    unknown = [key for key in values if key not in RunSettings.model_fields]
    if unknown:
        raise UserError("\n".join(_unknown(key, places[key]) for key in unknown))
    presets = _preset_values(values.get("preset", []), places.get("preset", str(path)))
    settings = _validated({**presets, **values}, places, str(path))
    data = {key: _pinned(getattr(settings, key)) for key in ("train_data", "eval_data")}
    settings = settings.model_copy(update=data)
    if not Path(settings.model).exists() and (folder := snapshot_folder(settings.model)):
        return settings.model_copy(update={"model": str(folder)})
    return settings


def dump_settings(settings: RunSettings) -> str:
    """Settings as the YAML text of a run file that means the same."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _pinned(names: DataNames | float | None) -> DataNames | float | None:
    """The names, hub data sets in the local cache with the commit that they are at there."""
    if isinstance(names, list):
        return [_pinned_one(name) for name in names]
    return _pinned_one(names) if isinstance(names, str | DataSource) else names


def _pinned_one(name: str | DataSource) -> str | DataSource:
    path = name if isinstance(name, str) else name.path
    split = HubSplit.parse(path)
    snapshot = split.snapshot() if split else None
    if split is None or snapshot is None:
        return name
    pinned = str(dataclasses.replace(split, revision=snapshot.name))
    return pinned if isinstance(name, str) else name.model_copy(update={"path": pinned})


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the top-level keys, and `file:line` of each."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the run file: {error}") from None
    try:
        node = yaml.compose(text, Loader=_RunFileLoader)
        values = yaml.load(text, Loader=_RunFileLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `key: value`, such as `lora_r: 16`")
    places: dict[str, str] = {}
    for key_node, _ in node.value:
        key, place = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key in places:
            raise UserError(f"{place}: {key}: given twice; the first is at {places[key]}")
        places[key] = place
    return {str(key): value for key, value in values.items()}, places


def _parse(text: str, place: str) -> Any:
    try:
        return yaml.load(text, Loader=_RunFileLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{place}: not valid YAML: {error}") from None


def _unknown(key: str, place: str) -> str:
    near = difflib.get_close_matches(key, RunSettings.model_fields, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "all settings: docs/configuration.md"
    return f"{place}: {key}: unknown setting; {hint}"


def _preset_values(names: Any, place: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if not isinstance(names, str | list):
        raise UserError(f"{place}: preset: expected a name or a list of names; found {names!r}")
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str) or name not in PRESETS:
            known = ", ".join(PRESETS)
            raise UserError(f"{place}: preset: unknown preset {name!r}; known: {known}")
        values |= PRESETS[name]
    return values


def _validated(values: Mapping[str, Any], places: Mapping[str, str], source: str) -> RunSettings:
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        by_key: dict[str, dict[str, Any]] = {}
        for problem in error.errors():  # a union gives one problem for each of its members
            key = str(problem["loc"][0]) if problem["loc"] else ""
            by_key.setdefault(key, {"problems": [], "input": problem["input"]})
            by_key[key]["problems"].append(problem)
        lines = [_problem(key, found, places, source) for key, found in by_key.items()]
        raise UserError("\n".join(lines)) from None


def _problem(key: str, found: Mapping[str, Any], places: Mapping[str, str], source: str) -> str:
    problems = found["problems"]
    if problems[0]["type"] == "missing":
        return f"{source}: {key}: this setting is required and not there"
    said = " or ".join(dict.fromkeys(_expectation(problem) for problem in problems))
    if not key:  # a rule over several keys names them itself
        keys = [name for name in RunSettings.model_fields if re.search(rf"\b{name}\b", said)]
        where = next((places[name] for name in keys if name in places), source)
        return f"{where}: {said}"
    return f"{places.get(key, source)}: {key}: {said}; found {found['input']!r}"


def _expectation(problem: Mapping[str, Any]) -> str:
    message: str = problem["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "must be")
