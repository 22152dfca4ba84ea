"""Summed cross-entropy over the supervised positions; logits come from the model class's forward.

B: sequences, T: tokens, D: hidden size, V: vocabulary, S: supervised positions of the batch.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.model.attention import Documents, arguments_for, require_delivered
from pipeline.model.structure import blocks, body_name, text_decoder
from pipeline.plan.cost.activations import LOGITS_CHUNK_BYTES
from pipeline.plan.plan import Plan

IGNORED = -100


class SummedLoss(nn.Module):
    """The module that DeepSpeed wraps: a batch in, the sum of its token losses out.

    Logits are computed for supervised positions only, so no (B, T, V) tensor exists. If they exceed
    LOGITS_CHUNK_BYTES in fp32, they are computed in chunks and recomputed in the backward pass.

    `num_chunks` fixes the number of chunks: at ZeRO-3 each chunk gathers the head, and every rank
    must gather the same number of times, independent of its number of supervised tokens.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, num_chunks: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._num_chunks = num_chunks

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Return the loss sum over the S supervised positions in fp32; S = 0 still has a graph.

        `documents`: lengths of the packed documents of each row. The first token of a document is
        never supervised. No padding mask is passed: padding is on the right, and causal attention
        does not reach it. With a mask, PyTorch would not use its fused kernels, would repeat keys
        and values for every head, and would save a (B, 1, T, T) mask for each layer.
        """
        model = self.model
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        packed = arguments_for(causal.config._attn_implementation, documents, input_ids)
        hidden = text_decoder(causal)(
            input_ids=input_ids, use_cache=False, **packed
        ).last_hidden_state  # (B, T, D)
        if "documents" in packed:
            require_delivered(packed["documents"], len(blocks(causal)), causal.config.model_type)
        targets = labels[:, 1:]
        is_supervised = targets != IGNORED
        return self._summed(causal, hidden[:, :-1][is_supervised], targets[is_supervised])

    def _summed(self, causal: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits_of = class_logits(causal)

        def chunk_loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits_of(h).float(), y, reduction="sum")

        vocab_size = causal.config.get_text_config().vocab_size
        num_chunks = self._num_chunks or _chunks(len(targets), vocab_size)
        if num_chunks == 1:
            return chunk_loss(hidden, targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        chunks = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        for chunk in chunks:
            chunk_sum = checkpoint(chunk_loss, *chunk, use_reentrant=False)
            total = total + chunk_sum
        return total


def class_logits(causal: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function from hidden states (S, D) to logits (S, V): the class's own forward after its body.

    The class is called on a shallow copy of the model whose body returns the given hidden states,
    so head, bias, scale, soft cap and multiplier are those of the class. The head is called as a
    module, so the hooks of ZeRO-3 run.
    """
    name = body_name(causal)
    shallow = copy.copy(causal)
    shallow.__dict__["_modules"] = dict(causal._modules)
    body = getattr(causal, name)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        shallow._modules[name] = _Body(body, hidden[None])
        logits = type(causal).forward(shallow, inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]  # type: ignore[no-any-return]

    return logits_of


class _Body(nn.Module):
    """Replaces a model's body (all but the head): returns given hidden states (1, S, D)."""

    def __init__(self, body: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["_body"], self.__dict__["_hidden"] = body, hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the given hidden states; ignore the arguments."""
        del args, kwargs
        return _BodyOutput(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_body"], name)  # such as Falcon-H1's lm_head_multiplier


class _BodyOutput:
    """The output of a body: hidden states; caches, attentions and router logits are None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def chunks_for_any_batch(plan: Plan) -> int:
    """Number of chunks for the largest micro-batch of a plan if every token is supervised."""
    positions = plan.layout.micro_batch_size * plan.settings.max_length
    return _chunks(positions, plan.shape.vocab_size)


def _chunks(positions: int, vocab_size: int) -> int:
    return max(1, math.ceil(positions * vocab_size * 4 / LOGITS_CHUNK_BYTES))
