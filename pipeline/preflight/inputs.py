"""Is everything there that the run reads and writes? Before torch loads."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.tensor_files import read_header
from pipeline.plan.cost.memory import disk_bytes
from pipeline.preflight.check import Finding, ProbeResults, in_units, ok, warn
from pipeline.preflight.context import RankContext

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_MIB = 2**20


def probe_model(context: RankContext) -> dict[str, Any]:
    """Weight files and their bytes. Raises UserError for a model folder that cannot be loaded."""
    folder = context.known_settings.model_folder
    files = _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model: {folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
            "copy the model's tokenizer files there"
        )
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def assess_model(seen: ProbeResults) -> Iterable[Finding]:
    """Every machine has it whole, or probe_model has raised."""
    first = next(iter(seen.answers.values()))
    each = " on each machine" if len(seen.answers) > 1 else ""
    files = "1 weight file" if first["files"] == 1 else f"{first['files']} weight files"
    yield ok(f"{files}, {in_units(first['bytes'])}, and a tokenizer{each}")


def probe_disk(context: RankContext) -> dict[str, int]:
    """Bytes free where the run writes and bytes that it will need.

    Raises UserError for a folder that cannot be written in or that is too small for checkpoints.
    """
    plan, folder = context.known_plan, context.folder
    check_output(folder)
    parent = nearest(folder)
    predicted = disk_bytes(plan.shape, plan.settings)
    need = predicted["checkpoints"] + predicted["adapter"]
    # What an earlier start has left is there already; a user's own copies, of other names, stay.
    for kind in ("step", "best"):
        left = (folder / "checkpoints").glob(f"{kind}-{8 * '[0-9]'}/*")
        need -= sum(path.stat().st_size for path in left)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"output_dir: {parent} has {free / _MIB:.0f} MiB free and the run will need "
            f"{need / _MIB:.0f}; free some space or lower save_total_limit"
        )
    return {"free": free, "need": max(0, need), "merged": predicted["merged"]}


def assess_disk(seen: ProbeResults) -> Iterable[Finding]:
    """Room for checkpoints is there, or probe_disk has raised; merging comes later."""
    (disk,) = seen.answers.values()
    free, need, merged = (in_units(disk[name]) for name in ("free", "need", "merged"))
    if disk["free"] < disk["need"] + disk["merged"]:
        yield warn(
            f"{free} free: enough for the run ({need}), not for merging after it ({merged} more)",
            "free some space before launch/merge.py, or merge on another disk",
        )
    else:
        yield ok(f"{free} free; the run needs {need}, merging {merged} more")


def check_output(folder: Path) -> None:
    """Raise UserError unless the folder can be made and written in."""
    there = nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written in" if there.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder}: {there} {what}; give another folder")


def nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there


def _check_weights(folder: Path) -> list[Path]:
    """The weight files, each with a header that can be read."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"model: {folder} holds no weights (*.safetensors); download the model again"
            )
        for path in files:
            read_header(path)  # a download that was cut off is known from its header
        return files
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"model: {index}: not a readable index: {error!r}") from None
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise UserError(
            f"model: {folder}: {len(missing)} of {len(named)} weight files are missing, "
            f"the first is {missing[0]}; download the model again"
        )
    for name in sorted(named):
        read_header(folder / name)
    return [folder / name for name in sorted(named)]
