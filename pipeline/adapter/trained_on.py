"""The file trained_on.json of an adapter folder: the fingerprint of the adapter's base.

The file prevents a merge into the wrong base. Another fine-tune of the same model has the same
tensor names and shapes, so the merge would succeed and the merged model would be useless.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.files import dump_json, file_sha256, require_json
from pipeline.model.fingerprint import Fingerprint, require_recorded_base

TRAINED_ON = "trained_on.json"
WEIGHTS = "adapter_model.safetensors"
_MERGE_REMEDY = (
    "restore the model that was used in training, or name this one with --base to merge anyway"
)


def write_trained_on(
    folder: Path, settings: RunSettings, base: Fingerprint, started_from: Mapping[str, Any] | None
) -> None:
    """Write the record of the base: hub name and revision, or path, and its fingerprint.

    `started_from`: the record of the run's initial adapter.
    """
    record: dict[str, Any] = {
        "base": settings.model,
        "revision": settings.model_revision,
        "fingerprint": base.as_json(),
    }
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


def adapter_sha256(adapter: Path) -> str:
    """SHA-256 of an adapter's weights file, which a merge or a score records."""
    return file_sha256(adapter / WEIGHTS)
