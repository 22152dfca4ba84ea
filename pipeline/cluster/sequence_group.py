"""Sequence-parallel groups: consecutive ranks that share each sequence.

A group of P ranks splits the tokens of a sequence into P equal parts; rank p of the group holds
part p. In attention the ranks exchange data with all-to-alls, so that each has all tokens of some
heads (model/ulysses.py). DeepSpeed does not know the groups: for DeepSpeed all ranks of the run are
data-parallel.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F


@dataclass(frozen=True)
class SequenceGroup:
    """The sequence-parallel group of this rank.

    `size`: number of ranks in the group. `rank`: index of this rank in the group.
    """

    size: int
    rank: int
    process_group: dist.ProcessGroup

    def local_part(self, tensor: torch.Tensor, padding: float) -> torch.Tensor:
        """This rank's part of a tensor (B, T, ...): B sequences of T tokens.

        Dimension T is padded to a multiple of the group's size with the value `padding`, because an
        all-to-all needs equal numbers of tokens.
        """
        num_missing = -tensor.shape[1] % self.size
        if num_missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, num_missing), value=padding)
        return tensor.chunk(self.size, dim=1)[self.rank]

    def all_to_all(self, sent: torch.Tensor) -> torch.Tensor:
        """Send row p of a tensor (P, N) to rank p of the group; row p of the result is from it."""
        received: torch.Tensor = _AllToAll.apply(sent, self.process_group)  # type: ignore[no-untyped-call]
        return received


class _AllToAll(torch.autograd.Function):
    """Differentiable all-to-all: its gradient is the all-to-all of the gradient.

    torch.distributed.nn has such a function too, but torch 2.13 deprecates it.
    """

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, process_group: dist.ProcessGroup) -> torch.Tensor:
        """Return the rows that the other ranks sent to this one."""
        ctx.process_group = process_group
        return _exchange(sent, process_group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradients of the sent rows to their senders."""
        return _exchange(gradients[0], ctx.process_group), None


def _exchange(sent: torch.Tensor, process_group: dist.ProcessGroup) -> torch.Tensor:
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=process_group)
    return received
