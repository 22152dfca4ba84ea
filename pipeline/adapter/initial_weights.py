"""Weights of an initial adapter, resized to the r and scaling of a run without changing outputs."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from pipeline.adapter.adapter_file import Adapter
from pipeline.plan.given.adapter_counts import adapted_layers
from pipeline.plan.plan import Plan


def initial_weights(
    adapter: Adapter, plan: Plan, fresh: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The fp32 weights for a run that starts from an adapter, by key.

    `fresh`: the weights that the run would have without an initial adapter. If r is larger in the
    run, the additional rows of A are those of `fresh`, and the additional columns of B are zero. If
    the scaling differs, B is rescaled. DoRA's magnitudes, rows of new tokens, and modules
    that are trained in full get the adapter's values.
    """
    loaded = load_file(adapter.file.path)
    weights: dict[str, torch.Tensor] = {}
    for layer in adapted_layers(plan.shape, plan.settings):
        update = adapter.layer_updates[f"{layer.name}.weight"]
        prefix = f"base_model.model.{layer.name}"
        key_a, key_b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        a = fresh[key_a].float().clone()
        b = torch.zeros_like(fresh[key_b], dtype=torch.float32)
        a[: update.r] = loaded[key_a]
        b[:, : update.r] = loaded[key_b].float() * (update.scaling / layer.scaling)
        weights |= {key_a: a, key_b: b}
    return weights | {key: loaded[key].float() for key in fresh if key not in weights}
