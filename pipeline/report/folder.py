"""Reader of a run folder. The folder may be incomplete, because the run failed or is running.

A missing or unreadable file becomes an entry of `problems`, never an exception.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.train.owner import is_running

Record = Mapping[str, Any]
# Steps and values of a curve: two lists of equal length.
Points = tuple[list[float], list[float]]
_MAX_REJECT_LINES = 100  # more than the report shows, because damaged lines are left out
_LOSSES = {"loss", "eval_loss"}


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Contents of a run folder. The contents of a missing file are empty.

    `steps`, `evals`: records of metrics.jsonl, sorted by step. `base`: base.json, with the hash of
    the base model. `versions`: versions of the packages, from the newest checkpoint that has them.
    `rejects`: first lines of data/rejects.jsonl. `problems`: name of a file -> why it is missing or
    cannot be read. `measured_cache`: results of `measured`.
    """

    folder: Path
    name: str
    settings: Record
    status: Record
    plan: Record
    score: Record
    base: Record
    versions: Record
    audit: Record
    rejects: list[str]
    steps: list[Record]
    evals: list[Record]
    problems: Mapping[str, str]
    measured_cache: dict[str, Points] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The state of the run; see `state_of`."""
        return state_of(self.status)

    @property
    def model_folder(self) -> str:
        """Path of the base model; empty if it is unknown."""
        planned = dict_or_empty(self.plan.get("model")).get("folder")
        return str(planned or self.settings.get("model") or "")

    def measured(self, key: str) -> Points:
        """The steps whose record has a number under `key`, and these numbers."""
        if key not in self.measured_cache:
            self.measured_cache[key] = _points(self.steps, key)
        return self.measured_cache[key]

    def held_out(self) -> Points:
        """The steps of the evaluations, and the held-out losses."""
        return self.evaluated("eval_loss")

    def evaluated(self, key: str) -> Points:
        """The steps of the evaluations with a number under `key`, and these numbers."""
        return _points(self.evals, key)


def is_run_folder(folder: Path) -> bool:
    """Whether a folder has the files that a run writes first."""
    return any((folder / name).is_file() for name in ("status.json", "metrics.jsonl"))


def read_run_folder(folder: Path) -> RunRecords:
    """Read a run folder. Raises UserError if the folder is not one."""
    if not is_run_folder(folder):
        raise UserError(
            f"{folder}: not a run folder, because it has neither status.json nor metrics.jsonl; "
            "give the output_dir of a run"
        )
    problems: dict[str, str] = {}
    steps, evals = _read_metrics(folder, problems)
    return RunRecords(
        folder=folder,
        name=folder.resolve().name,
        settings=_read_mapping(folder, "run.yaml", problems),
        status=_read_mapping(folder, "status.json", problems),
        plan=_read_mapping(folder, "plan.json", problems),
        score=_read_mapping(folder, "score.json", problems),
        base=_read_mapping(folder, "base.json", {}),
        versions=_package_versions(folder),
        audit=_read_mapping(folder, "data/audit.json", problems),
        rejects=_first_lines(folder / "data/rejects.jsonl"),
        steps=steps,
        evals=evals,
        problems=problems,
    )


def read_state(folder: Path) -> str:
    """The present state of a run; see `state_of`."""
    return state_of(_read_mapping(folder, "status.json", {}))


def state_of(status: Record) -> str:
    """The state in status.json; `dead` if it says running, but the process has ended."""
    state = str(status.get("state") or "")
    # Without the id of the machine, it is not known whether the process is still alive.
    if state != "running" or "machine" not in status:
        return state
    try:
        return state if is_running(dict(status)) else "dead"
    except (TypeError, ValueError):  # of a damaged file
        return state


def float_or_none(value: Any) -> float | None:
    """The value as float if it is a number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def dict_or_empty(value: Any) -> Record:
    """The value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, dict) else {}


def _read_mapping(folder: Path, file: str, problems: dict[str, str]) -> Record:
    """Read a JSON or YAML file; a problem with the file is added to `problems`."""
    try:
        text = (folder / file).read_text(encoding="utf-8")
        content = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
    except FileNotFoundError:
        problems[file] = f"{file} is not in the run folder."
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems[file] = f"{file} cannot be read: {error}"
        return {}
    if not isinstance(content, dict):
        problems[file] = f"{file} cannot be read: it is not a mapping."
        return {}
    return content


def _package_versions(folder: Path) -> Record:
    """The versions that the newest readable checkpoint records; empty if there is none."""
    for path in sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True):
        state = _read_mapping(path.parent, path.name, {})
        if versions := dict_or_empty(state.get("versions")):
            return versions
    return {}


def _first_lines(path: Path) -> list[str]:
    """The first lines of a file that may be long; none if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return list(islice(lines, _MAX_REJECT_LINES))
    except OSError:
        return []


def _read_metrics(folder: Path, problems: dict[str, str]) -> tuple[list[Record], list[Record]]:
    """Records of the steps and of the evaluations in metrics.jsonl, without obsolete ones."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        problem = "is not in the run folder." if is_missing else f"cannot be read: {error}"
        problems["metrics.jsonl"] = f"metrics.jsonl {problem}"
        return [], []
    steps: dict[float, Record] = {}
    evals: dict[float, Record] = {}
    last_step = -1.0
    for step, record in _records(text):
        if "eval_loss" in record:
            evals[step] = record
            continue
        if step <= last_step:  # the run resumed from an earlier step: later records are obsolete
            for records in (steps, evals):
                for obsolete in [other for other in records if other > step]:
                    del records[obsolete]
        steps[step] = record
        last_step = step
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)]


def _records(text: str) -> Iterator[tuple[float, Record]]:
    """Step and record of each complete line; a killed process may leave an incomplete one."""
    lines = text.splitlines()
    for value in _json_values(lines):
        if isinstance(value, dict) and (step := float_or_none(value.get("step"))) is not None:
            for key in _LOSSES & value.keys():
                if value[key] is None:  # a loss that was not finite
                    value[key] = math.nan
            yield step, value


def _json_values(lines: list[str]) -> Iterator[Any]:
    """The JSON value of each line; damaged lines are left out."""
    try:
        values = json.loads(f"[{','.join(lines)}]")  # 40 % faster than line by line
        if len(values) == len(lines):
            yield from values
            return
    except (ValueError, RecursionError):
        pass
    for line in lines:
        with suppress(ValueError, RecursionError):
            yield json.loads(line)


def _points(records: list[Record], key: str) -> Points:
    # `type`, not `isinstance`: a bool is not a number here.
    chosen = [record for record in records if type(record.get(key)) in (int, float)]
    return [record["step"] for record in chosen], [record[key] for record in chosen]
