"""Weights of an initial adapter, resized to the r and scaling of a run without changing outputs."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from pipeline.adapter.adapter_file import Adapter, current_key
from pipeline.adapter.initial import initial_layers, initial_update
from pipeline.errors import UserError
from pipeline.plan.given.adapter_counts import AdaptedLayer
from pipeline.plan.plan import Plan


def initial_weights(
    adapter: Adapter, plan: Plan, fresh: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The fp32 weights for a run that starts from an adapter, by key.

    `fresh`: the weights that the run would have without an initial adapter. If r is larger in the
    run, the additional rows of A are those of `fresh`, and the additional columns of B are zero. If
    the scaling differs, B is rescaled. DoRA's magnitudes, rows of new tokens, and modules
    that are trained in full get the adapter's values. Raises UserError if a value of the adapter is
    not finite.
    """
    loaded = {current_key(key): value for key, value in load_file(adapter.file.path).items()}
    for key, value in loaded.items():
        if not value.isfinite().all():
            raise UserError(
                f"init_adapter: {adapter.file.path}: {key} has values that are not finite; start "
                "from another checkpoint of the run that trained it"
            )
    weights: dict[str, torch.Tensor] = {}
    for name, layer in initial_layers(plan).items():
        update = initial_update(adapter, name, layer)
        prefix = f"base_model.model.{name}"
        key_a, key_b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        a = fresh[key_a].float().clone()
        b = torch.zeros_like(fresh[key_b], dtype=torch.float32)
        ratio = update.scaling / layer.scaling
        _a_of_experts(a, layer)[:, : update.r] = _a_of_experts(loaded[key_a], layer)
        _b_of_experts(b, layer)[:, : update.r] = _b_of_experts(loaded[key_b].float() * ratio, layer)
        weights |= {key_a: a, key_b: b}
    return weights | {key: loaded[key].float() for key in fresh if key not in weights}


def _a_of_experts(a: torch.Tensor, layer: AdaptedLayer) -> torch.Tensor:
    """View of A as (experts, r, d_in), as peft's ParamWrapper divides it."""
    return a.view(layer.num_experts, -1, a.shape[1])


def _b_of_experts(b: torch.Tensor, layer: AdaptedLayer) -> torch.Tensor:
    """View of B as (d_out, r, experts), as peft's ParamWrapper divides it."""
    return b.view(b.shape[0], -1, layer.num_experts)
