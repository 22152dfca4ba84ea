"""trained_on.json of an adapter folder: the base it was trained on, by content. No torch.

Another fine-tune of the same model has the same names and shapes, and merges into nonsense.
"""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json
from pipeline.model.fingerprint import Fingerprint, require_recorded_base

TRAINED_ON = "trained_on.json"
WEIGHTS = "adapter_model.safetensors"
_REMEDY = "bring that model back, or give this one with --base to merge it deliberately"


def write_trained_on(folder: Path, settings: RunSettings, base: Fingerprint) -> None:
    """Record the base: hub name and revision, or the path that the run file has, and its hashes."""
    record: dict[str, Any] = {
        "base": settings.model,
        "revision": settings.model_revision,
        "fingerprint": base.as_json(),
    }
    (folder / TRAINED_ON).write_text(dump_json(record), encoding="utf-8")


def require_same_base(base: Path, adapter: Path) -> None:
    """Raise UserError, naming tensors, unless the adapter was trained on this very base.

    Adapters of other tools have no record; any base is accepted for them.
    """
    path = adapter / TRAINED_ON
    if not path.is_file():
        return
    try:
        recorded = read_json(path).get("fingerprint")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a JSON object: {error}") from None
    require_recorded_base(recorded, base, _REMEDY)


def adapter_sha256(adapter: Path) -> str:
    """SHA-256 of an adapter's weights file: what a merge or a score was made from."""
    with (adapter / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
