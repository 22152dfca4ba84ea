"""NEFTune: uniform noise on the embeddings in training (Jain et al., arXiv 2310.05914)."""

import math
from typing import Any

import torch
from torch import nn

from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.model.attention import Documents


class EmbeddingNoise:
    """A forward hook that adds noise of at most alpha / sqrt(L D) to an embedding's output.

    L is the length of the token's own document, not of its pack; D is the hidden size. There is no
    noise on padding, and none in evaluation mode. The noise comes from torch's generator, which is
    seeded before each forward pass, as for dropout. `documents` must be set before each forward.
    If a group of ranks shares each sequence, the embedding has this rank's part of the tokens.

    It must be registered after `deepspeed.initialize` (see `remove_input_gradients` in base.py).
    """

    def __init__(
        self, embeddings: nn.Module, alpha: float, group: SequenceGroup | None = None
    ) -> None:
        self.documents: Documents = ()
        self._group = group
        self._alpha = alpha
        embeddings.register_forward_hook(self._add_noise)

    def _add_noise(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        del inputs
        if not module.training:
            return output
        rows, length, hidden_size = output.shape
        scale = torch.zeros(rows, length * (1 if self._group is None else self._group.size))
        for row, lengths in enumerate(self.documents):
            scales = [self._alpha / math.sqrt(tokens * hidden_size) for tokens in lengths]
            counts = torch.tensor(lengths)
            scale[row, : sum(lengths)] = torch.tensor(scales).repeat_interleave(counts)
        if self._group is not None:
            scale = self._group.part(scale, 0)
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * scale[..., None].to(output)
