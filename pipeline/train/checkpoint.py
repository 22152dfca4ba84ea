"""Portable checkpoints: the only writer of `checkpoints/`.

A checkpoint is a folder of safetensors and JSON that says nothing of ranks or ZeRO stages. It is
written beside, synced and renamed, so one with its final name was complete; the manifest shows
whether it still is. Called on rank 0; reading on every rank.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.adapter.replace import replacing
from pipeline.errors import RankZeroError, UserError
from pipeline.plan.plan import dump_json

_ADAPTER, _OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; all that its future depends on beside weights and moments."""

    step: int = 0
    optimizer_step: int = 0  # steps that Adam has made: skipped ones are not among them
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    is_evaluation_due: bool = False  # a stop came first


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; another one is refused."""

    data_key: str
    base_fingerprint: str
    total_steps: int


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, identity: Identity, keep: int) -> None:
        self._folder, self._identity, self._keep = folder, identity, keep

    def write(
        self,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        progress: Progress,
    ) -> Path:
        """Write a checkpoint and, once it is there, remove the oldest beyond the limit."""
        self._require_space(weights, moments)
        path = self._folder / f"step-{progress.step:08d}"
        self._write_folder(path, weights, moments, progress)
        self._prune(path, progress)
        return path

    def write_best(self, weights: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """Keep the weights of the lowest held-out loss so far, that of this step.

        The best before stays until a checkpoint names this one: a resume may need it again.
        """
        self._write_folder(self._best(progress), weights, {}, progress)

    def read_best(self, progress: Progress) -> dict[str, torch.Tensor]:
        """The weights that `write_best` kept. Raises RankZeroError where they are damaged."""
        path = self._best(progress)
        if damage := _damage(path):
            raise RankZeroError(f"{path}: the best adapter cannot be exported: {damage}")
        return load_file(path / _ADAPTER)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and a line for each newer one that is not."""
        passed_over: list[str] = []
        for path in reversed(self._by_age()):
            damage = _damage(path)
            if not damage:
                return path, passed_over
            passed_over.append(f"{path} is passed over: {damage}")
        return None, passed_over

    def read_progress(self, path: Path) -> Progress:
        """How far the run had come. Raises UserError if the checkpoint belongs to another run."""
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        expected = asdict(self._identity)
        if differences := [k for k, v in expected.items() if state["identity"].get(k) != v]:
            raise UserError(
                f"{path} belongs to another run: {', '.join(differences)} changed since it was "
                "written; restore what changed, or set resume: never to start anew"
            )
        return Progress(**state["progress"])

    def read_tensors(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights and moments."""
        return load_file(path / _ADAPTER), load_file(path / _OPTIMIZER)

    def _by_age(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _best(self, progress: Progress) -> Path:
        return self._folder / f"best-{progress.best_step:08d}"

    def _prune(self, written: Path, progress: Progress) -> None:
        """Remove what the checkpoint just written replaces, never that one itself.

        Later steps are there only after a resume from before them, and were passed over then.
        """
        others = [path for path in self._by_age() if path != written]
        older = [path for path in others if path < written]
        surplus = older[: max(0, len(older) - (self._keep - 1))]
        later = [path for path in others if path > written]
        bests = [path for path in self._folder.glob("best-*") if path != self._best(progress)]
        for path in (*surplus, *later, *bests):
            shutil.rmtree(path)

    def _require_space(self, *tensors: Mapping[str, torch.Tensor]) -> None:
        need = sum(t.numel() * t.element_size() for group in tensors for t in group.values())
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < 1.01 * need:
            raise RankZeroError(
                f"{self._folder}: a checkpoint needs {need / 2**20:.0f} MiB and "
                f"{free / 2**20:.0f} MiB are free; the last one is untouched"
            )

    def _write_folder(
        self,
        path: Path,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        progress: Progress,
    ) -> None:
        with replacing(path, check=lambda fresh: None) as fresh:
            save_file(dict(weights), fresh / _ADAPTER, metadata={"format": "pt"})
            save_file(dict(moments), fresh / _OPTIMIZER, metadata={"format": "pt"})
            state = {"identity": asdict(self._identity), "progress": asdict(progress)}
            (fresh / _STATE).write_text(dump_json(state), encoding="utf-8")
            files = {name: _described(fresh / name) for name in (_ADAPTER, _OPTIMIZER, _STATE)}
            (fresh / _MANIFEST).write_text(dump_json({"files": files}), encoding="utf-8")


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        if missing := {_ADAPTER, _OPTIMIZER, _STATE} - files.keys():
            return f"its manifest does not list {', '.join(sorted(missing))}"
        for name, said in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _described(path / name) != said:
                return f"{name} is not what was written"
        if strangers := {file.name for file in path.iterdir()} - files.keys() - {_MANIFEST}:
            return f"it holds a foreign file, {min(strangers)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None
