"""Token-summed cross-entropy on the supervised positions only, in chunks.

B: sequences, T: tokens, D: hidden size, V: vocabulary, S: supervised positions of the batch.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.plan.memory import LOGITS_CHUNK_BYTES

IGNORED = -100


class SummedLoss(nn.Module):
    """The model as the engine sees it: a batch in, the sum of its token losses out.

    Logits are made for supervised positions alone; for more than LOGITS_CHUNK_BYTES of them in
    fp32, a chunk at a time and again in the backward pass, so that (B, T, V) never exists.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the S supervised positions, fp32; 0 with a gradient path where S is 0."""
        model = self.model
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        hidden = causal.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
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

        rows = max(1, LOGITS_CHUNK_BYTES // (4 * causal.config.vocab_size))
        if len(targets) <= rows:
            return chunk_loss(hidden, targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            part_loss = checkpoint(chunk_loss, hidden[part], targets[part], use_reentrant=False)
            total = total + part_loss
        return total
