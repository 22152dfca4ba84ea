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
_FORMAT = "4"  # of the cached file
_TIMEOUT_S = 300


def class_shape(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Shape of the model in a folder, from the cache if possible.

    Raises UserError if the class cannot be built.
    """
    path = shape_file(folder, trust_remote_code=trust_remote_code)
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
    counted = _count(folder, trust_remote_code=trust_remote_code)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_json(counted))
    except OSError:
        pass  # without a cache the next plan counts the class again
    return counted


def shape_file(folder: Path, *, trust_remote_code: bool = False) -> Path:
    """Cache file of the shape.

    Its key is config.json, the model's own code if it is used, and the versions of the packages.
    """
    files = [folder / "config.json", *(sorted(folder.glob("*.py")) if trust_remote_code else [])]
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return cache_file("shapes", [_FORMAT, *contents], _PACKAGES)


def _count(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    trust = ["--trust-remote-code"] if trust_remote_code else []
    try:
        output = run_module("pipeline.model.class_shape", str(folder), *trust, timeout_s=_TIMEOUT_S)
    except UserError as error:
        raise UserError(f"the class of this model cannot be built and counted: {error}") from None
    counted: dict[str, Any] = json.loads(output.splitlines()[-1])
    return counted
