"""Proof: results of the checks of model/proof.py that a model class is trained correctly.

The checks run in a subprocess with torch. Their result is cached in the user's cache folder, so
that a plan reads it without torch.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.files import dump_json, read_json, user_cache, write_text
from pipeline.plan.given.shape import ModelShape

_FORMAT = 2  # version of the cached file and of the checks
_TIMEOUT_S = 600
# Packages that define a model class or replace its kernels.
_PACKAGES = (
    "torch", "transformers", "peft", "causal-conv1d", "flash-linear-attention", "mamba-ssm",
    "kernels",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Relative errors by check, and the reasons for refusing the model or some uses of it."""

    errors: Mapping[str, float] = field(default_factory=dict)
    refusals: Sequence[str] = ()
    without_packs: Sequence[str] = ()  # reasons; empty: documents may be packed
    without_reentrant: Sequence[str] = ()  # reasons; empty: re-entrant checkpointing is correct
    without_merge: Sequence[str] = ()  # reasons; empty: the adapter's names are in the checkpoint


def adapted_names(shape: ModelShape, settings: RunSettings) -> list[str]:
    """Last parts of the names of the adapted linear layers, such as `q_proj`."""
    targeted = shape.targeted(settings.lora_target_modules)
    return sorted({name.rsplit(".", 1)[-1] for name, _ in targeted})


def remembered_proof(shape: ModelShape, settings: RunSettings) -> Proof | None:
    """The cached proof for the adapted layers of this run; None if there is none."""
    names, trust = adapted_names(shape, settings), settings.trust_remote_code
    try:
        return read_proof(proof_path(Path(shape.folder), names, trust_remote_code=trust))
    except OSError:  # such as a missing folder
        return None


def without_leaking_packs(settings: RunSettings, proof: Proof | None) -> RunSettings:
    """The settings with `packing: false` if the class leaks information between documents.

    If the user set `packing`, it stays: a rule refuses the run.
    """
    if proof is None or not proof.without_packs or "packing" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"packing": False})


def require_checked(settings: RunSettings, shape: ModelShape) -> None:
    """Check the class of a model that is not in families.py, unless its proof is cached.

    One process per machine runs the checks; the others wait for it. Raises UserError if the checks
    cannot run.
    """
    if not shape.is_from_class or remembered_proof(shape, settings) is not None:
        return
    folder, names = Path(shape.folder), adapted_names(shape, settings)
    path = proof_path(folder, names, trust_remote_code=settings.trust_remote_code)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if read_proof(path) is None:
                _check(folder, names, settings)
    except OSError as error:
        raise UserError(
            f"model: its class is checked once and the result is remembered, but {path.parent} "
            f"cannot be written ({error.strerror}); set RANKZERO_CACHE to a folder that can"
        ) from None


def proof_path(folder: Path, names: Sequence[str], *, trust_remote_code: bool) -> Path:
    """Cache file of a proof; its key is config.json, own code, adapted layers and versions."""
    index = folder / "model.safetensors.index.json"
    parts = [str(_FORMAT), *sorted(names), str(trust_remote_code)]
    parts += [f"{package} {_version(package)}" for package in _PACKAGES]
    parts += [(folder / "config.json").read_text(encoding="utf-8")]
    parts += [index.read_text(encoding="utf-8")] if index.is_file() else []
    parts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return user_cache() / "proofs" / f"{key}.json"


def read_proof(path: Path) -> Proof | None:
    """The proof in a file; None if the file is missing or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return Proof(**read_json(path))
    return None


def write_proof(path: Path, proof: Proof) -> None:
    """Write a proof to its cache file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_json(asdict(proof)))


def _check(folder: Path, names: Sequence[str], settings: RunSettings) -> None:
    """Run the checks in a subprocess, which caches their result."""
    command = [sys.executable, "-m", "pipeline.model.proof", str(folder), *names]
    command += ["--trust-remote-code"] if settings.trust_remote_code else []
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"model: its class was not checked within {_TIMEOUT_S} s") from None
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise UserError(f"model: the checks of its class do not run: {last}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
