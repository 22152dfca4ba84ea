"""Gathering of adapter weights and Adam moments from a ZeRO engine to rank 0, and restoring them.

Private attributes of DeepSpeed's ZeRO optimizers are used only in this file;
tests/adapter/test_gather.py and tests/train/test_scaler.py detect when they change. Only trainable
parameters are gathered, so at ZeRO-3 the base stays sharded. Facts about DeepSpeed hold for version
0.19.8.
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

MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]

# Attributes with the state of DeepSpeed's DynamicLossScaler (runtime/fp16/loss_scaler.py).
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def gather_weights(parameters: Mapping[str, nn.Parameter], *, keep: bool) -> Tensors:
    """The fp32 master weights on the CPU; empty on ranks without `keep`. Collective."""
    weights: Tensors = {}
    for key, parameter in parameters.items():
        full = safe_get_full_fp32_param(parameter)
        if keep:
            weights[key] = _to_host(full, parameter)
    return weights


def gather_moments(parameters: Mapping[str, nn.Parameter], *, keep: bool) -> Tensors:
    """Adam's moments on the CPU, under `KEY/exp_avg` and `KEY/exp_avg_sq`. Collective.

    Empty on ranks without `keep`. Adam has moments only after its first step.
    """
    moments: Tensors = {}
    for key, parameter in parameters.items():
        for moment in MOMENTS:
            full = safe_get_full_optimizer_state(parameter, moment)
            if keep:
                moments[f"{key}/{moment}"] = _to_host(full, parameter)
    return moments


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Adam's moments and number of steps, and the state of the loss scaler (fp16)."""

    moments: Mapping[str, torch.Tensor]
    step: int
    loss_scaler: Mapping[str, float] = field(default_factory=dict)


def restore(
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, torch.Tensor],
    state: OptimizerState,
) -> None:
    """Load full tensors into a new engine of any ZeRO stage and world size.

    Collective: every rank passes the full tensors.
    """
    zero = engine.optimizer
    is_sharded = engine.zero_optimization_stage() == 3
    masters = _masters(engine)
    _create_optimizer_state(engine, state.step)
    if is_sharded and zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    for key, parameter in parameters.items():
        _set_full(parameter, weights[key], None, is_sharded=is_sharded)
        for moment in MOMENTS:
            _set_full(parameter, state.moments[f"{key}/{moment}"], moment, is_sharded=is_sharded)
    # Update the weights in the training dtype, which still have their initial values.
    if is_sharded:
        for group in range(len(masters)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    else:
        zero.update_lp_params()
    if is_scaled(engine):
        for name, value in state.loss_scaler.items():
            setattr(zero.loss_scaler, name, value)


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
    """Stop DeepSpeed from raising at the smallest loss scale; the loop counts overflows itself."""
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
    zero = engine.optimizer
    is_sharded = engine.zero_optimization_stage() == 3
    masters: list[torch.Tensor] = (
        zero.fp32_partitioned_groups_flat if is_sharded else zero.single_partition_of_fp32_groups
    )
    return masters


def _create_optimizer_state(engine: Any, step: int) -> None:
    zero = engine.optimizer
    _create_adam_state(zero.optimizer, _masters(engine), step)
    if engine.zero_optimization_stage() < 3:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


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
    # The tensor is sliced here, because DeepSpeed's setter for full tensors fails if a shard is
    # padded (stage3.py:3196).
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    rank = torch.distributed.get_rank()
    flat = value.flatten()
    shard = torch.zeros(size, dtype=flat.dtype, device=flat.device)
    own = flat[size * rank : size * (rank + 1)]
    shard[: len(own)] = own
    if moment is None:
        safe_set_local_fp32_param(parameter, shard)
    else:
        safe_set_local_optimizer_state(parameter, shard, moment)


def _to_host(full: torch.Tensor | None, parameter: nn.Parameter) -> torch.Tensor:
    assert full is not None, "not a parameter of a ZeRO optimizer"
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return full.detach().to("cpu", torch.float32, copy=True).reshape(shape)
