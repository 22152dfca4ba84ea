"""Tiled MLPs: an MLP computes a sequence in tiles, one after another, to save memory.

An MLP treats each token separately, so the result does not depend on the tiles. Only the tensors of
one tile exist at a time.

DeepSpeed 0.19.8 has tiled MLPs too (runtime/sequence_parallel/ulysses_sp.py TiledMLP). They are not
used for two reasons. They restore no random state, so dropout would differ between the forward and
the backward pass. And they sum the gradients of adapters in the training dtype, here in fp32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pipeline.model.structure import blocks
from pipeline.plan.plan import Plan


def tile_mlps(causal: Any, plan: Plan) -> list["TiledForward"]:
    """Replace the forward methods of the blocks' MLPs, if the plan has more than one tile.

    Returns the new methods. The number of tiles is the same for all sequences: at ZeRO-3 each tile
    gathers the MLP, and all ranks must gather it equally often.
    """
    if plan.layout.mlp_tiles == 1:
        return []
    shape, methods = plan.shape, []
    for layer, kind in zip(blocks(causal), shape.layer_kinds, strict=True):
        if shape.blocks[kind].has_tileable_mlp:
            mlp: Any = layer.mlp
            mlp.forward = TiledForward(mlp, plan.layout.mlp_tiles)
            methods.append(mlp.forward)
    return methods


class TiledForward:
    """The forward method of an MLP, from hidden states (B, T, D) to hidden states (B, T, D).

    `is_tiled`: the caller sets it to False for the steps of generation that compute one token on
    every rank. A batch of one token may also be a training batch, whose other ranks have longer
    ones; it must be tiled like those.
    """

    is_tiled = True

    def __init__(self, mlp: Any, num_tiles: int) -> None:
        self._mlp, self._forward, self._num_tiles = mlp, mlp.forward, num_tiles
        dropouts = (module for module in mlp.modules() if isinstance(module, _DropoutNd))
        self._is_random = any(module.p > 0 for module in dropouts)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the MLP, computed in tiles of the T dimension."""
        length = hidden.shape[1]
        if not self.is_tiled:
            return self._forward(hidden)  # type: ignore[no-any-return]
        if length < self._num_tiles:  # at ZeRO-3 a tile without tokens would not gather the MLP
            hidden = nn.functional.pad(hidden, (0, 0, 0, self._num_tiles - length))
        weights = [p for p in self._mlp.parameters() if p.requires_grad]
        arguments = (self._forward, self._num_tiles, self._is_random, hidden, *weights)
        output = _TiledFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return output[:, :length]  # type: ignore[no-any-return]


class _TiledFunction(torch.autograd.Function):
    """Applies a function to tiles; the backward pass computes the forward pass of each tile again.

    A tile of several sequences is copied into contiguous memory: else each layer of the MLP would
    copy it, and joint LoRA would see a different input in each.

    The trainable weights are arguments, so that the autograd of the caller accumulates their
    gradients once, after the last tile. DeepSpeed reduces a gradient when it is accumulated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Any,
        num_tiles: int,
        is_random: bool,
        hidden: torch.Tensor,
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        ctx.function, ctx.num_tiles, ctx.weights = function, num_tiles, weights
        # Reading the state of a GPU's random numbers makes the host wait for the GPU.
        ctx.random_state = _random_state(hidden.device) if is_random else []
        ctx.save_for_backward(hidden)
        output = torch.empty_like(hidden)
        tiles, output_tiles = hidden.tensor_split(num_tiles, 1), output.tensor_split(num_tiles, 1)
        for tile, output_tile in zip(tiles, output_tiles, strict=True):
            output_tile.copy_(function(tile.contiguous()))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (hidden,), (gradient,) = ctx.saved_tensors, gradients
        needs_hidden_gradient, weights = ctx.needs_input_grad[3], ctx.weights
        hidden_gradient = torch.empty_like(hidden) if needs_hidden_gradient else None
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        devices = [hidden.device] if hidden.is_cuda else []
        is_random = bool(ctx.random_state)
        with torch.random.fork_rng(devices, enabled=is_random), torch.enable_grad():
            _set_random_state(hidden.device, ctx.random_state)
            hidden_gradients: Sequence[Any] = [None] * ctx.num_tiles
            if hidden_gradient is not None:
                hidden_gradients = hidden_gradient.tensor_split(ctx.num_tiles, 1)
            tiles = hidden.tensor_split(ctx.num_tiles, 1)
            output_gradients = gradient.tensor_split(ctx.num_tiles, 1)
            for tile, output_gradient, target in zip(
                tiles, output_gradients, hidden_gradients, strict=True
            ):
                # ZeRO-3's hooks release an MLP's weights only if its input needs a gradient.
                leaf = tile.detach().contiguous().requires_grad_(True)
                results = torch.autograd.grad(ctx.function(leaf), [leaf, *weights], output_gradient)
                if target is not None:
                    target.copy_(results[0])
                for total, result in zip(sums, results[1:], strict=True):
                    total.add_(result)
                del leaf, results
        typed = [total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)]
        return None, None, None, hidden_gradient, *typed


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """State of the random numbers of the CPU and, on a GPU, of the device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Set the result of `_random_state`; an empty list changes nothing."""
    if not states:
        return
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
