"""Sizes counted on a model's class, for a `model_type` that families.py does not have.

A subprocess instantiates the class on the meta device (model/class_shape.py), in seconds and
without weights. The result is cached in the user's cache folder, so that later plans need no
torch.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, write_text

_PACKAGES = ("torch", "transformers", "peft")
_FORMAT = 2  # of the cached file
_TIMEOUT_S = 300
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")  # line that names the exception of a traceback


def class_shape(folder: Path) -> dict[str, Any]:
    """The sizes of the model in a folder, from the cache or counted now.

    Raises UserError with the reason if they cannot be counted.
    """
    path = remembered_path(folder)
    try:
        return read_json(path)
    except (OSError, ValueError):
        pass
    if _version("torch") is None:
        raise UserError(
            "this model_type is not in the table of known families, and without torch its class "
            f"cannot be counted here; run `python -m pipeline.model.class_shape {folder}` where "
            f"the same torch, transformers and peft are installed, and write its output to {path}"
        )
    counted = _count(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_json(counted))
    except OSError:
        pass  # without a cache the sizes are counted again next time
    return counted


def remembered_path(folder: Path) -> Path:
    """Cache file of the sizes; its key is config.json and the versions that define the class."""
    versions = [f"{name} {_version(name)}" for name in _PACKAGES]
    text = "\n".join([f"format {_FORMAT}", *versions]).encode()
    key = hashlib.sha256(text + (folder / "config.json").read_bytes()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rankzero" / "shapes" / f"{key}.json"


def _count(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.model.class_shape", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"its class was not built within {_TIMEOUT_S} s") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        errors = [line for line in lines if _ERROR.match(line)] or lines
        raise UserError(f"the class of this model cannot be built and counted: {errors[-1]}")
    counted: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return counted


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
