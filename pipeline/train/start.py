"""Decision between a new run, a resume, nothing to do, and a refusal. Does not import torch.

It depends on the state of the run folder, the settings of the run in it, and the settings `resume`,
`overwrite` and `accept_changes`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline import __version__
from pipeline.adapter.trained_on import WEIGHTS
from pipeline.config.hub import settings_of_snapshot
from pipeline.config.settings import RunSettings, settings_with_change
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare.prepare import data_keys, train_key
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, read_json_or_empty
from pipeline.model.fingerprint import RECORD, require_base_of_run
from pipeline.model.tensor_files import read_header
from pipeline.plan.plan import Plan
from pipeline.train.names import BEFORE_A_RUN, checkpoints_in, require_usable_entries
from pipeline.train.owner import in_use_message
from pipeline.train.status import is_alive, read_status

Start = Literal["new", "resume", "done"]
# State of the run folder. "no progress": it has a run without a checkpoint and without an adapter.
# "checkpoints missing": an unfinished run without a checkpoint, whose status records one. A damaged
# adapter of a finished run counts as missing.
FolderState = Literal[
    "no run", "no progress", "checkpoints missing", "unfinished", "done", "done, adapter missing"
]
# Difference of the settings and data from those of the run in the folder: none, only differences
# that `accept_changes` accepts, or others.
Change = Literal["none", "accepted", "other"]

# State of the folder -> difference of the settings -> decision; None is a refusal. Two settings
# change an entry:
# - `overwrite: true` turns a refusal into "new".
# - `resume: never` turns "resume" into "new" if the run is unfinished or `overwrite` is set, and
#   otherwise into a refusal. If the checkpoints are missing, `never` and a path start a new run.
STARTS: Mapping[FolderState, Mapping[Change, Start | None]] = {
    "no run": {"none": "new", "accepted": "new", "other": "new"},
    "no progress": {"none": "new", "accepted": "new", "other": "new"},
    "checkpoints missing": {"none": None, "accepted": None, "other": None},
    "unfinished": {"none": "resume", "accepted": "resume", "other": None},
    "done": {"none": "done", "accepted": "resume", "other": None},
    "done, adapter missing": {"none": "resume", "accepted": "resume", "other": None},
}

# Word of the setting `accept_changes` -> settings whose differences it accepts.
_ACCEPTED_BY = {
    "base": settings_with_change("base"),
    "data": settings_with_change("files", "documents"),
    "total_steps": settings_with_change("total_steps"),
}
# Assumed for a plan.json without the field `version`, which RankZero has written since 0.2.0.
_FIRST_VERSION = "0.1.0"


def decide_start(folder: Path, plan: Plan, *, is_debug: bool) -> Start:
    """Decide the start from the content of the folder, without changing it.

    Raises UserError if a result would be lost or two runs would use the folder at once.
    """
    settings = plan.settings
    require_usable_entries(folder, is_written=False)
    _require_resume_exists(folder, settings)
    status = read_status(folder / "status.json")
    if status is not None and is_alive(status):
        raise UserError(in_use_message(folder, status))
    state = _state_of(folder, status)
    has_progress = state not in ("no run", "no progress")
    if is_debug:
        if has_progress:
            _require_debug_run(folder)
        return "new"
    is_compared = has_progress and state != "checkpoints missing"
    differences = _differences(folder, plan, state) if is_compared else {}
    accepted = frozenset[str]().union(*(_ACCEPTED_BY[word] for word in settings.accept_changes))
    change: Change = "none"
    if differences:
        change = "accepted" if differences.keys() <= accepted else "other"
    start = _start_for(state, change, settings)
    if start is None:
        raise UserError(_refusal_message(folder, state, differences, accepted))
    if start == "new":
        _require_new_is_possible(folder, settings)
    if start == "resume" and (state != "unfinished" or change != "none"):
        _require_checkpoint(folder, state)
    if start != "done":
        require_usable_entries(folder, is_written=True)
    return start


def _start_for(state: FolderState, change: Change, settings: RunSettings) -> Start | None:
    """The entry of STARTS, changed by `overwrite` and `resume: never`."""
    if state == "checkpoints missing" and settings.resume not in ("auto", "must"):
        return "new"
    start = STARTS[state][change]
    if start == "resume" and settings.resume == "never":
        start = "new" if state == "unfinished" else None
    is_repeated = start == "done" and settings.resume == "never"
    return "new" if settings.overwrite and (start is None or is_repeated) else start


def settings_hash(plan: Plan) -> str:
    """SHA-256 of the settings that affect the result, for state.json."""
    return hashlib.sha256(dump_json(_result_settings(plan)).encode()).hexdigest()


def resolved_settings(plan: Plan) -> RunSettings:
    """The settings for run.yaml: global_batch_size is the number that the plan computed."""
    return plan.settings.model_copy(update={"global_batch_size": plan.layout.global_batch_size})


def is_checkpoint_path(resume: str) -> bool:
    """Whether the setting `resume` is the path of a checkpoint."""
    return resume not in ("auto", "must", "never")


def written_by(folder: Path) -> str:
    """The version of RankZero that wrote a run folder."""
    plan = read_json_or_empty(folder / "plan.json")
    if not plan:
        return __version__  # plan.json is lost: assume the present version
    return str(plan.get("version", _FIRST_VERSION))


def require_own_folder(folder: Path) -> None:
    """Raise UserError unless a folder is a run folder, or has only entries allowed before a run.

    These are prepared data, logs and the file `stop` (BEFORE_A_RUN).
    """
    require_usable_entries(folder, is_written=True)
    _state_of(folder, read_status(folder / "status.json"))  # raises the error


def _state_of(folder: Path, status: Mapping[str, Any] | None) -> FolderState:
    """The state of a folder. Raises UserError if it has files and is not a run folder."""
    is_run = status is not None or (folder / "plan.json").is_file()  # status.json may be damaged
    if not is_run:
        _refuse_other_files(folder)
        return "no run"
    if status is not None and status.get("state") == "done":
        return "done" if _has_intact_adapter(folder) else "done, adapter missing"
    if _checkpoints(folder / "checkpoints", "output_dir"):
        return "unfinished"
    if status is not None and status.get("saved_step"):
        return "checkpoints missing"
    return "unfinished" if (folder / "adapter").exists() else "no progress"


def _has_intact_adapter(folder: Path) -> bool:
    """Whether the adapter's file of weights is as long as its header says."""
    try:
        read_header(folder / "adapter" / WEIGHTS)
    except UserError:
        return False
    return True


