"""Causal attention within each document of a packed sequence, registered with transformers.

A document is one training example. A packed sequence consists of documents, followed by padding.
The attention of each document is computed separately, so there is no mask, no (T, T) tensor, and no
attention between documents. A sequence may also be split over a group of ranks (ulysses.py).

Letters in shapes: B sequences, T tokens of a sequence, H query heads, K key heads, L tokens of a
document, D width of a query or key, V width of a value.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from pipeline.cluster.sequence_group import SequenceGroup
from pipeline.errors import UserError
from pipeline.model.fp32_kernels import attend_in_fp32
from pipeline.model.structure import num_blocks_with
from pipeline.model.ulysses import heads_of_whole_sequence, of_own_heads, tokens_of_all_heads

# Names of this attention for `attn_implementation`; with the second, bf16 tensors are computed in
# fp32 kernels (fp32_kernels.py).
WITHIN_DOCUMENTS, WITHIN_DOCUMENTS_FP32 = "rankzero_documents", "rankzero_documents_fp32"
FLASH = "flash_attention_2"
# Arguments of transformers 5.23 that have no effect on causal attention. Any other argument that is
# not None raises an error, because it may request a variant that is not implemented here.
_WITHOUT_EFFECT = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip
# Columns that an attention sink adds to queries and keys (`_with_sinks`). One would be enough, but
# fused kernels need widths that are multiples of 8.
SINK_COLUMNS = 8

Documents = Sequence[Sequence[int]]  # for each row of the batch: lengths of its documents in tokens


class PackedDocuments(tuple[Sequence[int], ...]):
    """Document lengths of a batch: for each row, the tokens of each of its documents.

    `receivers`: the attention modules that were called with this object. `group`: the ranks over
    which each row is split; None if rows are whole.
    """

    group: SequenceGroup | None

    def __new__(cls, documents: Documents, group: SequenceGroup | None = None) -> Self:
        """A tuple of the rows."""
        del group
        return super().__new__(cls, documents)

    def __init__(self, documents: Documents, group: SequenceGroup | None = None) -> None:
        del documents  # the elements of the tuple
        self.group = group
        self.receivers: set[nn.Module] = set()

    @property
    def are_packed(self) -> bool:
        """Whether a row has several documents."""
        return any(len(row) > 1 for row in self)


def document_arguments(
    implementation: str,
    documents: Documents,
    input_ids: torch.Tensor,
    group: SequenceGroup | None = None,
) -> dict[str, Any]:
    """Additional arguments for the decoder, which keep packed documents separate.

    `implementation`: the model's attention function, as in `attn_implementation`. `input_ids`:
    (B, T), or this rank's part (B, T / P) if a group of P ranks shares each row. The result is
    empty if every row is whole and has at most one document, because padding on the right does not
    affect causal attention. Raises ValueError if the attention function cannot keep documents
    separate or cannot be split over ranks.
    """
    if group is None and all(len(row) < 2 for row in documents):
        return {}
    length, device = input_ids.shape[1] * (1 if group is None else group.size), input_ids.device
    lengths = list(chain.from_iterable(_with_padding(row, length) for row in documents))
    positions = torch.cat([torch.arange(tokens) for tokens in lengths]).view(-1, length)
    if group is not None:
        positions = group.local_part(positions, 0)
    arguments: dict[str, Any] = {"position_ids": _copied(positions, device)}
    if implementation in (WITHIN_DOCUMENTS, WITHIN_DOCUMENTS_FP32):
        return arguments | {"documents": PackedDocuments(documents, group)}
    if group is not None:
        raise ValueError(f"attention {implementation!r} cannot be split over ranks")
    if implementation != FLASH:
        raise ValueError(f"attention {implementation!r} does not keep documents separate")
    bounds = _copied(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    arguments |= {f"cu_seq_lens_{side}": bounds for side in "qk"}
    return arguments | {f"max_length_{side}": max(lengths) for side in "qk"}


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device; for a GPU it is pinned, so that the host does not wait."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def require_separate_documents(
    documents: PackedDocuments, layers: Sequence[nn.Module], model_type: str
) -> None:
    """Raise UserError unless every block called its attention with the argument `documents`.

    Other blocks drop the argument (StableLM) or have no attention (Mamba, convolutions), and mix
    the tokens of different documents. If a row is split over ranks, such a block also sees only its
    rank's tokens.
    """
    num_separate = num_blocks_with(documents.receivers, layers)
    if num_separate != len(layers):
        ability, setting = "keep the documents of a packed sequence separate", "packing: false"
        if documents.group is not None:
            ability, setting = "can be split over ranks", "sequence_parallel_size: 1"
        raise UserError(
            f"{num_separate} of {len(layers)} blocks of this {model_type} model {ability}; "
            f"set {setting}"
        )


def _with_padding(row: Sequence[int], length: int) -> list[int]:
    """Lengths of a row's documents, followed by the length of its padding, if any."""
    padding = length - sum(row)
    return [*row, padding] if padding else list(row)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    query (B, H, T, D), key (B, K, T, D), value (B, K, T, V) -> (B, T, H, V). If there is a mask or
    a key-value cache (generation), documents are ignored.
    """
    documents = arguments.pop("documents", None)
    is_causal = arguments.pop("is_causal", None) is not False and getattr(module, "is_causal", True)
    layer = _LayerAttention(
        dropout=arguments.pop("dropout", 0.0),
        scaling=arguments.pop("scaling", None),
        softcap=arguments.pop("softcap", None),
        sinks=arguments.pop("s_aux", None),
        # Qwen2-MoE stores the window in the module and does not pass it to the attention.
        window=arguments.pop("sliding_window", getattr(module, "sliding_window", None)),
        chunk=_chunk_size(module),
        has_fp32_kernels=arguments.pop("has_fp32_kernels", False),
    )
    _refuse_unsupported(module, arguments)
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        if attention_mask is None and query.shape[2] > 1:
            raise UserError(
                f"model: {type(module).__name__} attends from {query.shape[2]} tokens to "
                f"{key.shape[2]} keys without a mask; this kind of model cannot be trained"
            )
        return _with_mask(layer, query, key, value, attention_mask), None
    if not is_causal:
        raise UserError(
            f"model: {type(module).__name__} also attends to later tokens; use a causal language "
            "model"
        )
    if documents is None:
        return layer(query, key, value).transpose(1, 2).contiguous(), None
    if isinstance(documents, PackedDocuments):
        documents.receivers.add(module)
        if documents.group is not None:
            return _over_group(documents, documents.group, layer, (query, key, value)), None
    return _by_document(documents, layer, query, key, value), None


def _over_group(
    documents: PackedDocuments,
    group: SequenceGroup,
    layer: "_LayerAttention",
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Attention of a sequence that a group of P ranks shares: (B, T / P, H, V).

    `tensors`: query, key and value of this rank's tokens. Between the two all-to-alls this rank has
    all tokens of its share of the heads, and computes them as without a group.
    """
    if layer.dropout > 0:
        raise UserError(
            f"model: its attention has dropout {layer.dropout:g}, and the masks would depend on "
            "sequence_parallel_size; set the dropout to 0 in config.json, or "
            "sequence_parallel_size: 1"
        )
    query, key, value = heads_of_whole_sequence(group, *tensors)
    if layer.sinks is not None:
        layer = replace(layer, sinks=of_own_heads(group, layer.sinks))
    if documents.are_packed:
        output = _by_document(documents, layer, query, key, value)
    else:  # padding on the right does not affect a single document
        output = layer(query, key, value).transpose(1, 2)
    return tokens_of_all_heads(group, output)


