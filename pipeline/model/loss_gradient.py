"""Summed cross-entropy whose gradient is computed in the forward pass.

The head is frozen, so the gradient of the loss with respect to the hidden states is known as soon
as the logits are. It is computed chunk by chunk together with the loss. Then no logits are saved
for the backward pass, and none are computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


def sum_with_gradient(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    num_chunks: int,
) -> torch.Tensor:
    """The summed loss of hidden states (S, D) with targets (S,), in fp32.

    `logits_of` returns the logits (S, V) of hidden states. The parameters that it uses (the head)
    get no gradient.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    gradient = torch.empty_like(hidden)
    inputs = (hidden.detach(), targets, gradient)
    for chunk in zip(*(tensor.tensor_split(num_chunks) for tensor in inputs), strict=True):
        chunk_hidden, chunk_targets, chunk_gradient = chunk
        with torch.enable_grad():
            logits = logits_of(chunk_hidden.requires_grad_())
        chunk_loss, logits_gradient = _cross_entropy(logits.detach(), chunk_targets)
        total += chunk_loss
        (hidden_gradient,) = torch.autograd.grad(logits, chunk_hidden, logits_gradient)
        chunk_gradient.copy_(hidden_gradient)
    loss: torch.Tensor = _KnownGradient.apply(hidden, total, gradient)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy in fp32, and its gradient with respect to the logits.

    The gradient is the softmax, minus 1 at the target. It is computed in the tensor of the
    log-softmax, so that only one fp32 tensor of the size of the logits is allocated.
    """
    rows = torch.arange(len(targets), device=logits.device)
    values = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -values[rows, targets].sum()
    values.exp_()
    values[rows, targets] -= 1
    return loss, values.to(logits.dtype)


class _KnownGradient(torch.autograd.Function):
    """A loss that has been computed together with its gradient with respect to `hidden`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss."""
        del hidden
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient, times the gradient of the loss."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None