def _require_resume_exists(folder: Path, settings: RunSettings) -> None:
    if not is_checkpoint_path(settings.resume):
        return
    path = Path(settings.resume)
    if not path.is_dir():
        raise UserError(
            f"resume: {path} is neither auto, must or never, nor the folder of a checkpoint such "
            f"as {folder / 'checkpoints/step-00000100'}"
        )
    if inner := [*_checkpoints(path / "checkpoints", "resume"), *_checkpoints(path, "resume")]:
        raise UserError(f"resume: {path} holds checkpoints; give one of them, such as {inner[-1]}")


def _refuse_other_files(folder: Path) -> None:
    others = [
        path.name
        for path in folder.glob("*")
        if path.name not in BEFORE_A_RUN
        and not path.name.startswith(".")  # the owner file, or a temporary file of a killed start
    ]
    if others:
        raise UserError(
            f"output_dir: {folder} contains {min(others)} and is not a run folder; set another "
            "output_dir, whose folder is new or empty"
        )


def _require_debug_run(folder: Path) -> None:
    """Raise UserError unless `--debug` wrote this run, because it may replace no other run."""
    if read_json_or_empty(folder / "plan.json").get("is_debug") is not True:
        raise UserError(
            f"output_dir: --debug writes to {folder}, but this folder has a run that was not "
            "written by --debug of this version; move the folder, or set another output_dir"
        )


