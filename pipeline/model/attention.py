"""Attention inside each document of a pack, registered with transformers.

B: sequences, T: tokens of a sequence, H: query heads, K: key heads, L: tokens of a document,
D: width of a head. A pack is a row of documents, padding behind them: each document is an attention
of its own, so there is no mask, no (T, T) tensor, and no way from one document to another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WITHIN_DOCUMENTS = "rankzero_documents"  # as `attn_implementation`
FLASH = "flash_attention_2"

Documents = Sequence[Sequence[int]]  # tokens of the documents of each row, in their order
_Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def arguments_for(
    implementation: str, documents: Documents, input_ids: torch.Tensor
) -> dict[str, Any]:
    """What a decoder is called with beside `input_ids` (B, T), so that documents stay apart.

    Nothing where no row holds two: then causal attention does, which never looks at the padding on
    the right. Raises ValueError for an attention that would look across documents.
    """
    if all(len(row) < 2 for row in documents):
        return {}
    length, device = input_ids.shape[1], input_ids.device
    rows = [_with_padding(row, length) for row in documents]
    flat = list(chain.from_iterable(rows))
    positions = torch.cat([torch.arange(tokens) for tokens in flat]).view(-1, length)
    arguments: dict[str, Any] = {"position_ids": positions.to(device, non_blocking=True)}
    if implementation == WITHIN_DOCUMENTS:
        return arguments | {"documents": documents}
    if implementation != FLASH:
        raise ValueError(f"attention {implementation!r} does not keep documents apart")
    bounds = torch.tensor([0, *accumulate(flat)], dtype=torch.int32).to(device, non_blocking=True)
    of_both = {f"cu_seq_lens_{side}": bounds for side in "qk"}
    return arguments | of_both | {f"max_length_{side}": max(flat) for side in "qk"}


def _with_padding(row: Sequence[int], length: int) -> list[int]:
    """Tokens of a row's documents, and of its padding as one more."""
    left = length - sum(row)
    return [*row, left] if left else list(row)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query (B, H, T, D), key, value (B, K, T, D).

    Gives (B, T, H, D). With a mask or a cache, as generation has them, the ordinary one.
    """
    if softcap is None:
        core = partial(_kernel, dropout=dropout, scaling=scaling)
    else:
        core = partial(_capped, dropout=dropout, scaling=scaling, softcap=softcap)
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        if softcap is not None:
            found = core(query, key, value, mask=attention_mask)
            return found.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    assert getattr(module, "is_causal", True), "attention to later tokens"
    # Of Qwen2-MoE the module has it and does not pass it on.
    window = others.get("sliding_window", getattr(module, "sliding_window", None))
    attend = core if window is None else partial(_in_window, core, window)
    if documents is None:
        return attend(query, key, value).transpose(1, 2).contiguous(), None
    return _each(documents, attend, query, key, value), None


def _each(
    documents: Documents,
    attend: _Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """One attention a document, (B, T, H, D).

    By `split`, whose backward pass is one concatenation; that of a slice fills a whole (B, H, T, D)
    with zeros.
    """
    batch, heads, length, width = query.shape
    found = []
    for row, parts in zip(documents, _rows(query, key, value), strict=True):
        lengths = _with_padding(row, length)
        split = list(zip(*(torch.split(tensor, lengths, dim=2) for tensor in parts), strict=True))
        found += [attend(*part).transpose(1, 2) for part in split[: len(row)]]
        found += [query.new_zeros(1, left, heads, width) for left in lengths[len(row) :]]
    return torch.cat(found, dim=1).view(batch, length, heads, width)


def _rows(*tensors: torch.Tensor) -> Any:
    """The tensors, row by row; of one row they are as they are, not copied in the backward pass."""
    if len(tensors[0]) == 1:
        return [tensors]
    return zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)


def _in_window(
    core: Callable[..., torch.Tensor],
    window: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Causal attention to the last `window` tokens, the token itself among them.

    In blocks of `window` queries, each of which sees its own keys and those of the block before, so
    that no mask is larger than (window, 2 window).
    """
    if query.shape[2] <= window:
        return core(query, key, value)
    queries, keys, values = (torch.split(t, window, dim=2) for t in (query, key, value))
    found = [core(queries[0], keys[0], values[0])]
    for i in range(1, len(queries)):
        asking = torch.arange(queries[i].shape[2], device=query.device)[:, None]
        asked = torch.arange(window + queries[i].shape[2], device=query.device)
        mask = (asked > asking) & (asked <= asking + window)
        seen = (torch.cat((t[i - 1], t[i]), dim=2) for t in (keys, values))
        found.append(core(queries[i], *seen, mask=mask))
    return torch.cat(found, dim=2)


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """PyTorch's attention, causal where there is no mask: (B, H, L, D)."""
    is_shared = query.shape[1] != key.shape[1]
    if is_shared and mask is not None:  # with a mask no fast kernel shares heads
        key, value = _repeated(query, key, value)
        is_shared = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=is_shared,
    )


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are capped (Gemma 2), which no kernel of PyTorch's fuses.

    As transformers 5.23 models/gemma2/modeling_gemma2.py; causal where there is no mask.
    """
    assert scaling is not None
    key, value = _repeated(query, key, value)
    scores = torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def _repeated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    times = query.shape[1] // key.shape[1]
    return repeat_kv(key, times), repeat_kv(value, times)


def _mask(
    *, attention_mask: torch.Tensor | None, q_length: int, kv_length: int, **others: Any
) -> torch.Tensor | None:
    """The mask of padded prompts and of caches; without either `_attend` needs none."""
    if attention_mask is None and q_length == kv_length:
        return None
    found: torch.Tensor | None = sdpa_mask(
        attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **others
    )
    return found


AttentionInterface.register(WITHIN_DOCUMENTS, _attend)
AttentionMaskInterface.register(WITHIN_DOCUMENTS, _mask)
