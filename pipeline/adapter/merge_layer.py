"""Arithmetic of a merge: apply all changes to one tensor, with peft's own layer classes.

A tensor is divided into blocks of outputs (rows of a linear layer's weight), which do not depend on
each other. A block fits into the cache of a core. Several threads merge blocks in parallel, and
each of them runs torch with one thread. Torch's own threads wait for each other after each
operator, so with them a merge takes many times longer on a busy machine.
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

_BLOCK_VALUES = 2**19  # number of values of a block
_MAX_CACHED_LAYERS = 64


@dataclass(frozen=True, kw_only=True)
class LoadedChange:
    """A change of a tensor or of a block, with the fp32 tensors of the adapter.

    Keys of `tensors`: "A", "B" and "magnitude" of a LayerUpdate, or "values" of a ValueUpdate. For
    a block also: "rows", the indices within the block of the rows that "values" replace; "first",
    the index of the first expert in the block.
    """

    change: Change
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """Merging of tensors.

    `pool`: threads for the blocks. `is_undone`: subtract the adapters, as peft's `unmerge` does.
    """

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
        changes = [_to_device(change, self.device) for change in changes]
        axis = 1 if any(_is_transposed(change) for change in changes) else 0  # axis of the outputs
        num_outputs = target.shape[axis]
        block_size = num_outputs
        if self.device.type == "cpu" and not _needs_whole_tensor(target, changes):
            block_size = max(1, _BLOCK_VALUES * num_outputs // max(target.numel(), 1))

        def merge_block(start: int) -> tuple[float, float]:
            """Merge a block of outputs; returns squared norms of its change and of the block."""
            block = target.narrow(axis, start, min(block_size, num_outputs - start))
            original = block.float()
            if original.data_ptr() == block.data_ptr():  # an fp32 block is not copied by float()
                original = original.clone()
            block_changes = [_part_for_block(change, axis, start, block) for change in changes]
            _merge_block(block, block_changes, self)
            norm = torch.linalg.vector_norm(original).item()
            change_norm = torch.linalg.vector_norm(original.sub_(block)).item()
            return change_norm**2, norm**2

        squares = list(self.pool.map(merge_block, range(0, num_outputs, block_size)))
        if target is not weight:
            weight.copy_(target)
        change_norm = math.sqrt(sum(change for change, _ in squares))
        norm = math.sqrt(sum(square for _, square in squares))
        if not math.isfinite(change_norm):
            require_finite(name, weight)
        return change_norm / max(norm, 1e-30)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise RankZeroError if a tensor of the merged model has values that are not finite."""
    if not weight.isfinite().all():
        cause = "the base or the adapter is damaged, or the weight of the adapter is too large"
        if weight.dtype == torch.float16:
            cause += ", or the values are too large for float16; try --dtype bf16"
        dtype = str(weight.dtype).removeprefix("torch.")
        raise RankZeroError(f"{name}: the merged weight is not finite in {dtype}: {cause}")


def _to_device(loaded: LoadedChange, device: torch.device) -> LoadedChange:
    tensors = {key: tensor.to(device) for key, tensor in loaded.tensors.items()}
    return LoadedChange(change=loaded.change, tensors=tensors)


def _is_transposed(loaded: LoadedChange) -> bool:
    update = loaded.change.update
    return isinstance(update, LayerUpdate) and update.is_transposed


def _needs_whole_tensor(target: torch.Tensor, changes: Sequence[LoadedChange]) -> bool:
    """Whether outputs depend on each other, so that the tensor cannot be merged in blocks.

    This holds for DoRA of an embedding, and for a tensor with the matrix of one of several fused
    experts.
    """
    for loaded in changes:
        update = loaded.change.update
        if not isinstance(update, LayerUpdate):
            continue
        if update.is_embedding and "magnitude" in update.tensors:
            return True
        if update.experts is not None and target.dim() == 2:
            return True
    return False


def _part_for_block(
    loaded: LoadedChange, axis: int, start: int, block: torch.Tensor
) -> LoadedChange:
    """The part of a change that concerns a block of outputs, from output `start` on."""
    update, count = loaded.change.update, block.shape[axis]
    tensors = dict(loaded.tensors)
    if isinstance(update, ValueUpdate):
        if update.rows is None:
            tensors["values"] = tensors["values"].narrow(axis, start, count)
        else:
            in_block = [i for i, row in enumerate(update.rows) if start <= row < start + count]
            rows = [update.rows[i] - start for i in in_block]
            tensors["rows"] = torch.tensor(rows, dtype=torch.long)
            tensors["values"] = tensors["values"][in_block]
    elif update.experts is not None:
        tensors["first"] = torch.tensor(start)
    elif update.is_embedding:
        tensors["A"] = tensors["A"].narrow(1, start, count)
    else:
        tensors["B"] = tensors["B"].narrow(0, start, count)
        if "magnitude" in tensors:
            tensors["magnitude"] = tensors["magnitude"].narrow(0, start, count)
    return LoadedChange(change=loaded.change, tensors=tensors)


