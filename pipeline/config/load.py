"""Load RunSettings from a run file and overrides; errors name the file, the line and the key."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from pipeline.config.data_names import DataNames, DataSource
from pipeline.config.hub import HubSplit
from pipeline.config.located import parse_value, read_located
from pipeline.config.paths import expand
from pipeline.config.peers import hint
from pipeline.config.presets import PRESETS, Preset
from pipeline.config.settings import RunSettings, map_paths, path_settings, settings_by
from pipeline.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def load_settings(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run file and apply presets and `key=value` overrides.

    Precedence: defaults < presets < run file < overrides. A hub model or data set in the local
    cache is pinned to its cached commit (`model_revision`, `NAME@COMMIT:SPLIT`). Raises UserError
    that lists every wrong key with its file and line.
    """
    file = read_located(path, "YAML")
    places = {key: file.place(key) for key in file.values}
    return _with_overrides(dict(file.values), places, str(path), overrides)


def settings_without_file(values: Mapping[str, Any], overrides: Sequence[str]) -> RunSettings:
    """Settings from `values` and `key=value` overrides, for a plan without a run file."""
    places = dict.fromkeys(values, "command line")
    return _with_overrides(dict(values), places, "command line", overrides)


def _with_overrides(
    values: dict[str, Any], places: dict[str, str], source: str, overrides: Sequence[str]
) -> RunSettings:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"command line: {override!r}: expected key=value, e.g. lr=1e-4")
        values[key] = parse_value(text, f"command line: {override}")
        places[key] = "command line"
    settings = _validated(values, places, source)
    data = {key: _pinned(getattr(settings, key)) for key in ("train_data", "eval_data")}
    settings = settings.model_copy(update=data)
    return _with_model_commit(settings, places)


def _with_model_commit(settings: RunSettings, places: Mapping[str, str]) -> RunSettings:
    """Pin a hub model to the commit of its snapshot in the local cache, if there is one."""
    if Path(settings.model).exists():
        if settings.model_revision is not None:
            raise UserError(
                f"{places['model_revision']}: model_revision: {settings.model} is a folder, which "
                "has no revisions; remove the key or give the name of a hub model"
            )
        return settings
    if (snapshot := settings.model_folder) == Path(settings.model):
        return settings  # not in the cache: reported when the model is needed
    return settings.model_copy(update={"model_revision": snapshot.name})


def dump_settings(settings: RunSettings) -> str:
    """Settings as the YAML text of an equivalent run file."""
    return yaml.safe_dump(settings.as_written(), sort_keys=False, allow_unicode=True)


def _pinned(names: DataNames | float | None) -> DataNames | float | None:
    """Pin the hub data sets among the names to their commits in the local cache."""
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


def _validated(values: Mapping[str, Any], places: Mapping[str, str], source: str) -> RunSettings:
    """Validate the values of a file and its overrides; UserError with a line per problem."""
    unknown = [key for key in values if key not in RunSettings.model_fields]
    problems = [f"{places[key]}: {key}: unknown setting; {_hint(key)}" for key in unknown]
    meant = {setting for key in unknown if (setting := settings_by("peers").get(key))}
    known = {key: value for key, value in values.items() if key in RunSettings.model_fields}
    known, written = _expanded(known, places, problems)
    try:
        settings = RunSettings.model_validate({**_preset_values(known.get("preset")), **known})
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for detail in error.errors():  # pydantic gives one for each member of a union
            by_key.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
        for key, details in by_key.items():
            if not (key in meant | values.keys() and details[0]["type"] == "missing"):
                problems.append(_problem(key, details, places, source))
    if problems:
        raise UserError("\n".join(problems))
    return settings.with_written_paths(written)


def _expanded(
    values: Mapping[str, Any], places: Mapping[str, str], problems: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Expand the paths in values; also return key -> expanded path -> text in the file.

    A value that cannot be expanded is left out, and the reason is added to `problems`.
    """
    expanded, written = dict(values), {}
    for key in path_settings():
        texts: dict[str, str] = {}
        if key not in values:
            continue
        try:
            expanded[key] = map_paths(values[key], partial(_expand, texts))
        except ValueError as error:
            problems.append(f"{places[key]}: {key}: {error}; found {_SHORT.repr(values[key])}")
            del expanded[key]
        if texts:
            written[key] = texts
    return expanded, written


def _expand(texts: dict[str, str], text: str) -> str:
    """Expand a path; if the result differs from the text, store the text in `texts`."""
    path = expand(text)
    if path != text:
        texts[path] = text
    return path


def _hint(key: str) -> str:
    """Advice for an unknown key: the equivalent or a similar setting."""
    if known := hint(key):
        return known
    near = difflib.get_close_matches(key, RunSettings.model_fields, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else "all settings: docs/configuration.md"


def _preset_values(names: Any) -> dict[str, Any]:
    """Merge presets; later ones override earlier ones. RunSettings refuses unknown names."""
    values: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        if name in get_args(Preset):
            values |= PRESETS[name]
    return values


def _problem(
    key: str, details: Sequence[Mapping[str, Any]], places: Mapping[str, str], source: str
) -> str:
    """Error line: file and line, key, expected and given value. `details`: pydantic's errors."""
    if details[0]["type"] == "missing":
        return f"{source}: {key}: this setting is required and not there"
    expected = " or ".join(dict.fromkeys(_expectation(detail) for detail in details))
    if not key:  # the text of a rule over several keys names them
        keys = [name for name in places if re.search(rf"\b{re.escape(name)}\b", expected)]
        where = ", ".join(dict.fromkeys(places[name] for name in keys)) or source
        return f"{where}: {expected}"
    return f"{places.get(key, source)}: {key}: {expected}; found {_SHORT.repr(details[0]['input'])}"


def _expectation(detail: Mapping[str, Any]) -> str:
    message: str = detail["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "must be")
