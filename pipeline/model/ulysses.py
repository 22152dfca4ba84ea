"""Ulysses sequence parallelism: attention over sequences that a group of ranks shares.

Outside attention a rank has its part of the tokens and all heads. Within attention it has all
tokens and its share of the heads, so that each document is whole. One all-to-all before the
attention function and one after it convert between the two (DeepSpeed-Ulysses, arXiv 2309.14509).
DeepSpeed's own wrapper is not used, because it requires values as wide as keys.

Letters in shapes: B sequences, P ranks of the group, T tokens of a whole sequence, t = T / P tokens
of a part, H query heads, K key heads, D width of a query or key, V width of a value.
"""

from math import gcd

import torch

from pipeline.cluster.sequence_group import SequenceGroup


def heads_of_whole_sequence(
    group: SequenceGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens of this rank's heads, from this rank's tokens of all heads.

    (B, H, t, D), (B, K, t, D), (B, K, t, V) -> (B, H/P, T, D), (B, K'/P, T, D), (B, K'/P, T, V).
    P divides H. If P does not divide K, each key head is replicated so often that P divides the
    number K' of key heads. Then each rank has the key heads that its query heads need.
    """
    copies = group.size // gcd(group.size, key.shape[1])
    if copies > 1:
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    # One exchange for all three tensors, because each all-to-all has a latency.
    by_rank = [_heads_by_rank(group, tensor) for tensor in (query, key, value)]
    received = group.all_to_all(torch.cat([tensor.flatten(1) for tensor in by_rank], dim=1))
    sizes = [tensor[0].numel() for tensor in by_rank]
    parts = zip(torch.split(received, sizes, dim=1), by_rank, strict=True)
    query, key, value = (  # (P, B, H/P, t, D) -> (B, H/P, T, D)
        part.view(tensor.shape).permute(1, 2, 0, 3, 4).flatten(2, 3) for part, tensor in parts
    )
    return query, key, value


def _heads_by_rank(group: SequenceGroup, tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, t, D) -> (P, B, H/P, t, D): index p has the heads of the group's rank p."""
    batch, heads, *others = tensor.shape
    return tensor.reshape(batch, group.size, heads // group.size, *others).transpose(0, 1)


def tokens_of_all_heads(group: SequenceGroup, output: torch.Tensor) -> torch.Tensor:
    """All heads of this rank's tokens, from all tokens of its heads.

    (B, T, H/P, V) -> (B, t, H, V), contiguous; the inverse of `heads_of_whole_sequence`.
    """
    batch, length, *others = output.shape
    parts = output.reshape(batch, group.size, length // group.size, *others).transpose(0, 1)
    received = group.all_to_all(parts.flatten(1)).view(parts.shape)  # (P, B, t, H/P, V)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()


def of_own_heads(group: SequenceGroup, per_head: torch.Tensor) -> torch.Tensor:
    """The values of this rank's heads, from a tensor (H,) with one value per head."""
    return per_head.chunk(group.size)[group.rank]