def _require_new_is_possible(folder: Path, settings: RunSettings) -> None:
    if settings.resume == "must":
        raise UserError(
            f"resume: must, but {folder} has no run to resume; set resume: auto to start a new run"
        )
    replaced = (folder / "checkpoints").resolve()
    if is_checkpoint_path(settings.resume) and replaced in Path(settings.resume).resolve().parents:
        raise UserError(
            f"resume: {settings.resume} belongs to the run that this new run would replace; set "
            "another output_dir"
        )


def _require_checkpoint(folder: Path, state: FolderState) -> None:
    """Raise UserError without a checkpoint, because a run from step 0 would replace the result."""
    if _checkpoints(folder / "checkpoints", "output_dir"):
        return
    descriptions = {
        "done": "a finished run",
        "done, adapter missing": "a finished run whose adapter is missing or damaged",
    }
    run = descriptions.get(state, "an unfinished run")
    raise UserError(
        f"output_dir: {folder} has {run} and no checkpoint "
        "(save_strategy: no), so the run cannot be resumed; set another output_dir, or set "
        "overwrite: true to train again from step 0"
    )


def _checkpoints(folder: Path, setting: Literal["output_dir", "resume"]) -> list[Path]:
    """The checkpoints in a folder `checkpoints`. Raises UserError if it cannot be read.

    `setting`: the one that names the folder or its parent, for the message.
    """
    try:
        return checkpoints_in(folder)
    except OSError as error:
        raise UserError(
            f"{setting}: {error.filename} cannot be read ({error.strerror}), but it may have a "
            f"checkpoint to resume from; make it readable, or set another {setting}"
        ) from None


def _refusal_message(
    folder: Path, state: FolderState, differences: Mapping[str, str], accepted: frozenset[str]
) -> str:
    if state == "checkpoints missing":
        return (
            f"output_dir: {folder} has an unfinished run whose status.json records a checkpoint, "
            f"but {folder / 'checkpoints'} has none; restore it, set another output_dir, or set "
            "resume: never or overwrite: true to start from step 0"
        )
    run = "an unfinished run" if state == "unfinished" else "a finished run"
    if not differences:
        return (
            f"output_dir: {folder} has {run}, which resume: never would replace; set resume: auto, "
            "set another output_dir, or set overwrite: true to replace it"
        )
    shown = [text for key, text in differences.items() if key not in accepted]
    remedies = ["set another output_dir", "restore the old values"]
    version = written_by(folder)
    if state == "unfinished" and version != __version__:
        remedies.append(f"finish it with RankZero {version}, which wrote it")
    words = [word for word, keys in _ACCEPTED_BY.items() if keys & differences.keys()]
    acceptable = frozenset[str]().union(*(_ACCEPTED_BY[word] for word in words))
    if differences.keys() <= acceptable:
        remedies.append(f"resume it with accept_changes: [{', '.join(words)}]")
    return (
        f"output_dir: {folder} has {run} with other settings: {'; '.join(shown)}; "
        f"{', '.join(remedies)}, or set overwrite: true to replace it"
    )


def _differences(folder: Path, plan: Plan, state: FolderState) -> dict[str, str]:
    """Differences from the earlier run that affect its result: setting -> text for a message.

    The text is, for example, `lr: 0.0002 -> 0.0001`.
    """
    before = _earlier_settings(folder)
    if before is None:
        return {
            "run.yaml": "its run.yaml is missing or damaged, so settings cannot be compared; "
            "restore it from a backup"
        }
    if "model_revision" not in before:  # an older version: `model` is the snapshot's path
        before |= settings_of_snapshot(str(before.get("model")))
    changed = {
        key: f"{key}: {_shown(_earlier_value(before, key))} -> {_shown(value)}"
        for key, value in _result_settings(plan).items()
        if _earlier_value(before, key) != value
    }
    has_same_documents = _has_same_documents(folder, plan.settings, state)
    if has_same_documents:
        # Only the paths differ: the key of the documents covers the content of the files.
        changed.pop("train_data", None)
        templates = {_earlier_value(before, "chat_template"), plan.settings.chat_template}
        if templates.isdisjoint({"model", "chatml"}):  # both are paths
            changed.pop("chat_template", None)
    if "eval_data" in changed and _has_same_held_out_rows(folder, plan.settings):
        del changed["eval_data"]
    if "model" in changed and _has_same_base(folder, plan.settings):
        changed = {
            key: text for key, text in changed.items() if key not in settings_with_change("base")
        }
    if has_same_documents is False and "train_data" not in changed:
        version = written_by(folder)
        changed["train_data"] = (
            "train_data (or the tokenizer): its content changed"
            if version == __version__
            else f"train_data: RankZero {version} prepared other documents from it"
        )
    return changed | _changed_adam(folder, plan)


