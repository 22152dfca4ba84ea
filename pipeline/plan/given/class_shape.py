"""Sizes derived from the model's class, for a `model_type` that is not in the table families.py.

A subprocess builds the model on the meta device (model/class_shape.py), which takes seconds and
reads no weights. The sizes, or the reason why the class is refused, are cached, so that later plans
need no torch.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.given.torch_process import (
    cache_file,
    cached_result,
    package_version,
    read_cached,
    run_module,
)

_PACKAGES = ("torch", "transformers", "peft")  # their versions determine the shape of a class
_FORMAT = "16"  # version of the cached file
_TIMEOUT_S = 300


def class_shape(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The output of model/class_shape.py for the model in a folder, from the cache if possible.

    Raises UserError if the class cannot be built, or is known not to be trained correctly.
    """
    path = shape_file(folder, trust_remote_code=trust_remote_code)
    if read_cached(path) is None and package_version("torch") is None:
        raise UserError(
            "this model_type is not in the table of known families, and without torch the sizes of "
            "its class cannot be counted here; run `python -m pipeline.model.class_shape "
            f"{folder}` on a machine with the same versions of torch, transformers and peft, and "
            f"write its output to {path}"
        )
    sizes = cached_result(
        path,
        lambda: _count_in_subprocess(folder, trust_remote_code=trust_remote_code),
        is_lasting=lambda counted: "failed" not in counted,  # a missing package may be installed
    )
    if (reason := sizes.get("refused")) is not None:
        raise UserError(f"the class of this model cannot be trained here: {reason}")
    if (reason := sizes.get("failed")) is not None:
        raise UserError(f"the class of this model cannot be built: {reason}")
    return sizes


def shape_file(folder: Path, *, trust_remote_code: bool = False) -> Path:
    """Cache file of the sizes.

    Its name is a hash of config.json, the code in the model's folder if it is used, and the
    versions of the packages.
    """
    files = [folder / "config.json", *(sorted(folder.glob("*.py")) if trust_remote_code else [])]
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return cache_file("shapes", [_FORMAT, *contents], _PACKAGES)


def _count_in_subprocess(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """The sizes of the model's class, counted by a subprocess with torch."""
    trust = ["--trust-remote-code"] if trust_remote_code else []
    try:
        return run_module("pipeline.model.class_shape", str(folder), *trust, timeout_s=_TIMEOUT_S)
    except UserError as error:
        raise UserError(f"the class of this model cannot be built and counted: {error}") from None
