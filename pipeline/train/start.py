"""What starting in a folder means: a new run, going on, nothing left to do, or a refusal."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config.hub import hub_model_of
from pipeline.config.load import dump_settings
from pipeline.config.settings import RunSettings, settings_with
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare.prepare import train_key
from pipeline.errors import RankZeroError, UserError
from pipeline.files import dump_json, write_text
from pipeline.plan.plan import Plan
from pipeline.plan.render import plan_json
from pipeline.train.owner import in_use
from pipeline.train.status import is_alive, read_status

Start = Literal["new", "resume", "done"]

# All that a run may leave; nothing else is ever removed from a folder.
_FILES = (  # the last two make it a run's folder
    "run.yaml", "ds_config.json", "metrics.jsonl", "score.json", "report.html", "base.json",
    "plan.json", "status.json",
)  # fmt: skip
_FOLDERS = ("data", "checkpoints", "adapter", "merged")
# What may be there before a run is: prepared data, Slurm's logs, a person's wish to stop it.
_BEFORE_A_RUN = ("data", "logs", "stop")

# Words of `accept_changes` -> the settings that each covers. What these come to is compared too:
# the checkpoint's state has the base's fingerprint and the data's key.
_COVERED = {
    "base": settings_with("base"),
    "data": settings_with("files", "documents"),
    "total_steps": settings_with("total_steps"),
}


def open_run(folder: Path, plan: Plan, found: Start) -> None:
    """Make the folder ready for what `look` found: `new` leaves run.yaml, plans and prepared data.

    Called on rank 0.
    """
    try:
        if found == "new":
            clear_run(folder)
        if found != "done":
            write_run(folder, plan)
    except OSError as error:
        raise RankZeroError(
            f"output_dir: {folder}: {error.strerror} ({error.filename}); mend that and start again"
        ) from None


def write_run(folder: Path, plan: Plan) -> None:
    """What makes a folder a run's: run.yaml and the plans."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.yaml", dump_settings(_resolved(plan)))
    write_plan(folder, plan)


def write_plan(folder: Path, plan: Plan) -> None:
    """plan.json and ds_config.json."""
    found = plan_json(plan) | {"steps": _steps(plan), "job": os.environ.get("SLURM_JOB_ID")}
    write_text(folder / "plan.json", dump_json(found))
    write_text(folder / "ds_config.json", dump_json(plan.deepspeed))


def _steps(plan: Plan) -> dict[str, int] | None:
    return None if plan.schedule is None else dict(vars(plan.schedule))


def clear_run(folder: Path) -> None:
    """Remove what a run left in a folder, and nothing else.

    Prepared data stays: it is named by its content, and prepare removes what is out of date.
    Killed in between, it is a run's folder still, and no longer one of a run that is done.
    """
    if (status := read_status(folder / "status.json")) is not None:
        said = {"state": "failed", "reason": "ended while this run was removed for a new one"}
        write_text(folder / "status.json", dump_json(status | said))
    for name in set(_FOLDERS) - {"data"}:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def as_requeued(settings: RunSettings, env: Mapping[str, str]) -> RunSettings:
    """The settings of a job that comes back: what it has begun anew itself, it goes on with."""
    if settings.resume != "never" or env.get("SLURM_RESTART_COUNT", "0") == "0":
        return settings
    try:
        plan = json.loads((Path(settings.output_dir) / "plan.json").read_text(encoding="utf-8"))
        is_its_own = plan["job"] == env.get("SLURM_JOB_ID")
    except (OSError, ValueError, KeyError, TypeError):
        return settings
    return settings.model_copy(update={"resume": "auto"}) if is_its_own else settings


def look(folder: Path, plan: Plan, *, is_debug: bool) -> Start:
    """What a start here would be; changes nothing.

    Raises UserError where something would be lost or two runs would share the folder.
    """
    settings = plan.settings
    _require_resumable(folder, settings)
    status = read_status(folder / "status.json")
    if status is None and (folder / "plan.json").is_file():
        status = {}  # lost or damaged, as by a power cut; the run is there all the same
    if status is None:
        _require_empty(folder)
        return _without_a_start(folder, settings.resume)
    if is_alive(status):
        raise UserError(in_use(folder, status))
    if is_debug:
        return "new"
    is_done = status.get("state") == "done"
    if not is_done and not _has_progress(folder):
        return _without_a_start(folder, settings.resume)
    covered = {key for word in settings.accept_changes for key in _COVERED[word]}
    found = _differences(folder / "run.yaml", plan)
    differences = [text for key, text in found.items() if key not in covered]
    differences += _changed_adam(folder, plan)
    if is_done and "data" not in settings.accept_changes:
        differences += _changed_inputs(folder, settings)
    if differences and not settings.overwrite:
        what = "finished" if is_done else "begun"
        raise UserError(
            f"output_dir: {folder} holds a run {what} with other settings: "
            f"{'; '.join(differences)}; give another output_dir, put the old values back, "
            f"{_accepting(found)}or set overwrite: true to replace it"
        )
    is_anew = settings.resume == "never" and (settings.overwrite or not is_done)
    if differences or is_anew:
        if (folder / "checkpoints").resolve() in Path(settings.resume).resolve().parents:
            raise UserError(
                f"resume: {settings.resume} is of the run that a new one here would replace; give "
                "another output_dir"
            )
        return "new"
    return "done" if is_done and not found else "resume"


