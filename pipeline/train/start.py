"""Decision of a start in a run folder: new run, resume, nothing to do, or refusal. No torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline import __version__
from pipeline.config.hub import settings_of_snapshot
from pipeline.config.settings import RunSettings, settings_with
from pipeline.data.dataset.reader import DataIndex
from pipeline.data.prepare.prepare import train_key
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json
from pipeline.plan.plan import Plan
from pipeline.train.names import BEFORE_A_RUN, checkpoints_in
from pipeline.train.owner import in_use
from pipeline.train.status import is_alive, read_status

Start = Literal["new", "resume", "done"]
# Content of the folder. "no progress": a run without a checkpoint or an adapter.
Found = Literal["no run", "no progress", "unfinished", "done", "done, adapter gone"]
# Difference between the settings and data and those of the run in the folder.
Change = Literal["none", "accepted", "other"]

# The start for each case; None is a refusal. Two settings change an entry:
# `overwrite: true` turns a refusal into "new"; `resume: never` turns "resume" into "new" if the run
# is unfinished or `overwrite` is set, and otherwise into a refusal.
STARTS: Mapping[Found, Mapping[Change, Start | None]] = {
    "no run": {"none": "new", "accepted": "new", "other": "new"},
    "no progress": {"none": "new", "accepted": "new", "other": "new"},
    "unfinished": {"none": "resume", "accepted": "resume", "other": None},
    "done": {"none": "done", "accepted": "resume", "other": None},
    "done, adapter gone": {"none": "resume", "accepted": "resume", "other": None},
}

# The settings that each word of `accept_changes` covers.
_COVERED = {
    "base": settings_with("base"),
    "data": settings_with("files", "documents"),
    "total_steps": settings_with("total_steps"),
}
# Assumed for a plan.json without a version, which it contains since 0.2.0.
_FIRST_VERSION = "0.1.0"


def decide_start(folder: Path, plan: Plan, *, is_debug: bool) -> Start:
    """Decide the start from the content of the folder; changes nothing.

    Raises UserError if a result would be lost or two runs would share the folder.
    """
    settings = plan.settings
    _require_resume_exists(folder, settings)
    status = read_status(folder / "status.json")
    if status is not None and is_alive(status):
        raise UserError(in_use(folder, status))
    found = _found_in(folder, status)
    has_progress = found not in ("no run", "no progress")
    if is_debug:
        if has_progress:
            _require_debug_run(folder)
        return "new"
    differences = _differences(folder, plan, found) if has_progress else {}
    covered = frozenset[str]().union(*(_COVERED[word] for word in settings.accept_changes))
    change: Change = "none"
    if differences:
        change = "accepted" if differences.keys() <= covered else "other"
    start = _start_for(found, change, settings)
    if start is None:
        raise UserError(_refusal(folder, found, differences, covered))
    if start == "new":
        _require_new_is_possible(folder, settings)
    if start == "resume" and (found != "unfinished" or change != "none"):
        _require_checkpoint(folder, found)
    return start


def _start_for(found: Found, change: Change, settings: RunSettings) -> Start | None:
    """The entry of STARTS, changed by `overwrite` and `resume: never`."""
    start = STARTS[found][change]
    if start == "resume" and settings.resume == "never":
        start = "new" if found == "unfinished" else None
    if settings.overwrite and (start is None or (start == "done" and settings.resume == "never")):
        start = "new"
    return start


def settings_hash(plan: Plan) -> str:
    """SHA-256 of the settings that affect the result, for state.json."""
    return hashlib.sha256(dump_json(_deciding(plan)).encode()).hexdigest()


def resolved_settings(plan: Plan) -> RunSettings:
    """The settings that run.yaml records, with the planned global batch size."""
    return plan.settings.model_copy(update={"global_batch_size": plan.layout.global_batch_size})


def is_checkpoint_path(resume: str) -> bool:
    """Whether the setting `resume` is the path of a checkpoint."""
    return resume not in ("auto", "must", "never")


def written_by(folder: Path) -> str:
    """The version of RankZero that wrote a run folder."""
    try:
        return str(read_json(folder / "plan.json").get("version", _FIRST_VERSION))
    except (OSError, ValueError):
        return __version__  # lost or damaged: assume the present version


def require_own_folder(folder: Path) -> None:
    """Raise UserError if a folder has files that no run wrote and that may not precede a run."""
    _found_in(folder, read_status(folder / "status.json"))


def _found_in(folder: Path, status: Mapping[str, Any] | None) -> Found:
    is_run = status is not None or (folder / "plan.json").is_file()  # status.json may be damaged
    if not is_run:
        _require_no_foreign_files(folder)
        return "no run"
    has_adapter = (folder / "adapter").exists()
    if status is not None and status.get("state") == "done":
        return "done" if has_adapter else "done, adapter gone"
    return "unfinished" if has_adapter or _checkpoints(folder) else "no progress"


def _require_resume_exists(folder: Path, settings: RunSettings) -> None:
    if is_checkpoint_path(settings.resume) and not Path(settings.resume).is_dir():
        raise UserError(
            f"resume: {settings.resume} is not auto, must, never or the folder of a checkpoint "
            f"such as {folder / 'checkpoints/step-00000100'}"
        )


def _require_no_foreign_files(folder: Path) -> None:
    foreign = [
        path.name
        for path in folder.glob("*")
        if path.name not in BEFORE_A_RUN
        and not path.name.startswith(".")  # the owner file, or a temporary file of a killed start
    ]
    if foreign:
        raise UserError(
            f"output_dir: {folder} holds {min(foreign)} and is not a run folder; "
            "give a new or an empty one"
        )


def _require_debug_run(folder: Path) -> None:
    """Raise UserError unless --debug wrote this run: --debug replaces no other run."""
    try:
        is_debug = read_json(folder / "plan.json").get("is_debug") is True
    except (OSError, ValueError):
        is_debug = False
    if not is_debug:
        raise UserError(
            f"output_dir: --debug writes to {folder}, which holds a run that --debug of this "
            "version did not write; move it away, or give another output_dir"
        )


def _require_new_is_possible(folder: Path, settings: RunSettings) -> None:
    if settings.resume == "must":
        raise UserError(
            f"resume: must, but {folder} holds no run to resume; set resume: auto to start one"
        )
    own = (folder / "checkpoints").resolve()
    if is_checkpoint_path(settings.resume) and own in Path(settings.resume).resolve().parents:
        raise UserError(
            f"resume: {settings.resume} is of the run that a new one here would replace; give "
            "another output_dir"
        )


def _require_checkpoint(folder: Path, found: Found) -> None:
    """Raise UserError without a checkpoint: a resume at step 0 would replace the result."""
    if _checkpoints(folder):
        return
    state = "finished" if found == "done" else "without its adapter" if "done" in found else "begun"
    raise UserError(
        f"output_dir: {folder} holds a run {state} that left no checkpoint (save_strategy: no), so "
        "it cannot be resumed; give another output_dir, or set overwrite: true to train again "
        "from step 0"
    )


def _checkpoints(folder: Path) -> list[Path]:
    try:
        return checkpoints_in(folder / "checkpoints")
    except OSError as error:
        raise UserError(
            f"output_dir: {error.filename} cannot be read ({error.strerror}), so whether there is "
            "a checkpoint to resume from is not known; fix that, or give another output_dir"
        ) from None


def _refusal(
    folder: Path, found: Found, differences: Mapping[str, str], covered: frozenset[str]
) -> str:
    what = "begun" if found == "unfinished" else "finished"
    if not differences:
        return (
            f"output_dir: {folder} holds a run {what} that resume: never would replace; set "
            "resume: auto, give another output_dir, or set overwrite: true to replace it"
        )
    words = [word for word, keys in _COVERED.items() if keys & differences.keys()]
    is_coverable = all(any(key in _COVERED[word] for word in words) for key in differences)
    accept = f"resume it with accept_changes: [{', '.join(words)}], " if is_coverable else ""
    shown = [text for key, text in differences.items() if key not in covered]
    version = written_by(folder)
    other = "" if version == __version__ else f"finish it with RankZero {version}, which wrote it, "
    return (
        f"output_dir: {folder} holds a run {what} with other settings: {'; '.join(shown)}; give "
        f"another output_dir, put the old values back, {other if found == 'unfinished' else ''}"
        f"{accept}or set overwrite: true to replace it"
    )


def _differences(folder: Path, plan: Plan, found: Found) -> dict[str, str]:
    """Differences from the earlier run that affect its result: key -> `key: before -> now`."""
    try:
        before: dict[str, Any] = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {"run.yaml": "its run.yaml cannot be read"}
    if "model_revision" not in before:  # an older version: `model` is the snapshot's path
        before |= settings_of_snapshot(str(before.get("model")))
    changed = {
        key: f"{key}: {_value(before, key)} -> {value}"
        for key, value in _deciding(plan).items()
        if _value(before, key) != value
    }
    has_same = _has_same_documents(folder, plan.settings, found)
    if has_same:
        changed.pop("train_data", None)  # the same rows at another path
    if has_same is False and "train_data" not in changed:
        version = written_by(folder)
        changed["train_data"] = (
            "train_data (or the tokenizer): its content changed"
            if version == __version__
            else f"train_data: RankZero {version} prepared other documents from it"
        )
    return changed | _changed_adam(folder, plan)


def _value(before: Mapping[str, Any], key: str) -> Any:
    """A setting of the earlier run; today's default if its version did not have the setting."""
    if key in before:
        return before[key]
    return RunSettings.model_fields[key].get_default(call_default_factory=True)


