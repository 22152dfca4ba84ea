"""Gather adapter weights and Adam moments from a ZeRO engine to rank 0, and restore them.

Only trainable parameters are gathered, so at ZeRO-3 the base stays sharded. Only this file uses
private attributes of DeepSpeed's ZeRO optimizers (version 0.19.8). tests/adapter/test_gather.py and
tests/train/test_scaler.py fail if DeepSpeed changes these attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names for the moments of a parameter
Tensors = dict[str, torch.Tensor]

# Attributes with the state of DeepSpeed's DynamicLossScaler (runtime/fp16/loss_scaler.py).
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def gather_weights(parameters: Mapping[str, nn.Parameter], *, keep: bool) -> Tensors:
    """The fp32 master weights of all parameters, on the CPU. Collective.

    `parameters`: key in peft's adapter file -> parameter. `keep`: whether this rank wants the
    result, which is otherwise empty.
    """
    weights: Tensors = {}
    for key, parameter in parameters.items():
        full_tensor = safe_get_full_fp32_param(parameter)
        if keep:
            weights[key] = _to_host(full_tensor, parameter)
    return weights


def gather_moments(parameters: Mapping[str, nn.Parameter], *, keep: bool) -> Tensors:
    """Adam's moments on the CPU, under `KEY/exp_avg` and `KEY/exp_avg_sq`. Collective.

    The parameters are those of `gather_weights`. Adam has moments only after its first step.
    """
    moments: Tensors = {}
    for key, parameter in parameters.items():
        for moment in MOMENTS:
            full_tensor = safe_get_full_optimizer_state(parameter, moment)
            if keep:
                moments[f"{key}/{moment}"] = _to_host(full_tensor, parameter)
    return moments


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Adam's moments and number of steps, and the state of the loss scaler (fp16).

    `moments`: as returned by `gather_moments`. `loss_scaler`: as returned by `loss_scaler_state`.
    """

    moments: Mapping[str, torch.Tensor]
    step: int
    loss_scaler: Mapping[str, float] = field(default_factory=dict)


def restore(
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, torch.Tensor],
    state: OptimizerState,
) -> None:
    """Load master weights and optimizer state into a new engine of any ZeRO stage and world size.

    `parameters`, `weights`: as in `gather_weights`. Collective: every rank passes the full tensors.
    """
    zero_optimizer = engine.optimizer
    is_sharded = engine.zero_optimization_stage() == 3
    _create_optimizer_state(engine, state.step)
    # Small parameters that ZeRO-3 keeps gathered (stage3_param_persistence_threshold).
    persistent = zero_optimizer.persistent_parameters if is_sharded else []
    if persistent:
        persistent[0].partition(persistent)
    for key, parameter in parameters.items():
        _set_full(parameter, weights[key], None, is_sharded=is_sharded)
        for moment in MOMENTS:
            _set_full(parameter, state.moments[f"{key}/{moment}"], moment, is_sharded=is_sharded)
    # Copy the masters to the weights in the training dtype, which have their initial values.
    if is_sharded:
        for group in range(len(_masters(engine))):
            zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent:
            persistent[0].all_gather(persistent)
    else:
        zero_optimizer.update_lp_params()
    if is_scaled(engine):
        for name, value in state.loss_scaler.items():
            setattr(zero_optimizer.loss_scaler, name, value)


def is_scaled(engine: Any) -> bool:
    """Whether the engine uses dynamic loss scaling (fp16)."""
    return bool(engine.optimizer.loss_scaler.dynamic)


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """The loss scale and its counters; empty without loss scaling."""
    if not is_scaled(engine):
        return {}
    return {name: getattr(engine.optimizer.loss_scaler, name) for name in _SCALER_STATE}


def is_at_smallest_scale(engine: Any) -> bool:
    """Whether the loss scale cannot be lowered after an overflow; true without loss scaling."""
    scaler = engine.optimizer.loss_scaler
    return not is_scaled(engine) or scaler.cur_scale <= scaler.min_scale


def disable_scale_error(engine: Any) -> None:
    """Stop DeepSpeed from raising at the smallest loss scale; train/loop.py counts overflows."""
    if is_scaled(engine):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False


def create_state_of_groups(engine: Any) -> None:
    """Create Adam's state before the first step if there are several parameter groups.

    At ZeRO-1 and 2 DeepSpeed 0.19.8 links the state of all groups to their parameters after the
    step of the first group (stage_1_and_2.py:2987), when the later groups have no state yet.
    """
    if len(engine.optimizer.param_groups) > 1:
        _create_optimizer_state(engine, step=0)


def _masters(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 master weights, one flat tensor for each parameter group."""
    masters: list[torch.Tensor]
    if engine.zero_optimization_stage() == 3:
        masters = engine.optimizer.fp32_partitioned_groups_flat
    else:
        masters = engine.optimizer.single_partition_of_fp32_groups
    return masters


def _create_optimizer_state(engine: Any, step: int) -> None:
    """Create Adam's state, all zero, after `step` steps; at ZeRO-1 and 2 link it to parameters."""
    zero_optimizer = engine.optimizer
    _create_adam_state(zero_optimizer.optimizer, _masters(engine), step)
    if engine.zero_optimization_stage() < 3:
        zero_optimizer._hp_optimizer_states_linked = False
        zero_optimizer._lazy_init_hp_params_optimizer_state()


def _create_adam_state(adam: torch.optim.Optimizer, masters: list[torch.Tensor], step: int) -> None:
    """Create the state that Adam would create in its first step."""
    for master in masters:
        device = master.device if adam.defaults.get("fused") else torch.device("cpu")
        adam.state[master] = {
            "step": torch.tensor(float(step), device=device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }


def _set_full(
    parameter: nn.Parameter, value: torch.Tensor, moment: str | None, *, is_sharded: bool
) -> None:
    """Set a moment of a parameter, or without `moment` its fp32 master, from the full tensor."""
    value = value.to(parameter.device)
    if not is_sharded:
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
        return
    # This rank's shard is cut out here, because DeepSpeed's setter for full tensors fails if the
    # last shard is padded (stage3.py:3196).
    shard_size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    first = shard_size * torch.distributed.get_rank()
    values = value.flatten()[first : first + shard_size]
    shard = torch.zeros(shard_size, dtype=value.dtype, device=value.device)
    shard[: len(values)] = values
    if moment is None:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, moment)


def _to_host(full_tensor: torch.Tensor | None, parameter: nn.Parameter) -> torch.Tensor:
    """A copy on the CPU in fp32, with the shape of the unsharded parameter."""
    assert full_tensor is not None, "not a parameter of a ZeRO optimizer"
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return full_tensor.detach().to("cpu", torch.float32, copy=True).reshape(shape)
