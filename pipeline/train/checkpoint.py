"""Portable checkpoints: the only writer of `checkpoints/`.

A checkpoint is a folder of safetensors and JSON, independent of ranks and ZeRO stages. It is
written to a temporary sibling, synced and renamed, so one with its final name was complete; the
manifest shows whether it still is. Written on rank 0; read on every rank. torch is imported only to
write and to read tensors, so a checkpoint of another run is refused before.
"""

import hashlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import RankZeroError, UserError
from pipeline.files import (
    atomic_folder,
    dump_json,
    read_json,
    recover_folder,
    remove_unfinished_folders,
)
from pipeline.model.fingerprint import is_same_by_samples, is_sampled
from pipeline.model.tensor_files import read_header
from pipeline.train.names import checkpoints_in

if TYPE_CHECKING:
    import torch

_ADAPTER, _OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"
_RESUME_IS_SAME_RUN = (
    "`resume` continues a run with its data and its learning rate schedule; for other data, "
    "steps or target modules start a new run without it, in another output_dir"
)


@dataclass(kw_only=True)
class Progress:
    """State of the training loop. A resume needs this, the adapter weights and Adam's moments."""

    step: int = 0
    optimizer_step: int = 0  # applied updates: excludes skipped steps
    skipped_steps: int = 0
    bad_steps: int = 0  # consecutive non-finite steps up to now
    documents: int = 0  # documents of the current epoch that have been trained on
    loss_scaler: dict[str, float] = field(default_factory=dict)  # fp16 only
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    is_evaluation_due: bool = False  # the run stopped before this step's evaluation
    eval_key: str | None = None  # key of the held-out data on which best_loss was measured


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Properties that a checkpoint and the run that resumes it must share.

    `accept_changes` names those that may differ. `adapter` (its shape) may never differ, because
    Adam's moments would not fit. `total_steps` is None until the data is prepared.
    """

    data: str
    base: str
    total_steps: int | None
    adapter: str


@dataclass
class Checkpoints:
    """The checkpoints of one run folder.

    `accepted`: fields of the identity that may differ. `origin`: the checkpoint of `resume: PATH`,
    from which the run's own checkpoints descend. `shapes`: shape of each LoRA matrix by its key.
    `model_folder`: the base model; needed for checkpoints whose base fingerprint is a sample of the
    weights. `about`: information for people in state.json.
    """

    folder: Path
    identity: Identity
    keep: int
    accepted: Collection[str] = ()
    origin: str | None = None
    shapes: Mapping[str, Sequence[int]] | None = None
    model_folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._best_of_newest = 0  # step of the best adapter that the resumed checkpoint names

    def write(
        self,
        weights: Mapping[str, "torch.Tensor"],
        moments: Mapping[str, "torch.Tensor"],
        progress: Progress,
    ) -> Path:
        """Write a checkpoint, then remove the oldest ones beyond the limit.

        Raises OSError, SafetensorError or RankZeroError; then earlier checkpoints are unchanged.
        """
        self._require_space(weights, moments)
        path = self.folder / f"step-{progress.step:08d}"
        self._write_folder(path, weights, moments, progress)
        self._best_of_newest = progress.best_step
        self._prune(path, progress)
        return path

    def write_best(self, weights: Mapping[str, "torch.Tensor"], progress: Progress) -> None:
        """Write the weights of this step, whose held-out loss is the lowest so far.

        The best adapter to which the newest checkpoint refers is kept until the next checkpoint,
        because a resume needs it. Other best adapters are removed.
        """
        named = self.folder / f"best-{self._best_of_newest:08d}"
        for path in checkpoints_in(self.folder, "best"):
            if path not in (named, self._best(progress)):
                shutil.rmtree(path, ignore_errors=True)
        self._require_space(weights)
        self._write_folder(self._best(progress), weights, {}, progress)

    def read_best(self, progress: Progress) -> dict[str, "torch.Tensor"]:
        """The weights that `write_best` wrote. Raises RankZeroError if they are damaged."""
        from safetensors.torch import load_file

        path = self._best(progress)
        try:
            damage = _damage(path)
        except OSError as error:
            damage = str(error)
        if damage:
            raise RankZeroError(f"{path}: the best adapter cannot be exported: {damage}")
        return load_file(path / _ADAPTER)

    def has_best(self, progress: Progress) -> bool:
        """Whether the weights that `write_best` wrote are intact; UserError if unreadable."""
        with self._read_errors_reported():
            return _damage(self._best(progress)) is None

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and a log line for each newer one that is skipped.

        With an `origin`: the newest checkpoint that descends from it, else the origin itself.
        Raises UserError if the origin is damaged, or if a checkpoint cannot be read, because an
        unreadable one may be intact.
        """
        with self._read_errors_reported():
            return self._newest()

    def intact_origin(self) -> Path | None:
        """The checkpoint of `resume: PATH`; None without one. Raises UserError if it is damaged."""
        if self.origin is None:
            return None
        with self._read_errors_reported():
            damage = _damage(Path(self.origin))
        if damage:
            raise UserError(f"resume: {self.origin} is no intact checkpoint: {damage}")
        return Path(self.origin)

    @contextmanager
    def _read_errors_reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: cannot be read ({error.strerror}), and it may "
                "belong to the checkpoint to resume from; make it readable and start again, or "
                "move the unreadable file away"
            ) from None

    def _newest(self) -> tuple[Path | None, list[str]]:
        for leftover in self.folder.glob(".*.old"):
            recover_folder(leftover.with_name(leftover.name.removeprefix(".").removesuffix(".old")))
        skipped: list[str] = []
        for path in reversed(checkpoints_in(self.folder)):
            if str(path.resolve()) == self.origin:
                break
            if damage := _damage(path):
                skipped.append(f"{path} is skipped: {damage}")
            elif self.origin is None or _state(path).get("origin") == self.origin:
                return path, skipped
            else:
                skipped.append(f"{path} is skipped: it does not come from {self.origin}")
        return self.intact_origin(), skipped

    def require_resumable(self, path: Path) -> Progress:
        """The progress in a checkpoint. Raises UserError if this run cannot resume from it.

        No tensor is read.
        """
        self._require_same_run(path, _state(path))
        self._require_same_tensors(path)
        progress = read_progress(path)
        self._require_steps_left(path, progress)
        self._best_of_newest = progress.best_step
        return progress

    def _is_foreign(self, path: Path) -> bool:
        """Whether a checkpoint belongs to another run folder, as `resume: PATH` allows."""
        return path.resolve().parent != self.folder.resolve()

    def _require_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        # Another run's checkpoint contains a position in that run's data and schedule, so of its
        # identity only the base may differ.
        accepted = {"base"} & {*self.accepted} if self._is_foreign(path) else self.accepted
        before, now = dict(state["identity"]), asdict(self.identity)
        folder = self.model_folder
        if folder and is_sampled(before["base"]) and is_same_by_samples(before["base"], folder):
            before["base"] = now["base"]
        differences = {
            name: f"{name}: {before.get(name)} -> {value}"
            for name, value in now.items()
            if value not in (None, before.get(name)) and name not in accepted
        }
        if not differences:
            return
        text = f"{path} is of another run: {'; '.join(differences.values())}"
        if self._is_foreign(path):
            raise UserError(f"resume: {text}; {_RESUME_IS_SAME_RUN}")
        text = f"output_dir: {text}"
        version = state.get("versions", {}).get("rankzero", __version__)
        remedy = "put back what changed or give another output_dir"
        if version != __version__:
            remedy = f"finish it with RankZero {version}, which wrote it, {remedy}"
        if acceptable := [name for name in differences if name != "adapter"]:
            remedy += f", or accept it by name: accept_changes: [{', '.join(acceptable)}]"
        raise UserError(f"{text}; {remedy}")

    def _require_same_tensors(self, path: Path) -> None:
        """Compare names and shapes of the adapter's tensors, before the model is loaded.

        Identity.adapter does not suffice: other target modules may have the same parameter count.
        """
        if self.shapes is None:
            return
        entries = read_header(path / _ADAPTER).entries
        found = {key: entry.shape for key, entry in entries.items() if _is_lora_matrix(key)}
        expected = {key: tuple(shape) for key, shape in self.shapes.items()}
        if found != expected:
            differing = sorted(found.items() ^ expected.items())
            key = differing[0][0]
            raise UserError(
                f"{path}: its adapter has other target modules than this run: {key} is "
                f"{found.get(key, 'not there')} in it and {expected.get(key, 'not there')} here; "
                f"put lora_target_modules back; {_RESUME_IS_SAME_RUN}"
            )

    def _require_steps_left(self, path: Path, progress: Progress) -> None:
        total = self.identity.total_steps
        if total is None:
            return
        if progress.step > total or (progress.step == total and self._is_foreign(path)):
            raise UserError(
                f"{path}: it is of step {progress.step}, and this run ends at step {total}, so "
                "there is no step left; raise epochs or max_steps, or start a new run in another "
                "output_dir"
            )

    def _best(self, progress: Progress) -> Path:
        return self.folder / f"best-{progress.best_step:08d}"

    def _prune(self, written: Path, progress: Progress) -> None:
        """Remove checkpoints beyond the limit, except the one with the lowest held-out loss.

        Checkpoints of later steps exist if the run was resumed from an earlier step; they are
        renamed, so that no later resume takes them.
        """
        best = self.folder / f"step-{progress.best_step:08d}"
        others = [path for path in checkpoints_in(self.folder) if path not in (written, best)]
        older = [path for path in others if path < written]
        surplus = older[: max(0, len(older) - (self.keep - 1))]
        later = [path for path in others if path > written]
        bests = [
            path for path in checkpoints_in(self.folder, "best") if path != self._best(progress)
        ]
        for path in (*surplus, *bests):
            shutil.rmtree(path, ignore_errors=True)  # tried again after the next checkpoint
        for path in later:
            with suppress(OSError):
                _rename_skipped(path)
        remove_unfinished_folders(self.folder)

    def _require_space(self, *tensors: Mapping[str, "torch.Tensor"]) -> None:
        need = sum(t.numel() * t.element_size() for group in tensors for t in group.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished_folders(self.folder)  # a killed write may hold the space
        free = shutil.disk_usage(self.folder).free
        if free < 1.01 * need:
            raise RankZeroError(
                f"{self.folder}: a checkpoint needs {need / 2**20:.1f} MiB and "
                f"{free / 2**20:.1f} MiB are free"
            )

    def _write_folder(
        self,
        path: Path,
        weights: Mapping[str, "torch.Tensor"],
        moments: Mapping[str, "torch.Tensor"],
        progress: Progress,
    ) -> None:
        from safetensors.torch import save_file

        with atomic_folder(path, check=lambda fresh: None) as fresh:
            save_file(dict(weights), fresh / _ADAPTER, metadata={"format": "pt"})
            save_file(dict(moments), fresh / _OPTIMIZER, metadata={"format": "pt"})
            state = {
                "identity": asdict(self.identity),
                "progress": asdict(progress),
                "origin": self.origin,
                **self.about,
            }
            (fresh / _STATE).write_text(dump_json(state), encoding="utf-8")
            files = {name: _description(fresh / name) for name in (_ADAPTER, _OPTIMIZER, _STATE)}
            (fresh / _MANIFEST).write_text(dump_json({"files": files}), encoding="utf-8")


def read_progress(path: Path) -> Progress:
    """The progress in an intact checkpoint."""
    written, known = _state(path)["progress"], {field.name for field in fields(Progress)}
    return Progress(**{name: value for name, value in written.items() if name in known})


def read_tensors(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
    """The adapter's weights and Adam's moments in an intact checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / _ADAPTER), load_file(path / _OPTIMIZER)


def _is_lora_matrix(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_B.weight"))


def _rename_skipped(path: Path) -> None:
    for number in count(1):
        aside = path.with_name(f"{path.name}-skipped-{number}")
        if not aside.exists():
            path.rename(aside)
            return


def _state(path: Path) -> dict[str, Any]:
    return read_json(path / _STATE)


def _description(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _damage(path: Path) -> str | None:
    """The reason why a checkpoint is not intact, or None. Raises OSError if it is unreadable."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        files = read_json(path / _MANIFEST)["files"]
        if missing := {_ADAPTER, _OPTIMIZER, _STATE} - files.keys():
            return f"its manifest does not list {', '.join(sorted(missing))}"
        for name, written in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _description(path / name) != written:
                return f"{name} differs from its size or SHA-256 in the manifest"
        if foreign := {file.name for file in path.iterdir()} - files.keys() - {_MANIFEST}:
            return f"it holds a foreign file, {min(foreign)}"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None
