"""Names of a model's parameters in its checkpoint, which may differ from their names in memory.

transformers renames tensors while it loads a checkpoint (Gemma 3, Mistral 3, Nemotron-H). It builds
some parameters from several tensors, for example the tensor of all experts of a block. This module
applies transformers' conversion table to the names only, with the model on the meta device.

    python -m pipeline.model.checkpoint_names MODEL_FOLDER [--trust-remote-code]

prints the differences between a checkpoint and its class, for complete.py.
"""

import copy
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from pipeline.model.base import auto_class, model_config
from pipeline.model.complete import Difference
from pipeline.model.quantised_files import checkpoint_files


@dataclass(frozen=True)
class StoredAs:
    """The checkpoint's tensors from which a parameter is built.

    `keys`: names of these tensors, in the order in which the checkpoint's files hold them.
    `converter`: transformers' conversion; None if the parameter is one tensor, unchanged.
    `patterns`: for each key, the converter's pattern that matches it.
    """

    keys: tuple[str, ...]
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()


def model_on_meta(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder on the meta device, without weights."""
    config = model_config(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return auto_class(folder, trust_remote_code).from_config(
            config, trust_remote_code=trust_remote_code
        )


def stored_names(model: Any, keys: Iterable[str]) -> dict[str, StoredAs]:
    """Name of a parameter -> the checkpoint's tensors from which it is built.

    `keys`: names of the tensors in the checkpoint. The steps follow transformers 5.23,
    core_model_loading.py.
    """
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parameters: dict[str, Any] = model.state_dict()
    stored: dict[str, StoredAs] = {}
    for key in keys:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, parameters
        )
        if name not in parameters and key in parameters:
            name, pattern = key, None
        if name not in parameters:
            continue  # not in this class; for example, a text model does not load the vision tower
        earlier = stored.get(name, StoredAs(()))
        stored[name] = StoredAs(
            (*earlier.keys, key),
            by_pattern[pattern] if pattern else None,
            (*earlier.patterns, pattern or ""),
        )
    return stored


def built_parameter(
    model: Any, name: str, stored: StoredAs, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The parameter that transformers builds from stored tensors with a converter."""
    converter = copy.deepcopy(stored.converter)
    assert converter is not None
    for key, pattern in zip(stored.keys, stored.patterns, strict=True):
        converter.add_tensor(name, key, pattern, tensors[key])  # type: ignore[arg-type]
    built: Any = converter.convert(name, model=model, config=model.config)[name]
    parameter: torch.Tensor = built[0] if isinstance(built, list) else built
    return parameter


def difference(folder: Path, *, trust_remote_code: bool = False) -> Difference:
    """The differences between the checkpoint in a folder and the class of its model."""
    model = model_on_meta(folder, trust_remote_code=trust_remote_code)
    shapes = {
        name: entry.shape
        for file in checkpoint_files(folder)
        for name, entry in file.entries.items()
    }
    stored = stored_names(model, shapes)
    tied: dict[str, str] = model.all_tied_weights_keys
    tied_with = {other: name for name, other in tied.items()} | tied
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "(?!)")
    parameters = model.state_dict()
    used, incomplete, reshaped = set[str](), set[str](), []
    for name, stored_as in stored.items():
        used |= set(stored_as.keys)
        key, expected = stored_as.keys[0], tuple(parameters[name].shape)
        if stored_as.converter is None:
            if shapes[key] != expected:
                reshaped.append((key, shapes[key], expected))
        elif not _is_complete(model, name, stored_as, shapes):
            incomplete.add(name)

    def is_missing(name: str) -> bool:
        is_stored = name in stored or tied_with.get(name) in stored
        return name in incomplete or not (is_stored or ignored.search(name))

    return Difference(
        missing=[name for name in parameters if is_missing(name)],
        unused=[key for key in shapes if key not in used],
        reshaped=reshaped,
    )


def _is_complete(
    model: Any, name: str, stored: StoredAs, shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether the checkpoint has all tensors from which transformers builds a parameter."""
    tensors = {key: torch.empty(shapes[key], device="meta") for key in stored.keys}
    try:
        built = built_parameter(model, name, stored, tensors)
    except (RuntimeError, ValueError, KeyError, IndexError):  # of a conversion that lacks an input
        return False
    return bool(built.shape == model.get_parameter_or_buffer(name).shape)


if __name__ == "__main__":
    trust = "--trust-remote-code" in sys.argv
    result = difference(Path(sys.argv[1]), trust_remote_code=trust)
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
