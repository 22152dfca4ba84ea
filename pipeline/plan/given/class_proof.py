"""Proof: results of the checks whether this package trains a model class correctly.

The checks compare loss, attention, packed sequences, adapter and checkpointing with those of the
class itself, on a small copy of the model. model/proof.py runs them in a subprocess with torch. The
results are cached, so that later plans need no torch.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.adapter_counts import adapted_layers
from pipeline.plan.given.shape import EXPERTS, ModelShape
from pipeline.plan.given.torch_process import cache_file, cached_result, read_cached, run_module

LIMIT = 1e-5  # largest relative error of a check that passes
_FORMAT = "7"  # version of the cached file and of the checks
_TIMEOUT_S = 600
# Packages that define a model class or replace its kernels.
_PACKAGES = (
    "torch", "transformers", "peft", "causal-conv1d", "flash-linear-attention", "mamba-ssm",
    "kernels",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Results of all checks of a class.

    `errors`: name of each check -> its relative error. Each other field lists the reasons against
    one use of the class, and is empty if there are none: `refusals` against training at all,
    `without_packs` against packing documents, `without_reentrant` against re-entrant checkpointing,
    `without_merge` against merging the adapter into the base, `without_fast_paths` against the fast
    paths (fast_paths.py).
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    refusals: Sequence[str] = ()
    without_packs: Sequence[str] = ()
    without_reentrant: Sequence[str] = ()
    without_merge: Sequence[str] = ()
    without_fast_paths: Sequence[str] = ()


def adapted_names(shape: ModelShape, settings: RunSettings) -> list[str]:
    """Last parts of the names of the adapted linear layers, such as `q_proj`, and `experts`."""
    names = {layer.name.rsplit(".", 1)[-1] for layer in adapted_layers(shape, settings)}
    has_experts = shape.targeted_experts(settings.lora_target_modules)
    return sorted(names | ({EXPERTS} if has_experts else set()))


def cached_proof(shape: ModelShape, settings: RunSettings) -> Proof | None:
    """The proof for the adapted layers of this run; None if it is not cached."""
    names, trust = adapted_names(shape, settings), settings.trust_remote_code
    try:
        return read_proof(proof_file(Path(shape.folder), names, trust_remote_code=trust))
    except OSError:  # the model folder is missing
        return None


def without_mixing_packs(
    settings: RunSettings, shape: ModelShape, proof: Proof | None
) -> tuple[RunSettings, str]:
    """Set `packing: false` if the class does not keep documents separate; also return the reason.

    If the user set `packing: true`, it stays, and the rule `class-packs` refuses the run.
    """
    reason = reason_against_packs(shape, proof)
    if not reason or "packing" in settings.model_fields_set:
        return settings, ""
    return settings.model_copy(update={"packing": False}), reason


def reason_against_packs(shape: ModelShape, proof: Proof | None) -> str:
    """Why the class does not keep the documents of a pack separate; empty if it does.

    The reason comes from the checks. If they have not run, for example in a plan for a published
    model without a folder, it comes from the shape (`ModelShape.mixing_reason`).
    """
    if proof is None:
        return shape.mixing_reason
    return proof.without_packs[0] if proof.without_packs else ""


def without_wrong_fast_paths(settings: RunSettings, proof: Proof | None) -> RunSettings:
    """The settings, with `fast_paths: false` if fast paths change the results of the class."""
    if proof is None or not proof.without_fast_paths:
        return settings
    return settings.model_copy(update={"fast_paths": False})


def ensure_proof(settings: RunSettings, shape: ModelShape) -> None:
    """Run and cache the checks of a class that is not in families.py, unless they are cached.

    One process per machine runs the checks; the others wait for it. Raises UserError if the checks
    cannot run.
    """
    if not shape.is_from_class or cached_proof(shape, settings) is not None:
        return
    folder, names = Path(shape.folder), adapted_names(shape, settings)
    path = proof_file(folder, names, trust_remote_code=settings.trust_remote_code)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(
            "model: the result of the checks of its class cannot be cached: the folder "
            f"{path.parent} is not writable; set RANKZERO_CACHE to a folder that is"
        )
    cached_result(path, lambda: _run_checks(folder, names, settings))


def proof_file(folder: Path, names: Sequence[str], *, trust_remote_code: bool) -> Path:
    """Cache file of a proof. `names`: last parts of the names of the adapted layers.

    The file's name is a hash of everything that the checks depend on: config.json, the code in the
    model's folder, the names of the adapted layers and of the tensors in the checkpoint, and the
    versions of the packages.
    """
    index = folder / "model.safetensors.index.json"
    files = [folder / "config.json", *([index] if index.is_file() else [])]
    files += sorted(folder.glob("*.py"))
    contents = [path.read_text(encoding="utf-8") for path in files]
    key = [_FORMAT, *sorted(names), str(trust_remote_code), *contents]
    return cache_file("proofs", key, _PACKAGES)


def read_proof(path: Path) -> Proof | None:
    """The proof in a file; None if the file is missing or damaged."""
    cached = read_cached(path)
    return None if cached is None else Proof(**cached)


def _run_checks(folder: Path, names: Sequence[str], settings: RunSettings) -> dict[str, Any]:
    """Run the checks in a subprocess; the result has the fields of Proof."""
    trust = ["--trust-remote-code"] if settings.trust_remote_code else []
    try:
        return run_module("pipeline.model.proof", str(folder), *names, *trust, timeout_s=_TIMEOUT_S)
    except UserError as error:
        raise UserError(f"model: the checks of its class do not run: {error}") from None
