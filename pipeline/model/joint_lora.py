"""Joint LoRA: layers with the same input multiply it by all of their A matrices at once.

peft computes every adapted layer separately: dropout, product with A, product with B, scaling and
sum. Here the layers that read one input, such as q, k and v, share its dropout and one product with
their concatenated A matrices. For each layer, `addmm` scales the product with B and adds it to the
output of the base layer.

The modules, their parameters and their names stay those of peft; only `forward` is replaced. The
weights of A and B are read without calling their modules, so at ZeRO-3 they must not be sharded.
Dropout is applied without calling its module too: at ZeRO-3 all ranks must call the same modules in
the same order. Dropout runs once for a shared input, else once for each layer; and an input is not
shared if `reshape` has to copy it, which depends on the shape of a rank's batch.
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

    The first layer of the group that is called with an input computes the outputs of A for all
    layers. They are stored until each layer has taken its output.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._input: torch.Tensor | None = None
        self._outputs: dict[Any, torch.Tensor] = {}

    def output_of_a(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """The output of a layer's A for an input (tokens, d_in)."""
        if not self._has_output(layer, x):
            matrices = [each.lora_A[_ADAPTER].weight for each in self._layers]
            joint = F.linear(_dropout(layer, x), _concatenated(matrices))
            outputs = torch.split(joint, [len(matrix) for matrix in matrices], dim=-1)
            self._input, self._outputs = x, dict(zip(self._layers, outputs, strict=True))
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return output

    def _has_output(self, layer: Any, x: torch.Tensor) -> bool:
        """Whether the output of a layer's A for this input has been computed.

        Each layer gets its own view of the input, so memory is compared, not objects.
        `_input` keeps the memory from being reused until all layers have been called.
        """
        last, output = self._input, self._outputs.get(layer)
        if last is None or output is None or output.requires_grad != torch.is_grad_enabled():
            return False
        has_same_layout = x.shape == last.shape and x.stride() == last.stride()
        has_same_values = x.data_ptr() == last.data_ptr() and x._version == last._version
        return has_same_layout and has_same_values


def _dropout(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The input of A: peft has nn.Identity for `lora_dropout: 0`, else nn.Dropout."""
    module = layer.lora_dropout[_ADAPTER]
    if isinstance(module, nn.Identity):
        return x
    return F.dropout(x, module.p, module.training)


def _concatenated(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tuple(matrices)) if len(matrices) > 1 else matrices[0]


def _forward(
    layer: Any, group: _Group, peft_forward: Any, x: torch.Tensor, **arguments: Any
) -> Any:
    """Forward method of an adapted layer.

    `peft_forward`: the layer's forward method in peft, for inputs and states that are not
    supported here.
    """
    b = layer.lora_B[_ADAPTER].weight
    if arguments or layer.disable_adapters or layer.merged or x.dtype != b.dtype:
        return peft_forward(x, **arguments)
    flat = x.reshape(-1, x.shape[-1])
    output = layer.base_layer(flat)
    output = torch.addmm(
        output, group.output_of_a(layer, flat), b.t(), alpha=layer.scaling[_ADAPTER]
    )
    return output.view(*x.shape[:-1], output.shape[-1])
