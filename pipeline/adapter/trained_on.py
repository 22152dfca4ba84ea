"""The file trained_on.json of an adapter folder: the fingerprint of the adapter's base.

The file prevents a merge into the wrong base. Another fine-tune of the same model has the same
tensor names and shapes, so the merge would succeed and the merged model would be useless.
For an adapter that corrects a 4-bit base (LoftQ), the file also has the options of the
quantisation, because the adapter is wrong on the 16-bit base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import dump_json, file_sha256, read_json_or_empty, require_json
from pipeline.model.fingerprint import Fingerprint, require_recorded_base

TRAINED_ON = "trained_on.json"
WEIGHTS = "adapter_model.safetensors"
QUANTISED = "corrects_quantised_base"
_QUANTISATION = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_MERGE_REMEDY = (
    "restore the model that was used in training, or name this one with --base to merge anyway"
)


def write_trained_on(
    folder: Path, settings: RunSettings, base: Fingerprint, started_from: Mapping[str, Any] | None
) -> None:
    """Write the record of the base: hub name and revision, or path, and its fingerprint.

    `started_from`: the record of the run's initial adapter, from which the run inherits a
    correction of the 4-bit base.
    """
    record: dict[str, Any] = {
        "base": settings.model,
        "revision": settings.model_revision,
        "fingerprint": base.as_json(),
    }
    if (quantised := corrected_base(settings, started_from)) is not None:
        record[QUANTISED] = quantised
    if started_from is not None:
        record["started_from"] = started_from
    (folder / TRAINED_ON).write_text(dump_json(record), encoding="utf-8")


def require_same_base(base: Path, adapter: Path, remedy: str = _MERGE_REMEDY) -> None:
    """Raise UserError, naming tensors that differ, if the adapter was trained on another base.

    Adapters written by other programs have no trained_on.json; for them any base is accepted.
    `remedy`: end of the message.
    """
    path = adapter / TRAINED_ON
    if not path.is_file():
        return
    require_recorded_base(require_json(path).get("fingerprint"), base, remedy)


def corrected_base(
    settings: RunSettings, started_from: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Options of the 4-bit base that a run's adapter corrects (LoftQ); None if it corrects none."""
    if settings.corrects_quantisation:
        return {name: getattr(settings, name) for name in _QUANTISATION}
    inherited = (started_from or {}).get(QUANTISED)
    return inherited if isinstance(inherited, dict) else None


def require_corrected_base(adapter: Path, settings: RunSettings | None, remedy: str) -> None:
    """Raise UserError if the adapter corrects a 4-bit base other than that of the settings.

    `settings`: None for a base in 16 bits. `remedy` ends the message.
    """
    quantised = read_json_or_empty(adapter / TRAINED_ON).get(QUANTISED)
    if not isinstance(quantised, dict):
        return
    present = None
    if settings is not None:
        present = {name: getattr(settings, name) for name in _QUANTISATION}
    if present != quantised:
        options = ", ".join(f"{name}: {str(value).lower()}" for name, value in quantised.items())
        raise UserError(
            f"{adapter} was initialised with LoftQ, so it also corrects the errors of its 4-bit "
            f"base ({options}), and is wrong on a base without these errors; {remedy}"
        )


def corrects_quantisation(adapter: Path) -> bool:
    """Whether an adapter corrects a 4-bit base, according to its record."""
    return isinstance(read_json_or_empty(adapter / TRAINED_ON).get(QUANTISED), dict)


def adapter_sha256(adapter: Path) -> str:
    """SHA-256 of an adapter's weights file, recorded in merged models and in score.json."""
    return file_sha256(adapter / WEIGHTS)
