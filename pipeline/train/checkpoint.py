"""Checkpoints of a run: folders of safetensors and JSON files, independent of ranks and stages.

Only this file writes to `checkpoints/`. A checkpoint is written to a temporary sibling, synced and
renamed, so it was complete when it got its final name; its manifest shows later damage. Rank 0
writes checkpoints, every rank reads them. Only functions that write or read tensors import torch,
so that a checkpoint that cannot be used is refused before this slow import.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import RankZeroError, UserError
from pipeline.files import (
    atomic_folder,
    dump_json,
    file_sha256,
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
_INITIAL = "initial.safetensors"  # only if A and B started with a part of the base
_STATE, _MANIFEST = "state.json", "manifest.json"
DATA_MADE_WITH = "data_made_with"  # entry of state.json: versions of the tokenising packages
DIVISION = "division"  # entry of state.json: how a step was divided over ranks
# Names of adapter tensors of fused experts (all experts of a layer in one tensor).
_FUSED_EXPERTS = re.compile(r"\.experts(\.base_layer)?\.lora_[AB]\.weight$")
_RESUME_IS_SAME_RUN = (
    "`resume` continues a run with its own data and learning rate schedule; for other data, steps "
    "or target modules start a new run in another output_dir without `resume`; to start from the "
    "trained weights, set its init_adapter to the `adapter` folder of that run"
)


@dataclass(kw_only=True)
class Progress:
    """State of the training loop. A resume needs this state, the weights and Adam's moments.

    `step`: finished steps. `optimizer_step`: applied updates. `skipped_steps`: steps without an
    update. `bad_steps`: number of non-finite steps since the last finite one. `documents`:
    documents of the current epoch that have been trained on. `loss_scaler`: state of the loss
    scaler, only in fp16. `best_loss`: lowest held-out loss, measured at `best_step` on the held-out
    data with the key `eval_key`. `is_evaluation_due`: whether the run was stopped before the
    evaluation of this step.
    """

    step: int = 0
    optimizer_step: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0
    documents: int = 0
    loss_scaler: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    is_evaluation_due: bool = False
    eval_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Properties that must be equal in a checkpoint and in the run that resumes from it.

    `data`: hash of the training files and of the settings that turn them into documents. `base`:
    fingerprint of the base; None until it is computed, in a run that starts from step 0.
    `total_steps`: None until the data is prepared. `adapter`: description of its size. The setting
    `accept_changes` accepts differences of `data`, `base` and `total_steps`. `adapter` may never
    differ, because Adam's moments would have other shapes.
    `tokens`: key of each prepared split -> digest of its tokens; None until the data is prepared.
    Tokens can differ although `data` is equal, for example with another version of tokenizers.
    """

    data: str
    base: str | None
    total_steps: int | None
    adapter: str
    tokens: Mapping[str, str] | None = None


