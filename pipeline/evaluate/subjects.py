"""Models to score: base, adapter and merged model of a run, or a model folder. No torch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter_file import require_adapter
from pipeline.adapter.products import is_merged_from
from pipeline.adapter.trained_on import adapter_sha256, require_same_base
from pipeline.config.hub import snapshot_folder
from pipeline.config.load import load_settings, settings_without_file
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import require_json
from pipeline.model.fingerprint import base_fingerprint
from pipeline.plan.given.shape import read_shape

logger = logging.getLogger(__name__)

# Settings of a run that also hold for a model beside it: how rows are read, and the dtype.
_SHARED_KEYS = (
    "data_format", "columns", "max_length", "over_length", "train_on", "split_turns",
    "special_tokens_in_text", "bf16", "fp16",
)  # fmt: skip
_LOADING_KEYS = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "use_flash_attention", "bf16", "fp16",
)  # fmt: skip
_PLACES = ("base_model_name_or_path", "revision")  # keys of adapter_config.json: where the base is
_PACKAGES = ("torch", "transformers", "peft", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to score, under its name in the table.

    `settings`: of its tokenizer, chat template and loading. `adapter`: the folder of the adapter
    that is loaded with the model; `is_adapter_used`: False for the base of a run. `is_merged`: the
    model is loaded unquantised, in the training dtype of the run.
    """

    name: str
    settings: RunSettings
    folder: Path
    adapter: Path | None = None
    is_adapter_used: bool = False
    is_merged: bool = False

    def identity(self) -> dict[str, Any]:
        """Everything on which the model's outputs depend, as JSON values."""
        used = self.adapter if self.is_adapter_used else None
        loading = {key: getattr(self.settings, key) for key in _LOADING_KEYS}
        return {
            "model": base_fingerprint(self.folder).digest,
            "adapter": None if used is None else [adapter_sha256(used), _adapter_config(used)],
            "is_merged": self.is_merged,
            "loading": loading,
            "versions": {name: version(name) for name in _PACKAGES},
        }


def _adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration without the place of its base. UserError if it is damaged."""
    config = require_json(folder / "adapter_config.json")
    return {key: value for key, value in config.items() if key not in _PLACES}


def subjects_of(
    arguments: Sequence[str], overrides: Sequence[str], data: str | None
) -> list[Subject]:
    """The models that the arguments name: run folders, model folders, cached hub models.

    If there are several arguments, the name of a model begins with its argument. Raises UserError
    if an argument names none of these, if a run has no adapter, or if its adapter was trained on
    another base.
    """
    subjects: list[Subject] = []
    for argument in dict.fromkeys(arguments):
        prefix = f"{argument} " if len({*arguments}) > 1 else ""
        folder = _folder_of(argument)
        if (folder / "run.yaml").is_file():
            subjects += _subjects_of_run(
                folder, prefix, load_settings(folder / "run.yaml", overrides)
            )
        else:
            first_run = next((each.settings for each in subjects), None)
            settings = _model_settings(folder, overrides, data, first_run)
            subjects.append(Subject(name=argument, settings=settings, folder=folder))
    return subjects


def _folder_of(argument: str) -> Path:
    """The folder of a run or model. Raises UserError if there is none."""
    path = Path(argument).expanduser()
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or with a NUL
        is_folder = False
    folder = path if is_folder else snapshot_folder(argument)
    if folder is None:
        raise UserError(
            f"{argument}: neither a folder nor a hub model in the local cache; give the output_dir "
            "of a run, or a model"
        )
    if (folder / "run.yaml").is_file() or (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{argument}: is an adapter without its run; give the output_dir of the run, or a "
            "model that it was merged into"
        )
    raise UserError(
        f"{argument}: has neither run.yaml nor config.json; give the output_dir of a run, or a "
        "model"
    )


def _subjects_of_run(folder: Path, prefix: str, settings: RunSettings) -> list[Subject]:
    adapter, base = folder / "adapter", settings.model_folder
    require_adapter(folder)
    require_same_base(base, adapter, "restore the model of the training")
    subjects = [
        Subject(
            name=f"{prefix}{name}", settings=settings, folder=base, adapter=adapter,
            is_adapter_used=name == "adapter",
        )
        for name in ("base", "adapter")
    ]  # fmt: skip
    merged = folder / "merged"
    if merged.is_dir() and _is_scorable(folder):
        name = f"{prefix}merged"
        subjects.append(Subject(name=name, settings=settings, folder=merged, is_merged=True))
    return subjects


def _is_scorable(run_folder: Path) -> bool:
    """Whether to score the merged model. Logs a warning unless it has the run's adapter."""
    is_same = is_merged_from(run_folder)
    if is_same is None:
        logger.warning(
            "%s: the adapter that was merged is unknown, because an earlier version of RankZero "
            "did not record it; the merged model is scored",
            run_folder / "merged",
        )
    elif not is_same:
        logger.warning(
            "%s: not scored, because it was merged from an adapter other than %s; merge again",
            run_folder / "merged",
            run_folder / "adapter",
        )
    return is_same is not False


def _model_settings(
    folder: Path, overrides: Sequence[str], data: str | None, beside: RunSettings | None
) -> RunSettings:
    """Settings to score a model folder. `beside`: the settings of the run whose rows are used."""
    values: dict[str, Any] = {"model": str(folder), "train_data": data or "-", "output_dir": "-"}
    if beside is not None:
        values |= {key: getattr(beside, key) for key in _SHARED_KEYS}
    settings = settings_without_file(values, overrides)
    limit = read_shape(str(folder), trust_remote_code=settings.trust_remote_code).max_positions
    if limit is not None and limit < settings.max_length:
        settings = settings.model_copy(update={"max_length": limit})
    return settings
