"""The cheap part of preflight, before torch loads: is everything there that the run will need?"""

import json
import shutil
from pathlib import Path

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
    _check_disk(plan)


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"model: {folder} holds no weights (*.safetensors)")
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


def _check_disk(plan: Plan) -> None:
    parent = Path(plan.settings.output_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    each = checkpoint_bytes(plan.trainable)
    # One more checkpoint than is kept while a new one is written, and the adapter.
    need = each * (plan.settings.save_total_limit + 1) + 4 * plan.trainable
    there = Path(plan.settings.output_dir) / "checkpoints"
    need -= sum(path.stat().st_size for path in there.glob("*/*"))  # of an earlier start
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"output_dir: {parent} has {free / 2**30:.1f} GiB free and the run will need "
            f"{need / 2**30:.1f}; free some space or lower save_total_limit"
        )
