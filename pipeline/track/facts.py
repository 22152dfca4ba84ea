"""RunFacts: name and configuration of a run for a tracker, without secrets and full paths."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import load_settings
from pipeline.config.settings import RunSettings, path_settings
from pipeline.files import read_json

# Settings with the user's free text, which is not sent.
_FREE_TEXT = ("chat_template_kwargs", "columns", "tracker_project", "run_name", "run_group")
# Access tokens of Hugging Face, OpenAI, GitHub, Slack and AWS, JSON web tokens, keys of 40
# hexadecimal digits (such as those of W&B), and user names with passwords in URLs.
_SECRETS = re.compile(
    r"hf_\w{20,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w+|xox[abp]-[\w-]+|AKIA\w{12,}"
    r"|eyJ[\w-]+\.[\w-]+\.[\w-]+|\b[0-9a-f]{40}\b|(?<=://)[^/@\s]+@"
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Name, group, project and configuration of a run in a tracker.

    `folder`: the run folder. `uploads`: the files to send: "adapter", "answers", both or none.
    `config`: the settings, and the plan's values under names such as `plan.zero_stage`.
    """

    folder: Path
    project: str
    name: str
    group: str | None
    uploads: frozenset[str]
    config: dict[str, str | float | bool]

    @classmethod
    def load(cls, folder: Path) -> "RunFacts":
        """Read run.yaml and plan.json. Raises UserError or OSError if they cannot be read."""
        settings = load_settings(folder / "run.yaml")
        return cls(
            folder=folder,
            project=settings.tracker_project,
            name=settings.run_name or folder.resolve().name,
            group=settings.run_group,
            uploads=frozenset(settings.tracker_uploads),
            config=_config(settings, read_json(folder / "plan.json")),
        )

    @property
    def local_folder(self) -> Path:
        """Folder of the files that trackers keep on this machine."""
        return self.folder / "tracking"


def _config(settings: RunSettings, plan: dict[str, Any]) -> dict[str, str | float | bool]:
    """The settings and the plan's choices as flat values."""
    paths = path_settings()
    values: dict[str, Any] = {}
    for name, value in settings.model_dump(mode="json").items():
        if name not in _FREE_TEXT and value not in (None, []):
            values[name] = _remove_folders(value) if name in paths else value
    for section in ("choice", "model", "hardware"):
        values |= {f"plan.{name}": value for name, value in plan[section].items()}
    values["plan.peak_bytes"] = plan["memory"]["peak_bytes"]
    values["plan.seconds_per_step"] = plan["speed"]["seconds_per_step"]
    for name in ("plan.why", "plan.folder", "plan.source"):  # sentences and a path
        values.pop(name, None)
    return {name: _redact(value) for name, value in values.items() if value is not None}


def _redact(value: Any) -> str | float | bool:
    """A number unchanged, or another value as text in which secrets are replaced by `***`."""
    return value if isinstance(value, bool | int | float) else _SECRETS.sub("***", str(value))


def _remove_folders(value: Any) -> Any:
    """The value of a setting with only the last part of each path; hub names (org/name) stay."""
    if isinstance(value, list):
        return [_remove_folders(item) for item in value]
    if isinstance(value, dict):
        return value | {"path": _remove_folders(value["path"])}
    # A hub name has one slash; a path has several, or begins with a slash, a dot, ~ or a variable.
    is_path = isinstance(value, str) and (value.count("/") > 1 or value[:1] in "/.~$")
    return value.rstrip("/").rpartition("/")[2] if is_path else value
