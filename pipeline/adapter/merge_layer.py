"""Merging of one LoRA layer with peft's own class, which supports all options of a layer."""

import math
from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from pipeline.adapter.merge_inputs import LayerUpdate

_NAME = "default"


def merge_layer(
    weight: torch.Tensor, update: LayerUpdate, parts: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The merged weight of a linear layer or of experts; `weight` itself is not changed."""
    if update.experts is not None:
        merged = weight.clone()
        scaling = update.alpha / (math.sqrt(update.r) if update.use_rslora else update.r)
        update.experts.add(merged, scaling * parts["A"], parts["B"])
        return merged
    d_out, d_in = weight.shape
    config = LoraConfig(
        use_rslora=update.use_rslora, use_dora="magnitude" in parts, init_lora_weights=False
    )
    with torch.device("meta"):  # saves the initialisation of matrices that are replaced below
        base = nn.Linear(d_in, d_out, bias=False)
        layer = Linear(base, _NAME, config, r=update.r, lora_alpha=update.alpha)  # type: ignore[arg-type]
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.lora_A[_NAME].weight = nn.Parameter(parts["A"])
    layer.lora_B[_NAME].weight = nn.Parameter(parts["B"])
    if "magnitude" in parts:
        layer.lora_magnitude_vector[_NAME].weight = nn.Parameter(parts["magnitude"])
    with torch.no_grad():
        layer.merge()
    return base.weight.data
