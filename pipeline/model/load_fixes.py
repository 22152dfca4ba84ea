"""Corrections of errors in transformers 5.23, active while a checkpoint is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def corrected_loading(tensors: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Within this context, transformers does not change weights after it has loaded them.

    `tensors`: name -> tensor, used instead of the tensors in the checkpoint's files.
    """

    def load(model: Any, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        return _load(model, state_dict if tensors is None else tensors, *arguments, **options)

    with (
        patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load)),
        patch.object(PreTrainedModel, "_initialize_weights", _initialize_missing_weights),
    ):
        yield


_initialize_weights = PreTrainedModel._initialize_weights
_load = PreTrainedModel._load_pretrained_model


def _initialize_missing_weights(
    model: PreTrainedModel, module: nn.Module, is_custom_code: bool = False
) -> None:
    """Initialize a module, unless all of its tensors were loaded.

    transformers relies on functions that skip loaded parameters. A class that writes to a slice of
    a parameter bypasses them: Youtu sets the embedding of the padding token to zero, and fails at
    ZeRO-3, where the parameter is empty (models/youtu/modeling_youtu.py:464).
    """
    has_children = any(True for _ in module.children())
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    is_loaded = all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
    if has_children or not tensors or not is_loaded:
        _initialize_weights(model, module, is_custom_code)
