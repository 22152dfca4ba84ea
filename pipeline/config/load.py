"""Load RunSettings from a run file and overrides; errors name the file, the line and the key."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.commands import DOCS, command
from pipeline.config.data_names import DataNames, DataSource
from pipeline.config.hub import HubSplit
from pipeline.config.located import parse_value, read_located
from pipeline.config.paths import expand
from pipeline.config.peers import advice, normalised, value_advice
from pipeline.config.settings import (
    RunSettings,
    map_paths,
    path_settings,
    preset_values,
    settings_by_trait,
)
from pipeline.errors import UserError

_MAX_PROBLEMS = 60  # lines of a message; enough for every key of another program's file
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 200  # characters
# Words of pydantic's messages, and those that replace them.
_PLAIN_WORDS = {
    "Value error, ": "",
    "Input should be": "must be",
    "a valid boolean": "true or false",
    "a valid list": "a list in brackets, such as [a, b]",
    "a valid string": "text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "String should have at least 1 character": "must not be empty",
    "must be greater than or equal to": "must be at least",
    "must be less than or equal to": "must be at most",
    "must be greater than": "must be above",
    "must be less than": "must be below",
}


def load_settings(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run file and apply presets and `key=value` overrides.

    Precedence: defaults < presets < run file < overrides. A hub model or data set in the local
    cache is pinned to its cached commit (`model_revision`, `NAME@COMMIT:SPLIT`). Raises a UserError
    that lists every wrong key with its file and line.
    """
    file = read_located(path, "YAML")
    locations = {key: file.location(key) for key in file.values}
    return _build_settings(dict(file.values), locations, str(path), overrides)


def settings_without_file(values: Mapping[str, Any], overrides: Sequence[str]) -> RunSettings:
    """RunSettings from `values` and `key=value` overrides, for a plan without a run file."""
    locations = dict.fromkeys(values, "command line")
    return _build_settings(dict(values), locations, "command line", overrides)


def _build_settings(
    values: dict[str, Any], locations: dict[str, str], source: str, overrides: Sequence[str]
) -> RunSettings:
    """RunSettings from the values of a run file and overrides; hub names are pinned to commits.

    `locations`: where each value was set, such as "run.yaml:3"; the overrides are added to it.
    `source`: the name of the run file, for messages about missing keys.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"command line: {override!r}: expected key=value, e.g. lr=1e-4")
        values[key] = parse_value(text, f"command line: {override}")
        locations[key] = "command line"
    settings = _validate(values, locations, source)
    data = {key: _pin_data(getattr(settings, key)) for key in ("train_data", "eval_data")}
    settings = settings.model_copy(update=data)
    return _pin_model(settings, locations)


def _pin_model(settings: RunSettings, locations: Mapping[str, str]) -> RunSettings:
    """Pin a hub model to the commit of its snapshot in the local cache, if there is one."""
    if Path(settings.model).exists():
        if settings.model_revision is not None:
            raise UserError(
                f"{locations['model_revision']}: model_revision: the model {settings.model} is a "
                "folder and has no revisions; remove the key, or give the name of a hub model"
            )
        return settings
    if (snapshot := settings.model_folder) == Path(settings.model):
        return settings  # not in the cache: the message comes when the model is needed
    return settings.model_copy(update={"model_revision": snapshot.name})


def dump_settings(settings: RunSettings) -> str:
    """Settings as the YAML text of an equivalent run file."""
    return yaml.safe_dump(settings.dump_unexpanded(), sort_keys=False, allow_unicode=True)


def _pin_data(names: DataNames | float | None) -> DataNames | float | None:
    """Pin the hub data sets of a data setting to their commits in the local cache."""
    if isinstance(names, list):
        return [_pin_source(name) for name in names]
    return _pin_source(names) if isinstance(names, str | DataSource) else names


def _pin_source(name: str | DataSource) -> str | DataSource:
    """The source, pinned to its commit if it is a hub data set in the local cache."""
    path = name if isinstance(name, str) else name.path
    split = HubSplit.parse(path)
    snapshot = split.snapshot() if split else None
    if split is None or snapshot is None:
        return name
    pinned = str(dataclasses.replace(split, revision=snapshot.name))
    return pinned if isinstance(name, str) else name.model_copy(update={"path": pinned})


def _validate(values: Mapping[str, Any], locations: Mapping[str, str], source: str) -> RunSettings:
    """Validate all values. Raises a UserError with one line for each wrong key.

    `locations` and `source`: as in `_build_settings`.
    """
    unknown = [key for key in values if key not in RunSettings.model_fields]
    problems = [
        f"{locations[key]}: {key or repr(key)}: unknown setting; {_key_advice(key, values[key])}"
        for key in unknown
    ]
    # Settings that the file has under the key of another training program, such as
    # `learning_rate`. They are not reported as missing, because the unknown key is reported.
    by_peer_name = settings_by_trait("peers")
    under_other_key = {by_peer_name[key] for key in unknown if key in by_peer_name}
    known = {key: value for key, value in values.items() if key in RunSettings.model_fields}
    for key, value in known.items():
        if hint := value_advice(key, value, is_valid=True):
            problems.append(f"{locations[key]}: {key}: {_SHORT_REPR.repr(value)}: {hint}")
    known, unexpanded = _expand_paths(known, locations, problems)
    try:
        presets = preset_values(known)
        settings = RunSettings.model_validate({**presets, **known})
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for detail in error.errors():  # pydantic reports one error for each member of a union
            by_key.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
        for key, details in by_key.items():
            has_advice = bool(value_advice(key, known.get(key), is_valid=True))
            is_missing = details[0]["type"] == "missing"
            is_reported = is_missing and (key in under_other_key or key in values)
            if not (has_advice or is_reported):
                problems.append(_error_line(key, details, locations, source))
    if problems:
        num_hidden = len(problems) - _MAX_PROBLEMS
        more = [f"{source}: {num_hidden:,} more errors"] if num_hidden > 0 else []
        raise UserError("\n".join([*problems[:_MAX_PROBLEMS], *more]))
    return settings.with_unexpanded_paths(unexpanded)


def _expand_paths(
    values: Mapping[str, Any], locations: Mapping[str, str], problems: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Expand `~` and `$NAME` in paths.

    Returns the values, and for each setting a mapping from expanded paths to their text in the run
    file: {"output_dir": {"/home/me/run": "~/run"}}. A value that cannot be expanded is removed, and
    the reason is added to `problems`.
    """
    expanded, unexpanded = dict(values), {}
    for key in path_settings():
        texts: dict[str, str] = {}  # expanded path -> text
        if key not in values:
            continue
        try:
            expanded[key] = map_paths(values[key], partial(_expand_path, texts))
        except ValueError as error:
            problems.append(
                f"{locations[key]}: {key}: {error}; found {_SHORT_REPR.repr(values[key])}"
            )
            del expanded[key]
        if texts:
            unexpanded[key] = texts
    return expanded, unexpanded


