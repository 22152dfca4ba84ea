"""Corrections of errors in transformers 5.23 that are active while it loads a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


@contextmanager
def corrected_loading(tensors: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Keep loaded weights as they are stored, and convert tensors correctly at ZeRO-3.

    `tensors`: name -> tensor, used instead of the tensors in the checkpoint's files.
    """

    def load(model: Any, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        return _load(model, state_dict if tensors is None else tensors, *arguments, **options)

    with (
        patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load)),
        patch.object(PreTrainedModel, "_initialize_weights", _initialize_missing_weights),
        patch.object(WeightConverter, "convert", _convert_with_full_shapes),
    ):
        yield


_initialize_weights = PreTrainedModel._initialize_weights
_convert = WeightConverter.convert
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


def _convert_with_full_shapes(
    converter: WeightConverter, layer_name: str, model: Any = None, **options: Any
) -> Any:
    """Convert tensors of a checkpoint for a model whose parameters ZeRO-3 may have sharded.

    Some conversions compare a tensor with the parameter's shape, which is (0,) while sharded:
    Qwen3-VL's experts were transposed wrongly (core_model_loading.py, Transpose).
    """
    is_sharded: bool = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    return _convert(converter, layer_name, _FullShapes(model) if is_sharded else model, **options)


class _FullShapes:
    """A model whose parameters have their shapes before sharding."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """The parameter, or a tensor of its shape without values if ZeRO-3 sharded it."""
        parameter: Any = self._model.get_parameter(name)
        if hasattr(parameter, "ds_shape"):
            return torch.empty(parameter.ds_shape, dtype=parameter.dtype, device="meta")
        return parameter  # type: ignore[no-any-return]
