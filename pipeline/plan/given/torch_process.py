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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import user_cache

# Matches the line of a traceback that names the exception.
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception)\b")


def cache_file(kind: str, key: Sequence[str], packages: Sequence[str]) -> Path:
    """Path of the cached result for a key and the installed versions of these packages.

    `kind` is the subfolder of the cache.
    """
    versions = [f"{package} {package_version(package)}" for package in packages]
    digest = hashlib.sha256(json.dumps([*key, *versions]).encode()).hexdigest()
    return user_cache() / kind / f"{digest}.json"


@contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """Let one process per machine compute the cached result `path`; the others wait for it.

    Raises OSError if the cache folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_module(module: str, *arguments: str, timeout_s: int) -> str:
    """Output of `python -m MODULE ARGUMENTS`, run without GPUs and without network.

    Raises UserError with the exception of the subprocess if it fails.
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
    return result.stdout


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
