"""Tiled MLPs: the MLP of a block computes its tokens in tiles, so that few of its tensors exist.

An MLP treats each token separately, so the result does not depend on the tiles. DeepSpeed 0.19.8
has the same idea (runtime/sequence_parallel/ulysses_sp.py TiledMLP), but it restores no random
state, so that dropout would differ between the forward and the backward pass, and it accumulates
the gradients of adapters in the training dtype. Here they are summed in fp32.
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

    Returns the new methods. The number of tiles does not depend on the sequence: at ZeRO-3 each
    tile gathers the MLP, and all ranks must gather it equally often.
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

    `is_tiled`: False in the steps of generation, which have one token on every rank. The length
    cannot decide this, because other batches of one token run beside longer ones of other ranks.
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
        if length < self._num_tiles:  # a tile without tokens would not gather at ZeRO-3
            hidden = nn.functional.pad(hidden, (0, 0, 0, self._num_tiles - length))
        weights = [p for p in self._mlp.parameters() if p.requires_grad]
        arguments = (self._forward, self._num_tiles, self._is_random, hidden, *weights)
        output = _TiledFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return output[:, :length]  # type: ignore[no-any-return]


class _TiledFunction(torch.autograd.Function):
    """Applies a function to tiles; the backward pass computes each tile again.

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
        for tile, part in zip(
            hidden.tensor_split(num_tiles, 1), output.tensor_split(num_tiles, 1), strict=True
        ):
            part.copy_(function(tile))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (hidden,), (gradient,) = ctx.saved_tensors, gradients
        needs_hidden, weights = ctx.needs_input_grad[3], ctx.weights
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        devices = [hidden.device] if hidden.is_cuda else []
        is_random = bool(ctx.random_state)
        with torch.random.fork_rng(devices, enabled=is_random), torch.enable_grad():
            _set_random_state(hidden.device, ctx.random_state)
            parts: Sequence[Any] = [None] * ctx.num_tiles
            if of_hidden is not None:
                parts = of_hidden.tensor_split(ctx.num_tiles, 1)
            tiles = hidden.tensor_split(ctx.num_tiles, 1)
            of_tiles = gradient.tensor_split(ctx.num_tiles, 1)
            for tile, of_tile, part in zip(tiles, of_tiles, parts, strict=True):
                # ZeRO-3's hooks release an MLP's weights only if its input needs a gradient.
                leaf = tile.detach().requires_grad_(True)
                results = torch.autograd.grad(ctx.function(leaf), [leaf, *weights], of_tile)
                if part is not None:
                    part.copy_(results[0])
                for total, result in zip(sums, results[1:], strict=True):
                    total.add_(result)
                del leaf, results
        typed = [total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)]
        return None, None, None, of_hidden, *typed


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """State of the random numbers of the CPU and, on a GPU, of the device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    if not states:
        return
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