def _with_mask(
    layer: "_LayerAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention for generation, with a padding mask or a key-value cache: (B, T, H, V)."""
    if mask is None:
        mask = _causal_mask(query, key)
    return layer.masked(query, key, value, mask).transpose(1, 2).contiguous()


def _refuse_unsupported(module: Any, arguments: dict[str, Any]) -> None:
    """Raise UserError for an argument of attention that is not implemented here."""
    names = {name for name, value in arguments.items() if value is not None}
    if unsupported := sorted(names - _WITHOUT_EFFECT):
        raise UserError(
            f"model: {type(module).__name__} calls attention with {', '.join(unsupported)}, which "
            "is not implemented here; this kind of model cannot be trained"
        )


def _chunk_size(module: Any) -> int | None:
    """Chunk length in tokens if the layer has chunked attention (Llama 4), else None.

    It is read from the config, because transformers passes it to attention only as a mask.
    """
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not kinds or index is None or kinds[index] != "chunked_attention":
        return None
    size: int = config.attention_chunk_size  # type: ignore[union-attr]
    return size


@dataclass(frozen=True, kw_only=True)
class _LayerAttention:
    """Causal attention within one document, with the options of one layer.

    `scaling`: factor of the scores. `softcap`: tanh cap of the scores (Gemma 2). `sinks`: (H,), an
    additional score in the softmax of each head (gpt-oss). `window`: number of tokens that a token
    attends to, itself included. `chunk`: tokens of a chunk; there is no attention between chunks
    (Llama 4). These are None if the layer does not have the option. `has_fp32_kernels`: whether
    bf16 tensors are cast to fp32 for attention (fp32_kernels.py).
    """

    dropout: float
    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None
    window: int | None
    chunk: int | None
    has_fp32_kernels: bool

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, H, L, D), (B, K, L, D), (B, K, L, V) -> (B, H, L, V)."""
        if self.chunk is None:
            return self._in_window(query, key, value)
        split = (torch.split(tensor, self.chunk, dim=2) for tensor in (query, key, value))
        return torch.cat([self._in_window(*chunk) for chunk in zip(*split, strict=True)], dim=2)

    def _in_window(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Sliding-window attention, computed for `window` queries at a time.

        The sequence is split into pieces of `window` tokens. The queries of a piece need only the
        keys of that piece and of the one before it, so no mask is larger than (window, 2 window).
        """
        window = self.window
        if window is None or query.shape[2] <= window:
            return self.masked(query, key, value, None)
        queries, keys, values = (torch.split(t, window, dim=2) for t in (query, key, value))
        outputs = [self.masked(queries[0], keys[0], values[0], None)]
        for i in range(1, len(queries)):
            rows = torch.arange(queries[i].shape[2], device=query.device)[:, None]
            columns = torch.arange(window + queries[i].shape[2], device=query.device)
            mask = (columns > rows) & (columns <= rows + window)
            two_keys, two_values = (torch.cat((t[i - 1], t[i]), dim=2) for t in (keys, values))
            outputs.append(self.masked(queries[i], two_keys, two_values, mask))
        return torch.cat(outputs, dim=2)

    def masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention with a boolean mask, or causal attention if the mask is None: (B, H, L, V)."""
        if self.sinks is not None:
            query, key, value, mask = self._with_sinks(query, key, value, mask)
        kernel = self._fused if self.softcap is None else self._capped
        output = kernel(query, key, value, mask)
        return output if self.sinks is None else output[:, :, 1:]

    def _with_sinks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Replace the sinks by one more key and value, so that fused kernels can be used.

        The new key comes first. Its score is the sink, and its value is 0. The score is produced by
        additional columns: (sink / scaling, 0, ...) in each query, (1, 0, ...) in the sink's
        key, and zeros in the other keys. A query is prepended too, so that `is_causal` stays
        correct; `masked` drops its output.
        """
        assert self.sinks is not None
        assert self.scaling is not None
        score = (self.sinks / self.scaling).to(query.dtype).view(1, -1, 1, 1)
        score = score.expand(query.shape[0], -1, query.shape[2], 1)
        query = F.pad(torch.cat((query, score), dim=-1), (0, SINK_COLUMNS - 1, 1, 0))
        sink = F.one_hot(torch.tensor(key.shape[-1]), key.shape[-1] + SINK_COLUMNS).to(key)
        sink = sink.expand(*key.shape[:2], 1, -1)
        key = torch.cat((sink, F.pad(key, (0, SINK_COLUMNS))), dim=2)
        value = F.pad(value, (0, 0, 1, 0))
        return query, key, value, None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)

    def _fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """PyTorch's scaled dot product attention: (B, H, L, V).

        Values that are narrower than keys (latent attention, sinks) are padded to the keys' width.
        For two different widths a CPU has no fused kernel, and a GPU has none if several query
        heads share a key head. PyTorch would then store all scores.
        """
        width = value.shape[-1]
        value = F.pad(value, (0, query.shape[-1] - width)) if width < query.shape[-1] else value
        is_plain = mask is None and self.dropout == 0 and value.shape[-1] == query.shape[-1]
        if self.has_fp32_kernels and is_plain and query.dtype == torch.bfloat16:
            return attend_in_fp32(query, key, value, self.scaling)[..., :width]
        is_grouped = query.shape[1] != key.shape[1]
        if is_grouped and mask is not None:  # no fused kernel supports both a mask and enable_gqa
            key, value = _repeat_heads(query, key, value)
            is_grouped = False
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=mask is None,
            scale=self.scaling,
            enable_gqa=is_grouped,
        )
        return output[..., :width]

    def _capped(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention with soft-capped scores (Gemma 2), for which PyTorch has no fused kernel.

        The same arithmetic as transformers 5.23, models/gemma2/modeling_gemma2.py.
        """
        assert self.scaling is not None
        assert self.softcap is not None
        key, value = _repeat_heads(query, key, value)
        scores = torch.tanh(query @ key.transpose(2, 3) * self.scaling / self.softcap)
        scores = scores * self.softcap
        if mask is None and query.shape[2] > 1:
            mask = _causal_mask(query, key)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return F.dropout(weights, self.dropout, training=self.dropout > 0) @ value


def _by_document(
    documents: Documents,
    layer: _LayerAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Attention of each document, concatenated: (B, T, H, V).

    Tensors are divided with `split`, because its backward pass is one concatenation. The backward
    pass of a slice would allocate a zero-filled (B, H, T, D) tensor.
    """
    batch, heads, length, _ = query.shape
    width = value.shape[-1]
    outputs = []
    for row, tensors in zip(documents, _rows(query, key, value), strict=True):
        lengths = _with_padding(row, length)
        queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in tensors)
        num_documents = len(row)  # the rest is padding
        outputs += [
            layer(queries[i], keys[i], values[i]).transpose(1, 2) for i in range(num_documents)
        ]
        outputs += [
            query.new_zeros(1, padding, heads, width) for padding in lengths[num_documents:]
        ]
    return torch.cat(outputs, dim=1).view(batch, length, heads, width)


def _rows(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Query, key and value of each row; a single row is not split, which would cost a copy."""
    if len(tensors[0]) == 1:
        return [tensors]
    return zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Boolean causal mask (queries, keys), if the queries are the last tokens of the sequence."""
    shape = (query.shape[2], key.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])


def _repeat_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, repeated so that there are as many heads as query heads."""
    times = query.shape[1] // key.shape[1]
    return repeat_kv(key, times), repeat_kv(value, times)


def _mask(
    *, attention_mask: torch.Tensor | None, q_length: int, kv_length: int, **others: Any
) -> torch.Tensor | None:
    """The mask function that transformers calls; None if there is neither padding nor a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **others
    )
    return mask


AttentionInterface.register(WITHIN_DOCUMENTS, _attend)
AttentionInterface.register(WITHIN_DOCUMENTS_FP32, partial(_attend, has_fp32_kernels=True))
for _name in (WITHIN_DOCUMENTS, WITHIN_DOCUMENTS_FP32):
    AttentionMaskInterface.register(_name, _mask)
