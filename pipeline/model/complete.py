"""Check that a checkpoint has every tensor of its model's class, from file headers. No torch.

First names, sizes and number of values in the checkpoint are compared with the ModelShape
(plan/given/shape.py). If they fit, the checkpoint is complete. Otherwise a subprocess with torch
applies transformers' conversion table to the names (checkpoint_names.py), and the result is cached.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.quantised_files import checkpoint_files
from pipeline.plan.given.shape import ModelShape
from pipeline.plan.given.torch_process import (
    cache_file,
    cached_result,
    package_version,
    run_module,
)

_FORMAT = "1"  # of the cached file
_PACKAGES = ("torch", "transformers")
_TIMEOUT_S = 300

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences between a checkpoint and the class of its model.

    `missing`: parameters for which the checkpoint lacks a tensor, or one of several. `unused`:
    tensors of the checkpoint that belong to no parameter. `reshaped`: for each tensor whose shape
    differs from that of its parameter, its name, its shape and the expected shape.
    """

    missing: Sequence[str] = ()
    unused: Sequence[str] = ()
    reshaped: Sequence[tuple[str, Sequence[int], Sequence[int]]] = ()


def require_complete(shape: ModelShape, *, trust_remote_code: bool = False) -> None:
    """Raise UserError if the checkpoint lacks tensors that the model's class needs.

    Nothing is checked in a folder without safetensors files. On a machine without torch, a
    checkpoint that does not fit the ModelShape is not checked either.
    """
    folder = Path(shape.folder)
    if not any(folder.glob("*.safetensors")):
        return
    shapes = {
        name: entry.shape
        for file in checkpoint_files(folder)
        for name, entry in file.entries.items()
    }
    if _fits_model_shape(shape, shapes) or package_version("torch") is None:
        return
    require_no_difference(folder, _difference(folder, shapes, trust_remote_code))


def require_no_difference(folder: Path, difference: Difference) -> None:
    """Raise UserError for tensors that are missing or have another shape."""
    if missing := difference.missing:
        unused = difference.unused
        others = f"they have {unused[0]}, which the model lacks; " if unused else ""
        raise UserError(
            f"model: {folder}: its files lack {len(missing)} of the model's tensors, the first is "
            f"{missing[0]}; {others}download the model again, or rename the tensors"
        )
    for name, stored, expected in difference.reshaped:
        raise UserError(
            f"model: {folder}: the tensor {name} of the checkpoint has the shape "
            f"{_shape_text(stored)}, but according to config.json it is {_shape_text(expected)}; "
            "download config.json and the weights again"
        )


def _shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _fits_model_shape(shape: ModelShape, stored: Shapes) -> bool:
    """Whether the ModelShape alone shows that a checkpoint is complete.

    It must have all linear layers, embeddings and head, and at least as many values as the model
    has parameters. All blocks of a kind must have the same tensors. Outside the blocks there must
    be a tensor besides embeddings and head, because every model has a final norm.
    """
    tied_head = f"{shape.head_name}.weight" if shape.is_tied else ""
    num_values = sum(math.prod(sizes) for name, sizes in stored.items() if name != tied_head)
    in_files = replace(shape, vocab_size=shape.vocab_size - shape.added_rows, added_rows=0)
    if num_values < in_files.parameters:  # there may be more values, such as rotary frequencies
        return False
    linears = {f"{name}.weight": (x.d_out, x.d_in) for name, x in shape.linears.items()}
    if any(stored.get(name) != sizes for name, sizes in linears.items()):
        return False
    modules = {shape.embeddings_name, "" if shape.is_tied else shape.head_name} - {""}
    embeddings_and_head = {f"{name}.weight" for name in modules}
    prefix = f"{shape.layers_name}."
    outside_blocks = {name for name in stored if not name.startswith(prefix)}
    if not embeddings_and_head < outside_blocks:
        return False
    by_block: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name in stored.keys() - outside_blocks:
        index, _, name_in_block = name[len(prefix) :].partition(".")
        by_block[index][name_in_block] = stored[name]
    first_of_kind: dict[int, dict[str, tuple[int, ...]]] = {}
    for layer, kind in enumerate(shape.layer_kinds):
        if first_of_kind.setdefault(kind, by_block[str(layer)]) != by_block[str(layer)]:
            return False
    return True


def _difference(folder: Path, shapes: Shapes, trust_remote_code: bool) -> Difference:
    """The differences that checkpoint_names.py finds, from the cache if possible."""
    files = [folder / "config.json", *(sorted(folder.glob("*.py")) if trust_remote_code else [])]
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    path = cache_file("checkpoints", [_FORMAT, json.dumps(shapes), *contents], _PACKAGES)
    return Difference(**cached_result(path, lambda: _compare(folder, trust_remote_code)))


def _compare(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Run checkpoint_names.py in a subprocess; the result has the fields of Difference."""
    trust = ["--trust-remote-code"] if trust_remote_code else []
    module = "pipeline.model.checkpoint_names"
    try:
        return run_module(module, str(folder), *trust, timeout_s=_TIMEOUT_S)
    except UserError as error:
        raise UserError(
            f"model: {folder}: its tensors cannot be compared with its class: {error}"
        ) from None
