"""Names under which a model's weights are stored, where the model's own names for them differ.

transformers renames weights while it loads a checkpoint (Gemma 3, Mistral 3, Nemotron-H) and makes
some parameters of several stored tensors (fused experts). Here its own conversion table is applied
to the names only; the model is built on the meta device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from pipeline.model.base import auto_class


@dataclass(frozen=True)
class StoredAs:
    """The tensors of a checkpoint that one parameter is made of, in the order of the files.

    `converter`: None if it is one tensor that is used as it is.
    """

    keys: tuple[str, ...]
    converter: WeightConverter | None = None


def model_on_meta(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder on the meta device, without weights."""
    options = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    with torch.device("meta"):
        return auto_class(folder, trust_remote_code).from_config(config, **options)


def stored_names(model: Any, keys: Iterable[str]) -> dict[str, StoredAs]:
    """For each parameter of a model, those of a checkpoint's keys that it is made of.

    The order of the steps is that of transformers 5.23, core_model_loading.py.
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
            continue  # such as a vision tower that a text model's class does not have
        before = stored[name].keys if name in stored else ()
        stored[name] = StoredAs((*before, key), by_pattern[pattern] if pattern else None)
    return stored
