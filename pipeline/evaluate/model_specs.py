"""ModelSpec: a model to score, which may be base, adapter or merged model of a run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter_file import (
    Adapter,
    read_adapter,
    require_adapter,
    require_size_of_base,
)
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

# A model outside a run, if it is scored on the rows of a run, gets these settings of that run: how
# the rows are read, and the dtype.
_SHARED_SETTINGS = (
    "data_format", "columns", "max_length", "over_length", "train_on", "split_turns",
    "special_tokens_in_text", "bf16", "fp16",
)  # fmt: skip
# Settings on which the loaded weights and the outputs depend.
_LOADING_SETTINGS = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "use_flash_attention", "bf16", "fp16",
)  # fmt: skip
_BASE_LOCATION_KEYS = ("base_model_name_or_path", "revision")  # of adapter_config.json
_PACKAGES = ("torch", "transformers", "peft", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model to score: where its weights are, and how they are loaded.

    `name`: its name in the table of scores. `settings`: settings of its tokenizer, chat template
    and loading. `folder`: folder of the model. `adapter`: folder of the adapter that is loaded with
    the model. `is_adapter_used`: whether the adapter is active; false for the base of a run.
    `is_merged`: whether this is a merged model, which is loaded unquantised in the training dtype.
    """

    name: str
    settings: RunSettings
    folder: Path
    adapter: Path | None = None
    is_adapter_used: bool = False
    is_merged: bool = False

    def identity(self) -> dict[str, Any]:
        """Everything on which the model's outputs depend, as JSON data."""
        adapter = None
        if self.is_adapter_used and self.adapter is not None:
            adapter = [adapter_sha256(self.adapter), _adapter_config(self.adapter)]
        return {
            "model": base_fingerprint(self.folder).digest,
            "adapter": adapter,
            "is_merged": self.is_merged,
            "loading": {key: getattr(self.settings, key) for key in _LOADING_SETTINGS},
            "versions": {name: version(name) for name in _PACKAGES},
        }


def _adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration without the location of its base.

    Raises UserError if the file is damaged.
    """
    config = require_json(folder / "adapter_config.json")
    return {key: value for key, value in config.items() if key not in _BASE_LOCATION_KEYS}


def model_specs(
    arguments: Sequence[str],
    overrides: Sequence[str],
    data: str | None,
    *,
    with_merged: bool = True,
) -> list[ModelSpec]:
    """The models that the arguments name: run folders, model folders, cached hub models.

    A run folder gives its base, its adapter and, with `with_merged`, its merged model if there is
    one. If there are several arguments, the name of a model begins with its argument. `overrides`:
    `key=value` settings. `data`: the file of --data. Raises UserError if an argument names neither
    a run nor a model, if a run has no adapter, or if its adapter was trained on another base.
    """
    specs: list[ModelSpec] = []
    for argument in dict.fromkeys(arguments):
        prefix = f"{argument} " if len({*arguments}) > 1 else ""
        folder = _run_or_model_folder(argument)
        if (folder / "run.yaml").is_file():
            settings = load_settings(folder / "run.yaml", overrides)
            specs += _specs_of_run(folder, prefix, settings, with_merged=with_merged)
        else:
            first_settings = specs[0].settings if specs else None
            settings = _model_settings(folder, overrides, data, first_settings)
            specs.append(ModelSpec(name=argument, settings=settings, folder=folder))
    return specs


def _run_or_model_folder(argument: str) -> Path:
    """The folder of a run or model. Raises UserError if the argument names neither."""
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


def _specs_of_run(
    folder: Path, prefix: str, settings: RunSettings, *, with_merged: bool
) -> list[ModelSpec]:
    """Base, adapter and merged model of a run; their names begin with `prefix`."""
    adapter, base = folder / "adapter", settings.model_folder
    require_adapter(folder)
    require_same_base(base, adapter, "restore the model that was used in training")
    _require_sizes_of_base(read_adapter(adapter), settings)
    specs = [
        ModelSpec(
            name=f"{prefix}{name}", settings=settings, folder=base, adapter=adapter,
            is_adapter_used=name == "adapter",
        )
        for name in ("base", "adapter")
    ]  # fmt: skip
    merged = folder / "merged"
    if with_merged and merged.is_dir() and _has_scorable_merged_model(folder):
        name = f"{prefix}merged"
        specs.append(ModelSpec(name=name, settings=settings, folder=merged, is_merged=True))
    return specs


def _require_sizes_of_base(adapter: Adapter, settings: RunSettings) -> None:
    """Raise UserError if a LoRA layer has another size than the linear layer of the base."""
    shape = read_shape(str(settings.model_folder), trust_remote_code=settings.trust_remote_code)
    for name, linear in shape.linears.items():
        update = adapter.layer_updates.get(f"{name}.weight")
        if update is not None:
            location = f"{adapter.folder}: {name}"
            require_size_of_base(location, update, linear.d_out, linear.d_in, settings.model)


def _has_scorable_merged_model(run_folder: Path) -> bool:
    """Whether to score the merged model. Logs a warning unless it contains the run's adapter."""
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
    folder: Path, overrides: Sequence[str], data: str | None, run_settings: RunSettings | None
) -> RunSettings:
    """Settings to score a model folder. `run_settings`: those of the run whose rows are used."""
    # train_data and output_dir are required settings that scoring does not use.
    values: dict[str, Any] = {"model": str(folder), "train_data": data or "-", "output_dir": "-"}
    if run_settings is not None:
        values |= {key: getattr(run_settings, key) for key in _SHARED_SETTINGS}
    settings = settings_without_file(values, overrides)
    shape = read_shape(str(folder), trust_remote_code=settings.trust_remote_code)
    if shape.max_positions is not None and shape.max_positions < settings.max_length:
        settings = settings.model_copy(update={"max_length": shape.max_positions})
    return settings
