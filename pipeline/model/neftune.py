"""NEFTune: uniform noise on the embeddings in training (Jain et al., arXiv 2310.05914)."""

import math
from typing import Any

import torch
from torch import nn

from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.model.attention import Documents


class EmbeddingNoise:
    """A forward hook that adds noise of at most alpha / sqrt(L D) to an embedding's output.

    L is the length of the token's document, also in a packed sequence; D is the hidden size. There
    is no noise on padding, and none in evaluation mode. The noise comes from torch's generator,
    which is seeded before each forward pass, as for dropout.

    `documents`: lengths of the documents of each row; must be set before each forward pass. If a
    group of ranks shares each sequence, the embedding's output has this rank's part of the tokens.
    The hook must be registered after `deepspeed.initialize`, because `remove_input_gradients`
    (base.py) removes earlier ones.
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
        whole_length = length * (1 if self._group is None else self._group.size)
        max_noise = torch.zeros(rows, whole_length)  # of each token
        for row, lengths in enumerate(self.documents):
            of_documents = [self._alpha / math.sqrt(tokens * hidden_size) for tokens in lengths]
            per_token = torch.tensor(of_documents).repeat_interleave(torch.tensor(lengths))
            max_noise[row, : sum(lengths)] = per_token
        if self._group is not None:
            max_noise = self._group.local_part(max_noise, 0)
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * max_noise[..., None].to(output)
