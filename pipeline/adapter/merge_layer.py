"""Arithmetic of a merge: all changes of one tensor, with peft's own layer classes.

A tensor is merged in blocks of outputs (rows of a linear layer's weight), which do not depend on
each other. A block fits into a core's cache. Blocks are merged in parallel threads, and each of
them runs torch with one thread. Torch's own threads wait for each other after each operator; with
these a merge takes many times longer on a busy machine.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Embedding, Linear
from torch import nn

from pipeline.adapter.adapter_file import LayerUpdate, ValueUpdate
from pipeline.adapter.merge_inputs import Change
from pipeline.errors import RankZeroError

_BLOCK_VALUES = 2**19
_CACHED_LAYERS = 64


@dataclass(frozen=True, kw_only=True)
class LoadedChange:
    """A change of a tensor with the fp32 tensors of the adapter, by the names of its parts."""

    change: Change
    parts: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """Merging of tensors. `is_undone`: subtract the adapters, as peft's `unmerge` does."""

    pool: ThreadPoolExecutor
    device: torch.device
    is_undone: bool = False

    @torch.no_grad()
    def merge(self, name: str, weight: torch.Tensor, changes: Sequence[LoadedChange]) -> float:
        """Apply the changes to a tensor in place.

        Returns the norm of the change divided by the norm of the tensor. Raises RankZeroError if a
        merged value is not finite.
        """
        target = weight.to(self.device)
        changes = [
            LoadedChange(
                change=each.change, parts={k: v.to(self.device) for k, v in each.parts.items()}
            )
            for each in changes
        ]
        axis = 1 if any(_is_transposed(each) for each in changes) else 0
        length = target.shape[axis]
        if self.device.type == "cpu" and not _needs_whole(target, changes):
            length = max(1, _BLOCK_VALUES * target.shape[axis] // max(target.numel(), 1))

        def merge_block(start: int) -> tuple[float, float]:
            block = target.narrow(axis, start, min(length, target.shape[axis] - start))
            before = block.float()
            before = before.clone() if before.data_ptr() == block.data_ptr() else before
            _merge_block(block, [_part_of(each, axis, start, block) for each in changes], self)
            size = torch.linalg.vector_norm(before).item()
            change = torch.linalg.vector_norm(before.sub_(block)).item()
            return change**2, size**2

        sums = list(self.pool.map(merge_block, range(0, target.shape[axis], length)))
        if target is not weight:
            weight.copy_(target)
        change, size = (math.sqrt(sum(column)) for column in zip(*sums, strict=True))
        if not math.isfinite(change):
            require_finite(name, weight)
        return change / max(size, 1e-30)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise RankZeroError if a tensor of the merged model has values that are not finite."""
    if not weight.isfinite().all():
        raise RankZeroError(
            f"{name}: the merged weight is not finite in {str(weight.dtype)[6:]}: the base or the "
            "adapter is damaged, or the values are too large for it; try --dtype bf16"
        )


def _is_transposed(loaded: LoadedChange) -> bool:
    update = loaded.change.update
    return isinstance(update, LayerUpdate) and update.is_transposed


def _needs_whole(target: torch.Tensor, changes: Sequence[LoadedChange]) -> bool:
    """Whether outputs depend on each other: DoRA of an embedding, and a slice of one expert."""
    for loaded in changes:
        update = loaded.change.update
        if not isinstance(update, LayerUpdate):
            continue
        if update.is_embedding and "magnitude" in update.parts:
            return True
        if update.experts is not None and target.dim() == 2:
            return True
    return False


def _part_of(loaded: LoadedChange, axis: int, start: int, block: torch.Tensor) -> LoadedChange:
    """The part of a change that concerns a block of outputs."""
    update, count = loaded.change.update, block.shape[axis]
    parts = dict(loaded.parts)
    if isinstance(update, ValueUpdate):
        if update.rows is None:
            parts["values"] = parts["values"].narrow(axis, start, count)
        else:
            inside = [(i, row - start) for i, row in enumerate(update.rows)]
            inside = [(i, row) for i, row in inside if 0 <= row < count]
            parts["rows"] = torch.tensor([row for _, row in inside], dtype=torch.long)
            parts["values"] = parts["values"][[i for i, _ in inside]]
    elif update.experts is not None:
        parts["first"] = torch.tensor(start)
    elif update.is_embedding:
        parts["A"] = parts["A"].narrow(1, start, count)
    else:
        parts["B"] = parts["B"].narrow(0, start, count)
        if "magnitude" in parts:
            parts["magnitude"] = parts["magnitude"].narrow(0, start, count)
    return LoadedChange(change=loaded.change, parts=parts)


def _merge_block(
    block: torch.Tensor, changes: Sequence[LoadedChange], arithmetic: Arithmetic
) -> None:
    """Apply the parts of all changes to a block, in peft's order.

    The first are values that replace those of the base, which peft sets when it loads an adapter.
    """
    sign = -1 if arithmetic.is_undone else 1
    layers = []
    for loaded in changes:
        update, parts = loaded.change.update, loaded.parts
        if isinstance(update, LayerUpdate):
            layers.append(loaded)
        elif update.rows is not None:
            block[parts["rows"].to(block.device)] = parts["values"].to(block.dtype)
        elif update.scaling is None:
            block.copy_(parts["values"])
    for loaded in changes:
        update = loaded.change.update
        if isinstance(update, ValueUpdate) and update.scaling is not None:
            block += sign * (loaded.parts["values"] * (loaded.change.weight * update.scaling))
        elif isinstance(update, LayerUpdate) and update.experts is not None:
            _add_experts(block, loaded, sign)
    layers = [each for each in layers if "first" not in each.parts]
    if layers:
        _merge_layers(block, layers, is_undone=arithmetic.is_undone)


def _add_experts(block: torch.Tensor, loaded: LoadedChange, sign: int) -> None:
    """Add the product of each expert in a stored tensor, rounded as peft rounds it."""
    update, parts = loaded.change.update, loaded.parts
    assert isinstance(update, LayerUpdate)
    assert update.experts is not None
    scaling, expert = loaded.change.weight * update.scaling, update.experts.expert
    tensors = [block] if expert is not None else list(block)
    first = expert if expert is not None else int(parts["first"])
    for index, tensor in enumerate(tensors, first):
        rows, columns = tensor.shape
        change = update.experts.change(index, parts["A"], parts["B"], (rows, columns))
        tensor.add_(sign * (change * scaling).to(tensor.dtype))


def _merge_layers(block: torch.Tensor, changes: Sequence[LoadedChange], *, is_undone: bool) -> None:
    """Merge the LoRA layers of all adapters with one layer of peft, one after another."""
    layer = _peft_layer(block, changes)
    names = list(layer.r)
    base: Any = layer.get_base_layer()
    base.weight = nn.Parameter(block, requires_grad=False)
    for name, loaded in zip(names, changes, strict=True):
        a, b = (nn.Parameter(loaded.parts[part], requires_grad=False) for part in "AB")
        if isinstance(layer, Embedding):
            layer.lora_embedding_A[name], layer.lora_embedding_B[name] = a, b
        else:
            layer.lora_A[name].weight, layer.lora_B[name].weight = a, b
        if "magnitude" in loaded.parts:
            magnitude = nn.Parameter(loaded.parts["magnitude"], requires_grad=False)
            layer.lora_magnitude_vector[name].weight = magnitude
        layer.set_scale(name, loaded.change.weight)
    layer.merged_adapters = names if is_undone else []
    if is_undone:
        layer.unmerge()
    else:
        layer.merge(adapter_names=names)
    if base.weight.data_ptr() != block.data_ptr():  # DoRA replaces the tensor
        block.copy_(base.weight.data)


_cache_of_thread = threading.local()


def _peft_layer(block: torch.Tensor, changes: Sequence[LoadedChange]) -> Linear | Embedding:
    """A layer of peft with an adapter for each change, without values.

    Each thread caches a layer for each shape of blocks, because building a layer takes as long as
    merging half a block.
    """
    updates = [loaded.change.update for loaded in changes]
    kinds = tuple(
        (x.r, x.alpha, x.use_rslora, x.is_embedding, x.is_transposed, "magnitude" in x.parts)
        for x in updates
        if isinstance(x, LayerUpdate)
    )
    layers: dict[Any, Linear | Embedding] = _cache_of_thread.__dict__.setdefault("layers", {})
    key = (block.shape, kinds)
    if key not in layers:
        if len(layers) >= _CACHED_LAYERS:
            layers.clear()
        layers[key] = _new_layer(block, kinds)
    return layers[key]


def _new_layer(block: torch.Tensor, kinds: Sequence[tuple[Any, ...]]) -> Linear | Embedding:
    layer: Linear | Embedding | None = None
    with torch.device("meta"):  # saves the initialisation of matrices that are replaced
        for number, (r, alpha, use_rslora, is_embedding, is_transposed, use_dora) in enumerate(
            kinds
        ):
            config = LoraConfig(
                use_rslora=use_rslora,
                use_dora=use_dora,
                fan_in_fan_out=is_transposed,
                init_lora_weights=False,
            )
            options: dict[str, Any] = {"r": r, "lora_alpha": alpha, "config": config}
            if layer is not None:
                layer.update_layer(str(number), **options)
                continue
            rows, columns = block.shape[::-1] if is_transposed else block.shape
            base: Any = (
                nn.Embedding(rows, columns) if is_embedding else nn.Linear(columns, rows, False)
            )
            base.weight = nn.Parameter(torch.empty(block.shape), requires_grad=False)
            kind: Callable[..., Any] = Embedding if is_embedding else Linear
            layer = kind(base, str(number), **options)
    assert layer is not None
    return layer
