"""Check that a checkpoint has every tensor of its model's class, from headers alone. No torch.

A checkpoint whose names are those of the model's shape needs no more. For any other, a subprocess
with torch applies transformers' conversion table to the names, and the result is cached.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.packed_files import checkpoint_files
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

    `missing`: parameters that no tensor of the checkpoint belongs to. `unused`: tensors that belong
    to no parameter. `reshaped`: for tensors of another shape, name, shape and expected shape.
    """

    missing: Sequence[str] = ()
    unused: Sequence[str] = ()
    reshaped: Sequence[tuple[str, Sequence[int], Sequence[int]]] = ()


def require_complete(shape: ModelShape, *, trust_remote_code: bool = False) -> None:
    """Raise UserError if the checkpoint lacks tensors that the model's class needs.

    A folder without weights, or a machine without torch, is not checked beyond what needs neither.
    """
    folder = Path(shape.folder)
    if not any(folder.glob("*.safetensors")):
        return
    shapes = {
        name: entry.shape
        for file in checkpoint_files(folder)
        for name, entry in file.entries.items()
    }
    if _has_names_of_shape(shape, shapes) or package_version("torch") is None:
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
            f"model: {folder}: the tensor {name} of the checkpoint has another shape "
            f"({_text(stored)}) than in config.json ({_text(expected)}); download both again"
        )


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _has_names_of_shape(shape: ModelShape, stored: Shapes) -> bool:
    """Whether a checkpoint has all linear layers, embeddings and head, and enough values in all.

    All blocks of a kind must have the same tensors, and one tensor must be left for the final norm.
    """
    tied_head = f"{shape.head_name}.weight" if shape.is_tied else ""
    parameters = sum(math.prod(each) for name, each in stored.items() if name != tied_head)
    in_files = replace(shape, vocab_size=shape.vocab_size - shape.added_rows, added_rows=0)
    if parameters < in_files.parameters:  # there may be more, such as rotary frequencies
        return False
    expected = {f"{n}.weight": (x.d_out, x.d_in) for n, x in shape.linears.items()}
    outside = {shape.embeddings_name, "" if shape.is_tied else shape.head_name} - {""}
    names = {f"{name}.weight" for name in outside}
    if not names <= stored.keys() or any(stored.get(n) != each for n, each in expected.items()):
        return False
    prefix = f"{shape.layers_name}."
    in_block: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, each in stored.items():
        if name.startswith(prefix):
            index, _, end = name[len(prefix) :].partition(".")
            in_block[index][end] = each
        else:
            names.add(name)
    first: dict[int, dict[str, tuple[int, ...]]] = {}
    for layer, kind in enumerate(shape.layer_kinds):
        if first.setdefault(kind, in_block[str(layer)]) != in_block[str(layer)]:
            return False
    return len(names) > len(outside)


def _difference(folder: Path, shapes: Shapes, trust_remote_code: bool) -> Difference:
    """The differences by transformers' conversion table, from the cache if possible."""
    files = [folder / "config.json", *(sorted(folder.glob("*.py")) if trust_remote_code else [])]
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    path = cache_file("checkpoints", [_FORMAT, json.dumps(shapes), *contents], _PACKAGES)
    return Difference(**cached_result(path, lambda: _compare(folder, trust_remote_code)))


def _compare(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The fields of the difference, which a subprocess computes."""
    trust = ["--trust-remote-code"] if trust_remote_code else []
    module = "pipeline.model.checkpoint_names"
    try:
        return run_module(module, str(folder), *trust, timeout_s=_TIMEOUT_S)
    except UserError as error:
        raise UserError(
            f"model: {folder}: its tensors cannot be compared with its class: {error}"
        ) from None
