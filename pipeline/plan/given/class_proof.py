"""Proof: how far a model class is trained correctly, as the checks of model/proof.py found.

The checks run in a subprocess, where torch is, and their result is remembered in the user's cache,
so that a plan reads it without torch.
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

_FORMAT = 2  # of the remembered file and of the checks
_TIMEOUT_S = 600
# Packages that define a class, or replace its kernels.
_PACKAGES = (
    "torch", "transformers", "peft", "causal-conv1d", "flash-linear-attention", "mamba-ssm",
    "kernels",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Relative errors by check, and the reasons why packs or the whole model are refused."""

    errors: Mapping[str, float] = field(default_factory=dict)
    refusals: Sequence[str] = ()
    without_packs: Sequence[str] = ()  # reasons; empty: documents may be packed
    without_reentrant: Sequence[str] = ()  # reasons; empty: re-entrant checkpointing is right
    without_merge: Sequence[str] = ()  # reasons; empty: the adapter's names are in the checkpoint


def adapted_names(shape: ModelShape, settings: RunSettings) -> list[str]:
    """Last parts of the names of the adapted linear layers."""
    targeted = shape.targeted(settings.lora_target_modules)
    return sorted({name.rsplit(".", 1)[-1] for name, _ in targeted})


def remembered_proof(shape: ModelShape, settings: RunSettings) -> Proof | None:
    """The remembered proof for these adapted layers; None where there is none."""
    names, trust = adapted_names(shape, settings), settings.trust_remote_code
    try:
        return read_proof(proof_path(Path(shape.folder), names, trust_remote_code=trust))
    except OSError:  # such as a folder that is not there
        return None


def without_leaking_packs(settings: RunSettings, proof: Proof | None) -> RunSettings:
    """The settings with `packing: false` where the class mixes documents and packs are a default.

    Packs that the user asked for are left to the rule that refuses them.
    """
    if proof is None or not proof.without_packs or "packing" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"packing": False})


def require_checked(settings: RunSettings, shape: ModelShape) -> None:
    """Check a class that families.py does not have, unless its proof is remembered.

    One process of a machine checks and the others wait for it. Raises UserError where the checks
    do not run.
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
    """Where a proof is remembered: by config.json, own code, adapted layers and packages."""
    index = folder / "model.safetensors.index.json"
    parts = [str(_FORMAT), *sorted(names), str(trust_remote_code)]
    parts += [f"{package} {_version(package)}" for package in _PACKAGES]
    parts += [(folder / "config.json").read_text(encoding="utf-8")]
    parts += [index.read_text(encoding="utf-8")] if index.is_file() else []
    parts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return user_cache() / "proofs" / f"{key}.json"


def read_proof(path: Path) -> Proof | None:
    """The proof in a file; None where there is none, or a damaged one."""
    with suppress(OSError, ValueError, TypeError):
        return Proof(**read_json(path))
    return None


def write_proof(path: Path, proof: Proof) -> None:
    """Remember a proof."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_json(asdict(proof)))


def _check(folder: Path, names: Sequence[str], settings: RunSettings) -> None:
    """Run the checks in a subprocess, which remembers their result."""
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