@dataclass
class Checkpoints:
    """The checkpoints of one run folder.

    `keep`: number of checkpoints to keep (save_total_limit). `accepted`: fields of `identity` that
    may differ (accept_changes). `origin`: the checkpoint of `resume: PATH`, if the run started from
    one; the checkpoints of the run record this path. `shapes`: name and shape of each trained
    tensor, without those of fused experts. `model_folder`: folder of the base. It is needed for
    checkpoints of earlier versions, whose fingerprint covers only samples of the weights.
    `metadata`: further entries of state.json for users. `initial`: the initial LoRA weights A0 and
    B0 of PiSSA and OLoRA, which each checkpoint contains; empty for other adapters.
    """

    folder: Path
    identity: Identity
    keep: int
    accepted: Collection[str] = ()
    origin: str | None = None
    shapes: Mapping[str, Sequence[int]] | None = None
    model_folder: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    initial: Mapping[str, "torch.Tensor"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._best_of_newest = 0  # `best_step` in the newest checkpoint

    def write(
        self,
        weights: Mapping[str, "torch.Tensor"],
        moments: Mapping[str, "torch.Tensor"],
        progress: Progress,
    ) -> Path:
        """Write a checkpoint, then remove the oldest ones beyond the limit.

        Raises OSError, SafetensorError or RankZeroError if this fails; earlier checkpoints then
        stay unchanged.
        """
        self._require_space(weights, moments, self.initial)
        path = self.folder / f"step-{progress.step:08d}"
        self._write_folder(path, weights, moments, progress)
        self._best_of_newest = progress.best_step
        self._prune(path, progress)
        return path

    def write_best(self, weights: Mapping[str, "torch.Tensor"], progress: Progress) -> None:
        """Write the best adapter: the weights of this step, whose held-out loss is the lowest.

        The best adapter to which the newest checkpoint refers is kept until the next checkpoint,
        because a resume needs it. Other best adapters are removed.
        """
        needed = self.folder / f"best-{self._best_of_newest:08d}"
        for path in checkpoints_in(self.folder, "best"):
            if path not in (needed, self._best_path(progress)):
                shutil.rmtree(path, ignore_errors=True)
        self._require_space(weights)
        self._write_folder(self._best_path(progress), weights, {}, progress)

    def read_best(self, progress: Progress) -> dict[str, "torch.Tensor"]:
        """The weights of the best adapter. Raises RankZeroError if they are damaged."""
        from safetensors.torch import load_file

        path = self._best_path(progress)
        try:
            damage = _damage(path)
        except OSError as error:
            damage = str(error)
        if damage:
            raise RankZeroError(f"{path}: the best adapter cannot be exported: {damage}")
        return load_file(path / _ADAPTER)

    def has_best(self, progress: Progress) -> bool:
        """Whether the best adapter is intact. Raises UserError if it cannot be read."""
        with self._read_errors_reported():
            return _damage(self._best_path(progress)) is None

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and a log line for each newer one that is skipped.

        If `origin` is set, checkpoints that do not record this path are skipped too. If no other
        checkpoint is usable, the result is the origin, or None without one. Raises UserError if the
        origin is damaged, or if a checkpoint cannot be read, because it may be intact.
        """
        skipped: list[str] = []
        with self._read_errors_reported():
            # Folders whose replacement was interrupted: atomic_folder renames step-N to .step-N.old
            for old in self.folder.glob(".*.old"):
                recover_folder(old.with_name(old.name.removeprefix(".").removesuffix(".old")))
            for path in reversed(checkpoints_in(self.folder)):
                if os.path.realpath(path) == self.origin:  # `resolve` fails at a loop of links
                    break
                if damage := _damage(path):
                    skipped.append(f"{path} is skipped: {damage}")
                elif self.origin is None or _read_state(path).get("origin") == self.origin:
                    return path, skipped
                else:
                    skipped.append(f"{path} is skipped: its run did not start from {self.origin}")
            return self.intact_origin(), skipped

    def intact_origin(self) -> Path | None:
        """The checkpoint of `resume: PATH`, or None. Raises UserError if it is damaged."""
        if self.origin is None:
            return None
        with self._read_errors_reported():
            damage = _damage(Path(self.origin))
        if damage:
            raise UserError(f"resume: {self.origin} is not an intact checkpoint: {damage}")
        return Path(self.origin)

    @contextmanager
    def _read_errors_reported(self) -> Iterator[None]:
        """Context manager that turns an OSError of its body into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: cannot be read ({error.strerror}), but may "
                "belong to the checkpoint to resume from; make it readable or move it, and start "
                "again"
            ) from None

    def require_resumable(self, path: Path) -> Progress:
        """The progress in a checkpoint. Raises UserError if this run cannot resume from it.

        Of the tensor files only the headers are read.
        """
        state = _read_state(path)
        self._require_same_run(path, state)
        self._require_same_tokens(path, state)
        self._require_same_tensors(path)
        progress = read_progress(path)
        self._require_steps_left(path, progress)
        self._best_of_newest = progress.best_step
        return progress

    def _is_of_other_run(self, path: Path) -> bool:
        """Whether a checkpoint belongs to another run folder, which `resume: PATH` allows."""
        return path.resolve().parent != self.folder.resolve()

    def _require_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise UserError if the identity in a checkpoint differs from this run's.

        A checkpoint has a position in the data and in the schedule of its run. For a checkpoint of
        another run both must be equal, so only a change of the base can be accepted.
        """
        accepted = set(self.accepted)
        if self._is_of_other_run(path):
            accepted &= {"base"}
        # `_require_same_tokens` compares the tokens.
        before, now = dict(state["identity"]), asdict(replace(self.identity, tokens=None))
        folder = self.model_folder
        if folder and is_sampled(before["base"]) and is_same_by_samples(before["base"], folder):
            before["base"] = now["base"]
        differences = {
            name: f"{name}: {before.get(name)} -> {value}"
            for name, value in now.items()
            if value is not None and value != before.get(name) and name not in accepted
        }
        if not differences:
            return
        text = f"{path} does not belong to this run: {'; '.join(differences.values())}"
        if self._is_of_other_run(path):
            raise UserError(f"resume: {text}; {_RESUME_IS_SAME_RUN}")
        text = f"output_dir: {text}"
        version = state.get("versions", {}).get("rankzero", __version__)
        remedy = "undo the change or set another output_dir"
        if version != __version__:
            remedy = f"finish it with RankZero {version}, which wrote it, {remedy}"
        if acceptable := [name for name in differences if name != "adapter"]:
            words = [*self.accepted, *acceptable]
            remedy += f", or set accept_changes: [{', '.join(words)}] to accept it"
        raise UserError(f"{text}; {remedy}")

    def _require_same_tokens(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise UserError if the same data and settings now give other tokens.

        The tokens depend on the versions of the tokenising packages, and on the date if the chat
        template writes it. This matters only if the prepared data was lost and prepared again.
        """
        identity, now = state["identity"], self.identity.tokens or {}
        before = identity.get("tokens") or {}
        if isinstance(before, str):  # written before held-out documents were recorded
            before = {identity["data"]: before}
        is_accepted = "data" in self.accepted and not self._is_of_other_run(path)
        changed_splits = [key for key in before if key in now and now[key] != before[key]]
        if not changed_splits or is_accepted:
            return
        data = "training" if identity["data"] in changed_splits else "held-out"
        # package -> version, at the first preparation and at this one
        packages_before = state.get(DATA_MADE_WITH, {})
        packages_now = self.metadata.get(DATA_MADE_WITH, {})
        changed_packages = [
            f"{name} {version} (now {packages_now.get(name)})"
            for name, version in packages_before.items()
            if version != packages_now.get(name)
        ]
        cause = (
            f"they were made with {', '.join(changed_packages)}; install these versions"
            if changed_packages
            else "the chat template may write the date; set it in chat_template_kwargs"
        )
        raise UserError(
            f"{path}: the {data} data was prepared again and its tokens differ from those of this "
            f"run: {cause}, restore {self.folder.parent / 'data'} from a backup, or set "
            "accept_changes: [data] to continue with the new tokens"
        )

    def _require_same_tensors(self, path: Path) -> None:
        """Raise UserError if the adapter's tensors have other names or shapes than this run's.

        Equal values of `Identity.adapter` are not enough, because two choices of target modules may
        have the same number of parameters.
        """
        if self.shapes is None:
            return
        entries = read_header(path / _ADAPTER).entries
        saved = {
            key: entry.shape for key, entry in entries.items() if not _FUSED_EXPERTS.search(key)
        }
        expected = {key: tuple(shape) for key, shape in self.shapes.items()}
        if saved != expected:
            key = min(saved.items() ^ expected.items())[0]
            raise UserError(
                f"{path}: its adapter has other target modules than this run: {key} has shape "
                f"{saved.get(key, '(missing)')} in the checkpoint and "
                f"{expected.get(key, '(missing)')} in this run; restore lora_target_modules; "
                f"{_RESUME_IS_SAME_RUN}"
            )

    def _require_steps_left(self, path: Path, progress: Progress) -> None:
        total = self.identity.total_steps
        if total is None:
            return
        if progress.step > total or (progress.step == total and self._is_of_other_run(path)):
            raise UserError(
                f"{path}: this checkpoint was written at step {progress.step}, but this run ends "
                f"at step {total}, so no step is left; raise epochs or max_steps, or start a new "
                "run in another output_dir"
            )

    def _best_path(self, progress: Progress) -> Path:
        return self.folder / f"best-{progress.best_step:08d}"

    def _prune(self, written: Path, progress: Progress) -> None:
        """Remove the oldest checkpoints beyond the limit, and best adapters that are outdated.

        `written`: the checkpoint that was just written. The checkpoint with the lowest held-out
        loss is never removed. Checkpoints of later steps exist if the run was resumed from an
        earlier step; they are renamed, so that no later start resumes from them.
        """
        best = self.folder / f"step-{progress.best_step:08d}"
        others = [path for path in checkpoints_in(self.folder) if path not in (written, best)]
        older = [path for path in others if path < written]
        surplus = older[: max(0, len(older) - (self.keep - 1))]
        best_adapters = set(checkpoints_in(self.folder, "best"))
        for path in (*surplus, *best_adapters - {self._best_path(progress)}):
            shutil.rmtree(path, ignore_errors=True)  # the next checkpoint tries again
        for path in (path for path in others if path > written):
            with suppress(OSError):
                _rename_skipped(path)
        remove_unfinished_folders(self.folder)

    def _require_space(self, *tensors: Mapping[str, "torch.Tensor"]) -> None:
        """Raise RankZeroError if the disk has too little space for these tensors."""
        need = sum(t.numel() * t.element_size() for group in tensors for t in group.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished_folders(self.folder)  # files of a killed write may take the space
        free = shutil.disk_usage(self.folder).free
        if free < 1.01 * need:
            raise RankZeroError(
                f"{self.folder}: a checkpoint needs {need / 2**20:.1f} MiB, but only "
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

        with atomic_folder(path, check=lambda folder: None) as temporary:
            save_file(dict(weights), temporary / _ADAPTER, metadata={"format": "pt"})
            save_file(dict(moments), temporary / _OPTIMIZER, metadata={"format": "pt"})
            if self.initial:
                save_file(dict(self.initial), temporary / _INITIAL, metadata={"format": "pt"})
            state = {
                "identity": asdict(self.identity),
                "progress": asdict(progress),
                "origin": self.origin,
                **self.metadata,
            }
            (temporary / _STATE).write_text(dump_json(state), encoding="utf-8")
            files = {file.name: _size_and_digest(file) for file in sorted(temporary.iterdir())}
            (temporary / _MANIFEST).write_text(dump_json({"files": files}), encoding="utf-8")


def read_progress(path: Path) -> Progress:
    """The progress in an intact checkpoint. Fields of other versions are ignored."""
    names = {each.name for each in fields(Progress)}
    values = _read_state(path)["progress"]
    return Progress(**{name: value for name, value in values.items() if name in names})


def read_tensors(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
    """The adapter's weights and Adam's moments in an intact checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / _ADAPTER), load_file(path / _OPTIMIZER)


def read_initial(path: Path) -> dict[str, "torch.Tensor"]:
    """The initial LoRA weights A0 and B0 (PiSSA, OLoRA) in an intact checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / _INITIAL)


def computation_changes(
    path: Path, metadata: Mapping[str, Any], *, has_dropout: bool = False
) -> list[str]:
    """Reasons why the results of a resumed run are not bitwise those of an uninterrupted one.

    Each is a text `NAME: BEFORE -> NOW`, for a package version, a fast path (a faster computation
    with slightly different rounding), or the division of a step over ranks, on which the masks of
    dropout depend. A fast path that was off and is off for another reason is not a change.
    `metadata`: entries of state.json in this run's checkpoints. Checkpoints of earlier versions
    have no division, so it is not compared with theirs.
    """
    state = _read_state(path)
    changes = []
    for entry in ("fast_paths", "versions"):
        before, now = state.get(entry, {}), metadata.get(entry, {})
        changes += [
            f"{name}: {before.get(name, 'not used')} -> {value}"
            for name, value in now.items()
            if before.get(name) != value
            and (entry == "versions" or "on" in (before.get(name), value))
        ]
    before, now = state.get(DIVISION, {}), metadata.get(DIVISION, {})
    divided = {name for name in now if before and before.get(name) != now[name]}
    changes += [f"{name}: {before.get(name)} -> {now[name]}" for name in sorted(divided)]
    if has_dropout and divided - {"zero_stage"}:
        changes.append("lora_dropout: the masks depend on this division, so others are drawn")
    return changes


def _rename_skipped(path: Path) -> None:
    """Rename a checkpoint to step-00000200-skipped-1, or to the next number that is free."""
    for number in count(1):
        new_path = path.with_name(f"{path.name}-skipped-{number}")
        if not new_path.exists():
            path.rename(new_path)
            return


def _read_state(path: Path) -> dict[str, Any]:
    return read_json(path / _STATE)


def _size_and_digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _damage(path: Path) -> str | None:
    """Why a checkpoint is not intact; None if it is. Raises OSError if it cannot be read.

    Files that the manifest does not list, such as .DS_Store, are never read, and are allowed.
    """
    if not path.is_dir():
        return "the folder is missing"
    try:
        files = read_json(path / _MANIFEST)["files"]
        if missing := {_ADAPTER, _OPTIMIZER, _STATE} - files.keys():
            return f"its manifest does not list {', '.join(sorted(missing))}"
        for name, size_and_digest in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _size_and_digest(path / name) != size_and_digest:
                return f"{name} differs from its size or SHA-256 in the manifest"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None