def _merge_block(
    block: torch.Tensor, changes: Sequence[LoadedChange], arithmetic: Arithmetic
) -> None:
    """Apply the parts of all changes to a block, in peft's order.

    Values that replace those of the base come first, because peft sets them when it loads an
    adapter.
    """
    sign = -1 if arithmetic.is_undone else 1
    for loaded in changes:
        update, tensors = loaded.change.update, loaded.tensors
        if isinstance(update, LayerUpdate):
            continue
        if update.rows is not None:
            block[tensors["rows"].to(block.device)] = tensors["values"].to(block.dtype)
        elif update.scaling is None:
            block.copy_(tensors["values"])
    layers = []
    for loaded in changes:
        update = loaded.change.update
        if isinstance(update, ValueUpdate):
            if update.scaling is not None:
                block += sign * (loaded.tensors["values"] * (loaded.change.weight * update.scaling))
        elif update.experts is not None or update.is_parameter:
            _add_to_parameter(block, loaded, sign)
        else:
            layers.append(loaded)
    if layers:
        _merge_layers(block, layers, is_undone=arithmetic.is_undone)


def _add_to_parameter(block: torch.Tensor, loaded: LoadedChange, sign: int) -> None:
    """Add the product B A, or that of each expert in a block, rounded as by peft's ParamWrapper.

    The block of experts is the matrix of one expert, or has a matrix (rows, columns) for each.
    """
    update = loaded.change.update
    assert isinstance(update, LayerUpdate)
    scaling = loaded.change.weight * update.scaling
    if update.experts is None:
        product = loaded.tensors["B"] @ loaded.tensors["A"]
        block.add_(sign * (product * scaling).to(block.dtype))
        return
    expert = update.experts.expert
    matrices = [block] if expert is not None else list(block)
    first = expert if expert is not None else int(loaded.tensors["first"])
    for index, matrix in enumerate(matrices, first):
        rows, columns = matrix.shape
        a, b = loaded.tensors["A"], loaded.tensors["B"]
        product = update.experts.change(index, a, b, (rows, columns))
        matrix.add_(sign * (product * scaling).to(matrix.dtype))


def _merge_layers(block: torch.Tensor, changes: Sequence[LoadedChange], *, is_undone: bool) -> None:
    """Merge the LoRA layers of all adapters into a block, with one layer of peft."""
    layer = _peft_layer(block, changes)
    names = list(layer.r)  # peft's names of the adapters: "0", "1", ...
    base: Any = layer.get_base_layer()
    base.weight = nn.Parameter(block, requires_grad=False)
    for name, loaded in zip(names, changes, strict=True):
        parameters = {
            key: nn.Parameter(tensor, requires_grad=False) for key, tensor in loaded.tensors.items()
        }
        if isinstance(layer, Embedding):
            layer.lora_embedding_A[name] = parameters["A"]
            layer.lora_embedding_B[name] = parameters["B"]
        else:
            layer.lora_A[name].weight = parameters["A"]
            layer.lora_B[name].weight = parameters["B"]
        if "magnitude" in parameters:
            layer.lora_magnitude_vector[name].weight = parameters["magnitude"]
        layer.set_scale(name, loaded.change.weight)
    layer.merged_adapters = names if is_undone else []
    if is_undone:
        layer.unmerge()
    else:
        layer.merge(adapter_names=names)
    if base.weight.data_ptr() != block.data_ptr():  # DoRA replaces the tensor
        block.copy_(base.weight.data)


@dataclass(frozen=True)
class _LayerOptions:
    """The options of a LoRA layer on which the structure of peft's layer depends."""

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    is_embedding: bool
    is_transposed: bool

    @property
    def peft_arguments(self) -> dict[str, Any]:
        """Arguments of peft's layer classes."""
        config = LoraConfig(
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            fan_in_fan_out=self.is_transposed,
            init_lora_weights=False,
        )
        return {"r": self.r, "lora_alpha": self.alpha, "config": config}


_cache_of_thread = threading.local()


def _peft_layer(block: torch.Tensor, changes: Sequence[LoadedChange]) -> Linear | Embedding:
    """A layer of peft with an adapter for each change, without values.

    Each thread caches a layer for each shape of blocks, because building a layer takes as long as
    merging half a block.
    """
    options = []
    for loaded in changes:
        update = loaded.change.update
        assert isinstance(update, LayerUpdate)
        options.append(
            _LayerOptions(
                r=update.r,
                alpha=update.alpha,
                use_rslora=update.use_rslora,
                use_dora="magnitude" in update.tensors,
                is_embedding=update.is_embedding,
                is_transposed=update.is_transposed,
            )
        )
    layers: dict[Any, Linear | Embedding] = _cache_of_thread.__dict__.setdefault("layers", {})
    key = (block.shape, *options)
    if key not in layers:
        if len(layers) >= _MAX_CACHED_LAYERS:
            layers.clear()
        layers[key] = _new_layer(block, options)
    return layers[key]


def _new_layer(block: torch.Tensor, options: Sequence[_LayerOptions]) -> Linear | Embedding:
    """Build a layer of peft; the first adapter comes with the layer, the others are added."""
    first, *others = options
    with torch.device("meta"):  # saves the initialisation of matrices that are replaced
        rows, columns = block.shape[::-1] if first.is_transposed else block.shape
        base: Any
        layer_class: Callable[..., Any]
        if first.is_embedding:
            base, layer_class = nn.Embedding(rows, columns), Embedding
        else:
            base, layer_class = nn.Linear(columns, rows, False), Linear
        base.weight = nn.Parameter(torch.empty(block.shape), requires_grad=False)
        layer: Linear | Embedding = layer_class(base, "0", **first.peft_arguments)
        for i, other in enumerate(others, 1):
            layer.update_layer(str(i), **other.peft_arguments)
    return layer
