"""Token-summed cross-entropy on the supervised positions only, in chunks.

B: sequences, T: tokens, D: hidden size, V: vocabulary, S: supervised positions of the batch.
"""

import math
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.model.attention import Documents, arguments_for
from pipeline.plan.cost.activations import LOGITS_CHUNK_BYTES
from pipeline.plan.plan import Plan

IGNORED = -100


class SummedLoss(nn.Module):
    """The model as the engine sees it: a batch in, the sum of its token losses out.

    Logits are made for supervised positions alone; for more than LOGITS_CHUNK_BYTES of them in
    fp32, a chunk at a time and again in the backward pass, so that (B, T, V) never exists.

    `num_chunks` fixes their number: at ZeRO-3 each chunk gathers the head, and every rank must
    gather as often, however many of its tokens are supervised.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, num_chunks: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._num_chunks = num_chunks

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Sum over the S supervised positions, fp32; 0 with a gradient path where S is 0.

        `documents`: tokens of the documents of each row, the first of which never counts. No
        attention mask is needed: documents are attended to one by one (model/attention.py), and
        padding is on the right, where causal attention never looks. With a mask, PyTorch leaves its
        fastest kernels, repeats keys and values for every head, and keeps a (B, 1, T, T) mask for
        each layer.
        """
        model = self.model
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        apart = arguments_for(causal.config._attn_implementation, documents, input_ids)
        hidden = causal.get_decoder()(
            input_ids=input_ids, use_cache=False, **apart
        ).last_hidden_state  # (B, T, D)
        targets = labels[:, 1:]
        counts = targets != IGNORED
        return self._summed(causal, hidden[:, :-1][counts], targets[counts])

    def _summed(self, causal: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = causal.get_output_embeddings()
        cap = getattr(causal.config, "final_logit_softcapping", None)

        def chunk_loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = head(h).float()  # (S, V)
            if cap is not None:  # Gemma 2
                logits = cap * torch.tanh(logits / cap)
            return F.cross_entropy(logits, y, reduction="sum")

        num_chunks = self._num_chunks or _chunks(len(targets), causal.config.vocab_size)
        if num_chunks == 1:
            return chunk_loss(hidden, targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        parts = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        for part in parts:
            part_loss = checkpoint(chunk_loss, *part, use_reentrant=False)
            total = total + part_loss
        return total


def chunks_for_any_batch(plan: Plan) -> int:
    """Chunks that are enough for the largest micro-batch of a plan, all of it supervised."""
    positions = plan.layout.micro_batch_size * plan.settings.max_length
    return _chunks(positions, plan.shape.vocab_size)


def _chunks(positions: int, vocab_size: int) -> int:
    return max(1, math.ceil(positions * vocab_size * 4 / LOGITS_CHUNK_BYTES))
