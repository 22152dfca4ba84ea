"""Model shape counted on the model's class, for a `model_type` that families.py does not have.

A subprocess builds the model on the meta device (model/class_shape.py), which takes seconds and
reads no weights. The shape is cached, so that later plans need no torch.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, write_text
from pipeline.plan.given.torch_process import cache_file, package_version, run_module

_PACKAGES = ("torch", "transformers", "peft")  # their versions determine the shape of a class
_FORMAT = "3"  # of the cached file
_TIMEOUT_S = 300


def class_shape(folder: Path) -> dict[str, Any]:
    """Shape of the model in a folder, from the cache if possible.

    Raises UserError if the class cannot be built.
    """
    path = shape_file(folder)
    try:
        return read_json(path)
    except (OSError, ValueError):
        pass
    if package_version("torch") is None:
        raise UserError(
            "this model_type is not in the table of known families, and without torch its class "
            f"cannot be counted here; run `python -m pipeline.model.class_shape {folder}` on a "
            "machine that has the same versions of torch, transformers and peft, and write its "
            f"output to {path}"
        )
    counted = _count(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_json(counted))
    except OSError:
        pass  # without a cache the next plan counts the class again
    return counted


def shape_file(folder: Path) -> Path:
    """Cache file of the shape; its key is config.json and the versions of the packages."""
    config = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    return cache_file("shapes", [_FORMAT, config], _PACKAGES)


def _count(folder: Path) -> dict[str, Any]:
    try:
        output = run_module("pipeline.model.class_shape", str(folder), timeout_s=_TIMEOUT_S)
    except UserError as error:
        raise UserError(f"the class of this model cannot be built and counted: {error}") from None
    counted: dict[str, Any] = json.loads(output.splitlines()[-1])
    return counted
