"""Portable checkpoints: the only writer of `checkpoints/`.

A checkpoint is a folder of safetensors and JSON that says nothing of ranks or ZeRO stages. It is
written beside, synced and renamed, so one with its final name was complete; the manifest shows
whether it still is. Written on rank 0; read on every rank.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import RankZeroError, UserError
from pipeline.files import atomic_folder, dump_json, recover_folder, remove_unfinished_folders
from pipeline.model.fingerprint import is_same_by_samples, is_sampled

_ADAPTER, _OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; all that its future depends on beside weights and moments."""

    step: int = 0
    optimizer_step: int = 0  # steps that Adam has made: skipped ones are not among them
    skipped_steps: int = 0
    bad_steps: int = 0  # the latest steps, one after the other, that were not finite
    documents: int = 0  # of the current epoch that are done with
    loss_scaler: dict[str, float] = field(default_factory=dict)  # of fp16
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    is_evaluation_due: bool = False  # a stop came first


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to, in the words of the setting `accept_changes`.

    `adapter` says its shape; no other shape can be accepted, for Adam's moments would not fit.
    """

    data: str
    base: str
    total_steps: int
    adapter: str


class Checkpoints:
    """The checkpoints of one run folder.

    `about` goes into state.json for a reader's eyes. `origin` is the checkpoint of `resume: PATH`
    that all those written here descend from.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        keep: int,
        *,
        accepted: Collection[str] = (),
        origin: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._identity, self._keep = folder, identity, keep
        self._accepted, self._origin, self._about = accepted, origin, dict(about or {})
        self._named_best = 0  # step of the best that the checkpoint to go on from names

    def write(
        self,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        progress: Progress,
    ) -> Path:
        """Write a checkpoint and, once it is there, remove the oldest beyond the limit.

        Raises OSError, SafetensorError or RankZeroError; those that are there stay as they were.
        """
        self._require_space(weights, moments)
        path = self._folder / f"step-{progress.step:08d}"
        self._write_folder(path, weights, moments, progress)
        self._named_best = progress.best_step
        self._prune(path, progress)
        return path

    def write_best(self, weights: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """Keep the weights of the lowest held-out loss so far, that of this step.

        The best that a checkpoint names stays until one names this: a resume may need it again.
        Those between the two go.
        """
        named = self._folder / f"best-{self._named_best:08d}"
        for path in self._named("best"):
            if path not in (named, self._best(progress)):
                shutil.rmtree(path, ignore_errors=True)
        self._require_space(weights)
        self._write_folder(self._best(progress), weights, {}, progress)

    def read_best(self, progress: Progress) -> dict[str, torch.Tensor]:
        """The weights that `write_best` kept. Raises RankZeroError where they are damaged."""
        path = self._best(progress)
        try:
            damage = _damage(path)
        except OSError as error:
            damage = str(error)
        if damage:
            raise RankZeroError(f"{path}: the best adapter cannot be exported: {damage}")
        return load_file(path / _ADAPTER)

    def has_best(self, progress: Progress) -> bool:
        """Whether the weights that `write_best` kept are there and intact; UserError as newest."""
        with self._unreadable_is_said():
            return _damage(self._best(progress)) is None

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint to go on from, and a line for each newer one that is not.

        With an `origin` that is one which descends from it, else itself; it must be intact.
        Raises UserError where one cannot be read: it may be intact.
        """
        with self._unreadable_is_said():
            return self._newest()

    @contextmanager
    def _unreadable_is_said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self._folder}: cannot be read ({error.strerror}), so whether "
                "there is a checkpoint to go on from is not known; mend that and start again, or "
                "move what cannot be read away"
            ) from None

    def _newest(self) -> tuple[Path | None, list[str]]:
        for leftover in self._folder.glob(".*.old"):
            recover_folder(leftover.with_name(leftover.name.removeprefix(".").removesuffix(".old")))
        passed_over: list[str] = []
        for path in reversed(self._by_age()):
            if str(path.resolve()) == self._origin:
                break
            if damage := _damage(path):
                passed_over.append(f"{path} is passed over: {damage}")
            elif self._origin is None or _state(path).get("origin") == self._origin:
                return path, passed_over
            else:
                passed_over.append(f"{path} is passed over: it does not come from {self._origin}")
        if self._origin is None:
            return None, passed_over
        if damage := _damage(Path(self._origin)):
            raise UserError(f"resume: {self._origin} is no intact checkpoint: {damage}")
        return Path(self._origin), passed_over

    def read_progress(self, path: Path, model_folder: Path | None = None) -> Progress:
        """How far the run had come. Raises UserError if the checkpoint belongs to another run."""
        state = _state(path)
        then, now = state["identity"], asdict(self._identity)
        if (
            model_folder
            and is_sampled(then["base"])
            and is_same_by_samples(then["base"], model_folder)
        ):
            then = then | {"base": now["base"]}
        differences = {
            name: f"{name}: {then.get(name)} -> {value}"
            for name, value in now.items()
            if then.get(name) != value and name not in self._accepted
        }
        if differences:
            acceptable = [name for name in differences if name != "adapter"]
            remedy = "put back what changed, or set resume: never to start anew"
            if acceptable:
                remedy += f", or accept it by name: accept_changes: [{', '.join(acceptable)}]"
            raise UserError(
                f"{path} is of another run: {'; '.join(differences.values())}; {remedy}"
            )
        known = {f.name for f in fields(Progress)}
        progress = Progress(**{k: v for k, v in state["progress"].items() if k in known})
        self._named_best = progress.best_step
        return progress

    def read_tensors(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights and moments."""
        return load_file(path / _ADAPTER), load_file(path / _OPTIMIZER)

    def _by_age(self) -> list[Path]:
        return sorted(self._named("step"))

    def _named(self, kind: str) -> list[Path]:
        """Those that were written here: a user's own copy, such as step-00000200-keep, is not."""
        name = re.compile(rf"{kind}-\d{{8}}")
        try:
            there = list(self._folder.iterdir())  # glob takes a forbidden folder for an empty one
        except FileNotFoundError:
            return []
        return [path for path in there if name.fullmatch(path.name)]

    def _best(self, progress: Progress) -> Path:
        return self._folder / f"best-{progress.best_step:08d}"

    def _prune(self, written: Path, progress: Progress) -> None:
        """Remove what the checkpoint just written replaces, never that one itself.

        That of the lowest held-out loss stays. Later steps are there only after a resume from
        before them: they were passed over then, and are kept under a name that is.
        """
        best = self._folder / f"step-{progress.best_step:08d}"
        others = [path for path in self._by_age() if path not in (written, best)]
        older = [path for path in others if path < written]
        surplus = older[: max(0, len(older) - (self._keep - 1))]
        later = [path for path in others if path > written]
        bests = [path for path in self._named("best") if path != self._best(progress)]
        for path in (*surplus, *bests):
            shutil.rmtree(path, ignore_errors=True)  # tried again after the next one
        for path in later:
            with suppress(OSError):
                _put_aside(path)
        remove_unfinished_folders(self._folder)

    def _require_space(self, *tensors: Mapping[str, torch.Tensor]) -> None:
        need = sum(t.numel() * t.element_size() for group in tensors for t in group.values())
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished_folders(self._folder)  # a write that was cut off may hold the space
        free = shutil.disk_usage(self._folder).free
        if free < 1.01 * need:
            raise RankZeroError(
                f"{self._folder}: a checkpoint needs {need / 2**20:.1f} MiB and "
                f"{free / 2**20:.1f} MiB are free"
            )

    def _write_folder(
        self,
        path: Path,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
        progress: Progress,
    ) -> None:
        with atomic_folder(path, check=lambda fresh: None) as fresh:
            save_file(dict(weights), fresh / _ADAPTER, metadata={"format": "pt"})
            save_file(dict(moments), fresh / _OPTIMIZER, metadata={"format": "pt"})
            state = {
                "identity": asdict(self._identity),
                "progress": asdict(progress),
                "origin": self._origin,
                **self._about,
            }
            (fresh / _STATE).write_text(dump_json(state), encoding="utf-8")
            files = {name: _described(fresh / name) for name in (_ADAPTER, _OPTIMIZER, _STATE)}
            (fresh / _MANIFEST).write_text(dump_json({"files": files}), encoding="utf-8")


def _put_aside(path: Path) -> None:
    for number in count(1):
        aside = path.with_name(f"{path.name}-passed-over-{number}")
        if not aside.exists():
            path.rename(aside)
            return


def _state(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return found


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Raises OSError where it cannot be read."""
    if not path.is_dir():
        return "there is no such folder"
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
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None
