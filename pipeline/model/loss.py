"""Cross-entropy, summed over the supervised positions of a batch.

The logits are computed by the forward method of the model's class. Letters in shapes: B sequences,
T tokens of a sequence, D hidden size, V vocabulary size, S supervised positions of the batch.
"""

import copy
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.model.attention import Documents, document_arguments, require_separate_documents
from pipeline.model.loss_gradient import sum_with_gradient
from pipeline.model.structure import blocks, body_name, text_decoder
from pipeline.plan.cost.loss import LOGITS_CHUNK_BYTES
from pipeline.plan.plan import Plan

IGNORED = -100  # label of a token that is not supervised


class SummedLoss(nn.Module):
    """The module that DeepSpeed wraps: it returns the sum of the token losses of a batch.

    Logits are computed for supervised positions only, so no (B, T, V) tensor exists. If the logits
    exceed LOGITS_CHUNK_BYTES in fp32, they are computed in chunks.

    `num_chunks` fixes the number of chunks for ZeRO-3. There each chunk gathers the head, and all
    ranks must gather it equally often, even if their numbers of supervised tokens differ.

    With `has_gradient_in_forward` the gradient of the loss is computed in the forward pass, if the
    head is frozen (loss_gradient.py). Otherwise several chunks are recomputed in the backward pass.

    `group`: the ranks that share each sequence. All of them are called with the same batch, and
    each returns the loss of its part of the tokens. None if each rank has its own sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        num_chunks: int | None = None,
        *,
        has_gradient_in_forward: bool = False,
        group: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._num_chunks = num_chunks
        self._has_gradient_in_forward = has_gradient_in_forward
        self._group = group

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        documents: Documents,
        predicting: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sum of the losses at the S supervised positions, in fp32.

        If S is 0, the result is 0 and still has an autograd graph. `documents`: for each row, the
        lengths of its packed documents. The first token of a document is never supervised.
        `predicting`: positions, in the flattened input or, with a group, in this rank's flattened
        part of it, of the tokens that predict a supervised token. If it is None, these positions
        are computed here, for which the host has to wait for the GPU.

        The decoder gets no padding mask: padding is on the right, which causal attention does not
        reach. With a mask, PyTorch would use no fused kernels, would repeat keys and values for
        every head, and would save a (B, 1, T, T) mask for each layer.
        """
        model = self.model
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        # Labels are shifted before the row is split over ranks: the target of the last token of a
        # part is the first token of the next part.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if (group := self._group) is not None:
            input_ids, targets = group.local_part(input_ids, 0), group.local_part(targets, IGNORED)
        attention_arguments = document_arguments(
            causal.config._attn_implementation, documents, input_ids, group
        )
        hidden = text_decoder(causal)(
            input_ids=input_ids, use_cache=False, **attention_arguments
        ).last_hidden_state  # (B, T, D)
        if (packed := attention_arguments.get("documents")) is not None:
            require_separate_documents(packed, blocks(causal), causal.config.model_type)
        if predicting is None:
            predicting = (targets != IGNORED).flatten().nonzero().squeeze(1)
        hidden, targets = (
            tensor.flatten(0, 1).index_select(0, predicting) for tensor in (hidden, targets)
        )
        return self._loss_sum(causal, hidden, targets)

    def _loss_sum(self, causal: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of hidden states (S, D) with targets (S,), computed in chunks."""
        logits_of = class_logits(causal)

        def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits_of(hidden).float(), targets, reduction="sum")

        vocab_size = causal.config.get_text_config().vocab_size
        num_chunks = self._num_chunks or _chunks(len(targets), vocab_size)
        if self._has_gradient_in_forward and hidden.requires_grad and not _is_head_trained(causal):
            return sum_with_gradient(logits_of, hidden, targets, num_chunks)
        if num_chunks == 1:
            return chunk_loss(hidden, targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        chunks = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        for chunk in chunks:
            chunk_sum = checkpoint(chunk_loss, *chunk, use_reentrant=False)
            total = total + chunk_sum
        return total


def _is_head_trained(causal: Any) -> bool:
    """Whether a parameter of the head, or an adapter on it, is trained."""
    body = getattr(causal, body_name(causal))
    others = (child for child in causal.children() if child is not body)
    return any(p.requires_grad for child in others for p in child.parameters())


def class_logits(causal: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function from hidden states (S, D) to logits (S, V), computed by the model's own class.

    The function calls the class's forward method on a shallow copy of the model. In the copy, the
    body (the part from embeddings to last hidden states) is replaced by a module that returns the
    given hidden states. So the method only computes what follows the body: head, bias, scale, soft
    cap. The head is called as a module, so that the hooks of ZeRO-3 run.
    """
    name = body_name(causal)
    shallow = copy.copy(causal)
    shallow.__dict__["_modules"] = dict(causal._modules)
    body, decoder = getattr(causal, name), text_decoder(causal)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        shallow._modules[name] = _FixedBody(body, decoder, hidden[None])
        logits = type(causal).forward(shallow, inputs_embeds=hidden[None], use_cache=False).logits
        return logits.squeeze(0)  # type: ignore[no-any-return]  # its backward copies nothing

    return logits_of


class _FixedBody(nn.Module):
    """Replacement for a model's body that returns fixed hidden states (1, S, D).

    The text decoder inside the body is replaced in the same way, and so is each module between the
    two.
    """

    def __init__(self, body: nn.Module, decoder: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.__dict__.update(_body=body, _decoder=decoder, _hidden=hidden)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the fixed hidden states; the arguments are ignored."""
        del args, kwargs
        return _BodyOutput(self._hidden)

    def __getattr__(self, name: str) -> Any:
        # Some classes read attributes of their body, such as Falcon-H1's lm_head_multiplier. Some
        # call the decoder inside the body (OPT).
        value = getattr(self.__dict__["_body"], name)
        decoder = self.__dict__["_decoder"]
        if isinstance(value, nn.Module) and any(module is decoder for module in value.modules()):
            return _FixedBody(value, decoder, self.__dict__["_hidden"])
        return value


class _BodyOutput:
    """Output of a body: it has hidden states, and None for all other attributes."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def max_chunks(plan: Plan) -> int:
    """Number of chunks for the largest micro-batch of a plan, if every token is supervised."""
    tokens = ceil(plan.settings.max_length / plan.layout.sequence_parallel_size)
    positions = plan.layout.micro_batch_size * tokens
    return _chunks(positions, plan.shape.vocab_size)


def _chunks(positions: int, vocab_size: int) -> int:
    """Number of chunks in which the logits of these positions are computed."""
    return max(1, ceil(positions * vocab_size * 4 / LOGITS_CHUNK_BYTES))