def _expand_path(texts: dict[str, str], text: str) -> str:
    """Expand a path; if the result differs from the text, store the text in `texts`."""
    path = expand(text)
    if path != text:
        texts[path] = text
    return path


def _key_advice(key: str, value: Any) -> str:
    """Advice for an unknown key: the setting of the same meaning, or the one of the nearest name.

    If the setting of the same meaning would refuse the value, the advice has the values it takes.
    """
    if text := advice(key):
        setting = settings_by_trait("peers").get(normalised(key))
        problem = value_problem(setting, value) if setting else ""
        return f"{text}; {problem}" if problem else text
    names = {name: name for name in RunSettings.model_fields} | settings_by_trait("peers")
    near = difflib.get_close_matches(normalised(key), names, n=1, cutoff=0.6)
    if isinstance(value, dict) and (not near or value_problem(names[near[0]], value)):
        return (
            f"keys are not nested: write {', '.join(map(str, value)) or 'its keys'} without "
            f"indentation, each in a line of its own; {command('convert')} FILE converts the "
            "configuration of another program"
        )
    return f"did you mean {names[near[0]]!r}?" if near else f"all settings: {DOCS}/configuration.md"


def value_problem(setting: str, value: Any) -> str:
    """Why a setting refuses a value, as a text about the values it takes; empty if it accepts it.

    A value that other programs use with another meaning counts as refused.
    """
    required = {"model": "m", "train_data": "t", "output_dir": "o"}
    try:
        RunSettings.model_validate(required | {setting: value})
    except ValidationError as error:
        details = [detail for detail in error.errors() if detail["loc"][:1] == (setting,)]
        return value_advice(setting, value) or _expected_values(details)
    return value_advice(setting, value, is_valid=True) or ""


def _error_line(
    key: str, details: Sequence[Mapping[str, Any]], locations: Mapping[str, str], source: str
) -> str:
    """Error line: location, key, expected value, given value. `details`: pydantic's errors."""
    if details[0]["type"] == "missing":
        return f"{source}: {key}: this setting is required and missing"
    expected = _expected_values(details)
    if not key:  # an error about a combination of keys, which its message names
        keys = [name for name in locations if re.search(rf"\b{re.escape(name)}\b", expected)]
        lines = ", ".join(dict.fromkeys(locations[name] for name in keys)) or source
        return f"{lines}: {expected}"
    value = details[0]["input"]
    if hint := value_advice(key, value):
        expected = hint
    elif value is None and not RunSettings.model_fields[key].is_required():
        expected += ", or leave it out for the default"
    elif [d["type"] for d in details] == ["list_type"] and not value_problem(key, [value]):
        expected = f"must be a list in brackets: [{value}]"
    return f"{locations.get(key, source)}: {key}: {expected}; found {_SHORT_REPR.repr(value)}"


def _expected_values(details: Sequence[Mapping[str, Any]]) -> str:
    """The different messages of pydantic's errors about one key, joined by "or"."""
    messages = dict.fromkeys(_in_plain_words(detail["msg"]) for detail in details)
    if "must be above 0" in messages:  # a number of steps or a fraction
        messages.pop("must be at least 1", None)
    first, *others = messages
    return " or ".join([first, *(message.removeprefix("must be ") for message in others)])


def _in_plain_words(message: str) -> str:
    """A message of pydantic in the words of this project."""
    for words, plain in _PLAIN_WORDS.items():
        message = message.replace(words, plain)
    return message
