"""Subprocesses that compute results with torch, and the cache of these results.

The plan's own process never imports torch. The cache folder is $RANKZERO_CACHE, or
~/.cache/rankzero if that is not set.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, user_cache, write_text

# Matches the line of a traceback that names the exception.
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception)\b")


def cache_file(kind: str, key: Sequence[str], packages: Sequence[str]) -> Path:
    """Path of the cached result for a key and the installed versions of these packages.

    `kind`: subfolder of the cache. `key`: everything else that the result depends on.
    """
    versions = [f"{package} {package_version(package)}" for package in packages]
    digest = hashlib.sha256(json.dumps([*key, *versions]).encode()).hexdigest()
    return user_cache() / kind / f"{digest}.json"


def cached_result(
    path: Path,
    compute: Callable[[], dict[str, Any]],
    is_lasting: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> dict[str, Any]:
    """The result in a cache file; if the file is missing, the result is computed and cached.

    One process per machine computes it; the others wait. A result for which `is_lasting` returns
    False is not cached. If the cache cannot be written, every call computes.
    """
    if (cached := read_cached(path)) is not None:
        return cached
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a machine start at the same time
            if (cached := read_cached(path)) is not None:
                return cached
            result = compute()
            if is_lasting(result):
                write_text(path, dump_json(result))
            return result
    except OSError:
        return compute()


def read_cached(path: Path) -> dict[str, Any] | None:
    """The result in a cache file; None if the file is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def run_module(module: str, *arguments: str, timeout_s: int) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS`, and return the JSON object in its last line of output.

    The subprocess has no GPUs and no network. Raises UserError with the exception of the subprocess
    if it fails.
    """
    # One thread: the tensors are tiny, and on a busy host waiting threads took ten times as long.
    only_cpu = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | only_cpu
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True, text=True, check=False, timeout=timeout_s, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"not finished within {timeout_s} s") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        errors = [line for line in lines if _EXCEPTION.match(line)] or lines
        raise UserError(errors[-1])
    output: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return output


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