def _require_resumable(folder: Path, settings: RunSettings) -> None:
    if settings.resume not in ("auto", "must", "never") and not Path(settings.resume).is_dir():
        raise UserError(
            f"resume: {settings.resume} is not auto, must, never or the folder of a checkpoint "
            f"such as {folder / 'checkpoints/step-00000100'}"
        )


def _accepting(differences: Mapping[str, str]) -> str:
    """The remedy that the run file may name, where it covers what differs."""
    words = [word for word, keys in _COVERED.items() if keys & differences.keys()]
    is_covered = all(any(key in _COVERED[word] for word in words) for key in differences)
    return f"go on with accept_changes: [{', '.join(words)}], " if words and is_covered else ""


def _has_progress(folder: Path) -> bool:
    """Whether there is anything that going on could use or starting anew would lose."""
    try:
        return (folder / "adapter").exists() or any((folder / "checkpoints").iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"output_dir: {error.filename} cannot be read ({error.strerror}), so whether there is "
            "a checkpoint to go on from is not known; mend that, or give another output_dir"
        ) from None


def _changed_inputs(folder: Path, settings: RunSettings) -> list[str]:
    """Files that have other content than when the finished run used them."""
    try:
        is_same_data = DataIndex.load(folder / "data").train.key == train_key(settings)
    except UserError:
        return []  # moved away since: the adapter is what it was
    return [] if is_same_data else ["train_data (or the tokenizer): its content changed"]


def _require_empty(folder: Path) -> None:
    strangers = [
        path.name
        for path in folder.glob("*")
        if path.name not in _BEFORE_A_RUN
        and not path.name.startswith(".")  # the owner's, or a kill's
    ]
    if strangers:
        raise UserError(
            f"output_dir: {folder} holds {min(strangers)} and is not a run folder; "
            "give a new or an empty one"
        )


def _without_a_start(folder: Path, resume: str) -> Start:
    if resume == "must":
        raise UserError(f"resume: must, but {folder} holds no run; set resume: auto to start one")
    return "new"


def _differences(run_yaml: Path, plan: Plan) -> dict[str, str]:
    """`key: then -> now` by key, for each that changes what comes out."""
    try:
        then: dict[str, Any] = yaml.safe_load(run_yaml.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {"": "its run.yaml cannot be read"}
    if "model_revision" not in then:  # written when a hub name was still replaced by its snapshot
        then |= hub_model_of(str(then.get("model")))
    return {
        key: f"{key}: {then.get(key)} -> {value}"
        for key, value in _deciding(plan).items()
        if then.get(key) != value
    }


def settings_hash(plan: Plan) -> str:
    """SHA-256 of the settings that change what comes out, for state.json."""
    return hashlib.sha256(dump_json(_deciding(plan)).encode()).hexdigest()


def _deciding(plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    is_chosen = settings.keep_best or settings.early_stopping_patience is not None
    free = settings_with("run") if is_chosen else settings_with("run", "selection")
    values = _resolved(plan).as_written()
    return {key: value for key, value in values.items() if key not in free}


def _changed_adam(folder: Path, plan: Plan) -> list[str]:
    """What a user's DeepSpeed JSON changed of the optimizer and no setting shows."""
    try:
        then = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))
        before, now = then["optimizer"]["params"], plan.deepspeed["optimizer"]["params"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # run.yaml has been compared
    return [
        f"deepspeed_json: optimizer.params.{key}: {before.get(key)} -> {now.get(key)}"
        for key in ("betas", "eps")
        if before.get(key) != now.get(key)
    ]


def _resolved(plan: Plan) -> Any:
    return plan.settings.model_copy(update={"global_batch_size": plan.layout.global_batch_size})
