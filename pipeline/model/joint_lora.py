"""LoRA layers with the same input, which share one product with their concatenated A matrices.

peft computes every adapted layer by itself: dropout, A, B, scaling and sum. Here the layers that
read one input, such as q, k and v, share its dropout and its product with their A matrices. `addmm`
scales the product with B and adds it to the output of the base layer.

The modules, their parameters and their names stay those of peft; only `forward` is replaced. The A
and B of a layer are read without calling their modules, so at ZeRO-3 they must not be sharded.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.nn import functional as F

from pipeline.plan.given.adapter_counts import input_of

_ADAPTER = "default"  # peft's name of the only adapter


def join_lora(model: PeftModel) -> None:
    """Replace the forward methods of the adapted linear layers."""
    groups: defaultdict[tuple[str, int], list[Any]] = defaultdict(list)
    for name, layer in model.named_modules():
        if _is_plain_lora(layer):
            groups[input_of(name), layer.in_features].append(layer)
    for layers in groups.values():
        group = _Group(layers)
        for layer in layers:
            layer.forward = partial(_forward, layer, group, layer.forward)


def _is_plain_lora(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a LoRA adapter and no variant of it, such as DoRA."""
    return (
        isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and isinstance(module.base_layer, nn.Linear)
        and list(module.lora_A) == [_ADAPTER]
        and not module.lora_variant
        and not module.lora_bias[_ADAPTER]
    )


class _Group:
    """Layers that usually read the same input.

    The first layer that is called with an input computes the outputs of A for all of them.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._input: torch.Tensor | None = None
        self._outputs: dict[Any, torch.Tensor] = {}

    def output_of_a(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """The output of a layer's A for an input (tokens, d_in)."""
        if not self._has_output(layer, x):
            matrices = [each.lora_A[_ADAPTER].weight for each in self._layers]
            joint = F.linear(layer.lora_dropout[_ADAPTER](x), _concatenated(matrices))
            outputs = torch.split(joint, [len(matrix) for matrix in matrices], dim=-1)
            self._input, self._outputs = x, dict(zip(self._layers, outputs, strict=True))
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return output

    def _has_output(self, layer: Any, x: torch.Tensor) -> bool:
        """Whether the output for this input has been computed.

        At ZeRO-3 each layer gets its own view of the input, so memory is compared, not objects.
        The input is kept until all layers have been called, so its memory is not used again.
        """
        known, output = self._input, self._outputs.get(layer)
        return (
            known is not None
            and output is not None
            and output.requires_grad == torch.is_grad_enabled()
            and x.data_ptr() == known.data_ptr()
            and x.shape == known.shape
            and x.stride() == known.stride()
            and x._version == known._version
        )


def _concatenated(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tuple(matrices)) if len(matrices) > 1 else matrices[0]


def _forward(layer: Any, group: _Group, plain: Any, x: torch.Tensor, **arguments: Any) -> Any:
    """The output of an adapted layer; replaces the `plain` forward method of peft."""
    b = layer.lora_B[_ADAPTER].weight
    if arguments or layer.disable_adapters or layer.merged or x.dtype != b.dtype:
        return plain(x, **arguments)
    flat = x.reshape(-1, x.shape[-1])
    output = layer.base_layer(flat)
    output = torch.addmm(
        output, group.output_of_a(layer, flat), b.t(), alpha=layer.scaling[_ADAPTER]
    )
    return output.view(*x.shape[:-1], output.shape[-1])
