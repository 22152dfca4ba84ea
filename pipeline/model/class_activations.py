"""Tensors that the blocks of a model class save for backward, counted without weights.

A forward pass of the model on the meta device runs under hooks that see each saved tensor. A second
forward pass finds the attention modules that receive the lengths of packed documents from the
decoder. class_shape.py uses both. A block is a layer of the text decoder.
"""

import inspect
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from pipeline.model.attention import SINK_COLUMNS
from pipeline.model.structure import expert_tensors

COUNTED = "rankzero_counted"  # name of the attention function below for `attn_implementation`
_TOKENS = 64  # sequence length of the counted forward pass; saved bytes are proportional to it


class RefusedClassError(ValueError):
    """A model class cannot be trained by this package, whatever packages are installed.

    The message names no folder, because published_shapes.json stores it too.
    """


class _Attention(torch.autograd.Function):
    """Attention without computation, which saves for backward what a fused kernel would save.

    These tensors are q, k, v, the output and the log-sum-exp. There is no backward pass, because
    only the forward pass is counted.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def _attend(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
    documents: list[Any] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls, with the shapes of model/attention.py.

    The attention module is appended to `documents`, with which `document_receivers` calls the
    decoder.
    """
    if documents is not None:
        documents.append(module)
    module.counted_head_dims = (q.shape[-1], v.shape[-1])  # read by class_shape.py
    if others.get("s_aux") is not None:  # attention sinks, for which attention.py widens the heads
        q, k = F.pad(q, (0, SINK_COLUMNS)), F.pad(k, (0, SINK_COLUMNS))
    width = v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v  # as in attention.py
    out: torch.Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register(COUNTED, _attend)
AttentionMaskInterface.register(COUNTED, lambda **others: None)


def saved_per_block(model: Any, decoder: Any, layers: Sequence[nn.Module]) -> list[dict[str, int]]:
    """Sizes of the activations that each block saves for backward, per token, without adapters.

    `saved_values` and `saved_bytes` are those of `_count_saved`. `saved_for_expert_adapters` is the
    number of additional values if the experts have an adapter, not counting the expert weights.
    It is counted in a forward pass with trainable expert weights: their gradients need the same
    activations as the gradients of the adapter.
    """
    counts = _count_saved(model, decoder, layers)
    with_experts = counts
    if experts := expert_tensors(decoder):
        for _, parameter in experts.values():
            parameter.requires_grad_(True)
        with_experts = _count_saved(model, decoder, layers)
        model.requires_grad_(False)
    for count, more in zip(counts, with_experts, strict=True):
        count["saved_for_expert_adapters"] = more["saved_values"] - count["saved_values"]
    return counts


def _pretended_tracing() -> AbstractContextManager[Any]:
    """Make transformers believe that the model is being traced.

    transformers then does not read the values of masks and positions, which tensors on the meta
    device lack.
    """
    return patch.object(masking_utils, "is_tracing", lambda *_: True)


@torch.no_grad()
def document_receivers(decoder: Any) -> list[nn.Module]:
    """The attention modules to which the decoder passes its argument `documents`.

    In training this argument has the lengths of packed documents (model/attention.py).
    """
    receivers: list[Any] = []
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with suppress(TypeError), _pretended_tracing():  # a decoder may not accept `documents`
        decoder(input_ids=ids, use_cache=False, documents=receivers)
    return receivers


def _count_saved(model: Any, decoder: Any, layers: Sequence[nn.Module]) -> list[dict[str, int]]:
    """Saved activations of each block, per token, in one forward pass in bf16.

    `saved_values`: number of values in the training dtype. `saved_bytes`: bytes of all other
    dtypes, such as the fp32 copies in norms.
    """
    model.to(torch.bfloat16)
    weights = {id(parameter) for parameter in model.parameters()}
    running: list[int] = []  # indices of the blocks whose forward pass is running
    saved: dict[int, torch.Tensor] = {}  # by id; the reference keeps the id from being reused
    saving_blocks: dict[int, set[int]] = defaultdict(set)  # id of a tensor -> indices of blocks

    def record(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor if tensor._base is None else tensor._base  # a view keeps the whole tensor
        if running and id(whole) not in weights:
            saved[id(whole)] = whole
            saving_blocks[id(whole)].add(running[-1])
        return tensor

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, i=index: running.append(i)))
        handles.append(layer.register_forward_hook(leave))
    handles.append(
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(True)
        )
    )
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with (
        _pretended_tracing(),
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        try:
            decoder(input_ids=ids, use_cache=False)
        except (NotImplementedError, RuntimeError) as error:
            raise _forward_error(model, error) from None
    for handle in handles:
        handle.remove()
    counts = []
    # Tensors that several blocks save, such as rotary angles, are not counted.
    for index in range(len(layers)):
        tensors = [saved[key] for key, blocks in saving_blocks.items() if blocks == {index}]
        values = sum(t.numel() for t in tensors if t.dtype == torch.bfloat16)
        others = sum(t.numel() * t.element_size() for t in tensors if t.dtype != torch.bfloat16)
        counts.append({"saved_values": values // _TOKENS, "saved_bytes": others // _TOKENS})
    return counts


def _forward_error(model: Any, error: Exception) -> RefusedClassError:
    """The error for a forward pass that fails on the meta device, with the line that fails."""
    frames = traceback.extract_tb(error.__traceback__)
    class_file = inspect.getsourcefile(type(model))
    in_class = [frame for frame in frames if frame.filename == class_file]
    frame = (in_class or frames)[-1]
    line = f"{Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"
    if "meta" in str(error).lower():
        return RefusedClassError(
            f"its forward pass reads values of tensors ({line}), so the memory of its activations "
            "cannot be counted without weights"
        )
    reason = str(error).partition("\n")[0]
    return RefusedClassError(f"its forward pass in bf16 without weights fails ({line}): {reason}")