def _earlier_settings(folder: Path) -> dict[str, Any] | None:
    """The content of run.yaml in a run folder; None if the file is missing or damaged."""
    try:
        settings = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) and settings else None


def _earlier_value(before: Mapping[str, Any], key: str) -> Any:
    """Value of a setting in an earlier run.yaml; the default if that version had no such setting.

    `before`: the content of run.yaml.
    """
    if key in before:
        return before[key]
    return RunSettings.model_fields[key].get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    """A value as in a run file: `true`, not `True`."""
    return value if isinstance(value, str) else dump_json(value, indent=None).strip()


def _result_settings(plan: Plan) -> dict[str, Any]:
    """The settings that affect the result of a run, as JSON values."""
    settings = plan.settings
    # Each setting has a trait `change`. "run": it changes only how the run is executed.
    # "selection": it also changes the result if the held-out loss selects the published step.
    selects_step = settings.keep_best or settings.early_stopping_patience is not None
    without_effect = (
        settings_with_change("run") if selects_step else settings_with_change("run", "selection")
    )
    values = resolved_settings(plan).dump_unexpanded()
    return {key: value for key, value in values.items() if key not in without_effect}


def _has_same_documents(folder: Path, settings: RunSettings, state: FolderState) -> bool | None:
    """Whether the earlier run had the same training documents; None if this is not known."""
    if state != "unfinished" and written_by(folder) != __version__:
        return None  # another version may compute another key for the same documents
    key = _key_in_checkpoint(folder) if state == "unfinished" else _key_in_index(folder)
    return None if key is None else key == train_key(settings)


def _has_same_held_out_rows(folder: Path, settings: RunSettings) -> bool:
    """Whether the earlier run measured its held-out loss on the same documents."""
    try:
        before = DataIndex.load(folder / "data").eval
    except UserError:
        return False
    return before is not None and before.key == data_keys(settings).get("eval")


def _has_same_base(folder: Path, settings: RunSettings) -> bool:
    """Whether the base at its new path has the content that the run recorded. Reads all files."""
    if not (folder / RECORD).is_file():
        return False
    try:
        require_base_of_run(folder, settings.model_folder)
    except UserError:
        return False
    return True


def _key_in_index(folder: Path) -> str | None:
    try:
        return DataIndex.load(folder / "data").train.key
    except UserError:
        return None  # the data was removed, but the adapter is still valid


def _key_in_checkpoint(folder: Path) -> str | None:
    """Key of the training documents in the newest checkpoint; None if it is missing or damaged.

    A damaged checkpoint is reported later, by `Checkpoints.newest`.
    """
    try:
        newest = _checkpoints(folder / "checkpoints", "output_dir")[-1]
        state = read_json(newest / "state.json")
        return str(state["identity"]["data"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _changed_adam(folder: Path, plan: Plan) -> dict[str, str]:
    """Differences in the optimizer parameters that only the user's DeepSpeed JSON can set."""
    try:
        config = read_json(folder / "ds_config.json")
        before, now = config["optimizer"]["params"], plan.deepspeed["optimizer"]["params"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if not isinstance(before, dict):
        return {}  # ds_config.json is lost or damaged; run.yaml has been compared already
    return {
        f"deepspeed_json {key}": f"deepspeed_json: optimizer.params.{key}: {before.get(key)} -> "
        f"{now.get(key)}"
        for key in ("betas", "eps")
        if before.get(key) != now.get(key)
    }