def _deciding(plan: Plan) -> dict[str, Any]:
    """The settings that affect the result, as JSON values."""
    settings = plan.settings
    selects = settings.keep_best or settings.early_stopping_patience is not None
    free = settings_with("run") if selects else settings_with("run", "selection")
    values = resolved_settings(plan).dump_unexpanded()
    return {key: value for key, value in values.items() if key not in free}


def _has_same_documents(folder: Path, settings: RunSettings, found: Found) -> bool | None:
    """Whether the key of the training documents is that of the earlier run; None if unknown."""
    if found != "unfinished" and written_by(folder) != __version__:
        return None  # another version may name the same documents by another key
    key = _key_in_checkpoint(folder) if found == "unfinished" else _key_in_index(folder)
    return None if key is None else key == train_key(settings)


def _key_in_index(folder: Path) -> str | None:
    try:
        return DataIndex.load(folder / "data").train.key
    except UserError:
        return None  # data moved away; the adapter is still valid


def _key_in_checkpoint(folder: Path) -> str | None:
    """The key in the newest checkpoint; None if it is damaged, which `newest` handles."""
    try:
        state = read_json(_checkpoints(folder)[-1] / "state.json")
        return str(state["identity"]["data"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _changed_adam(folder: Path, plan: Plan) -> dict[str, str]:
    """Optimizer parameters in the user's DeepSpeed JSON that differ from the earlier run's."""
    try:
        config = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))
        before, now = config["optimizer"]["params"], plan.deepspeed["optimizer"]["params"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # lost or damaged; run.yaml has been compared
    return {
        f"deepspeed_json {key}": f"deepspeed_json: optimizer.params.{key}: {before.get(key)} -> "
        f"{now.get(key)}"
        for key in ("betas", "eps")
        if before.get(key) != now.get(key)
    }
