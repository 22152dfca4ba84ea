"""The cheap part of preflight, before torch loads: is everything there that the run will need?"""

import json
import os
import shutil
from pathlib import Path

from pipeline.adapter.fit import read_header
from pipeline.errors import UserError
from pipeline.plan.memory import checkpoint_bytes
from pipeline.plan.plan import Plan

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def check_inputs(plan: Plan) -> None:
    """Raise UserError for a model folder that cannot be loaded or a disk that is too small."""
    folder = Path(plan.settings.model)
    _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"model: {folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    check_output(Path(plan.settings.output_dir))
    _check_disk(plan)


def check_output(folder: Path) -> None:
    """Raise UserError unless the folder can be made and written in."""
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written in" if nearest.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder}: {nearest} {what}; give another folder")


def _nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"model: {folder} holds no weights (*.safetensors)")
        for path in files:
            read_header(path)  # a download that was cut off is known from its header
        return
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


def _check_disk(plan: Plan) -> None:
    parent = _nearest(Path(plan.settings.output_dir))
    each = checkpoint_bytes(plan.trainable)
    # One more checkpoint than is kept while a new one is written, and the adapter.
    need = each * (plan.settings.save_total_limit + 1) + 4 * plan.trainable
    there = Path(plan.settings.output_dir) / "checkpoints"
    need -= sum(path.stat().st_size for path in there.glob("*/*"))  # of an earlier start
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"output_dir: {parent} has {free / 2**20:.0f} MiB free and the run will need "
            f"{need / 2**20:.0f}; free some space or lower save_total_limit"
        )
