"""Slices of fused expert tensors: the part of a fused tensor that each checkpoint tensor holds.

In memory, a fused tensor holds the weights of all experts of a block. A checkpoint may store the
same tensor. It may also store a tensor for each expert and projection; transformers then stacks and
concatenates them while it loads the model. To find which part of the fused tensor comes from which
stored tensor, transformers' conversion is run on small tensors whose elements are numbered.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.model.checkpoint_names import StoredAs, built_parameter
from pipeline.model.structure import expert_tensors

# Sizes of the small tensors: even, for conversions that interleave two halves.
_ROWS, _COLUMNS = 4, 6


@dataclass(frozen=True)
class Axis:
    """The part of one axis of a fused tensor that a stored tensor holds.

    The fused axis consists of `parts` parts of equal length, and this is the part `index`. For
    example, the rows of gate_proj and up_proj are the parts 0 and 1 of the rows of gate_up_proj. If
    `is_interleaved`, the parts alternate: row i of a part is row i x `parts` + `index` of the fused
    tensor. Otherwise one part follows the other.
    """

    parts: int = 1
    index: int = 0
    is_interleaved: bool = False

    def positions(self, length: int) -> torch.Tensor:
        """For each element of a part of this length, its position on the fused axis."""
        elements = torch.arange(length)
        if self.is_interleaved:
            return elements * self.parts + self.index
        return elements + self.index * length


@dataclass(frozen=True, kw_only=True)
class ExpertSlice:
    """Part of a fused tensor (expert, row, column) of `count` experts that one stored tensor holds.

    `is_transposed`: whether rows of the fused tensor are inputs, not outputs. `expert`: index of
    the expert; None if the stored tensor has all experts. `rows`, `columns`: part of each axis.
    `is_flipped`: whether the stored tensor has rows and columns in reverse order.
    """

    count: int
    is_transposed: bool
    expert: int | None = None
    rows: Axis = Axis()
    columns: Axis = Axis()
    is_flipped: bool = False

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the stored tensor; `shape`: d_out and d_in of one expert."""
        rows, columns = reversed(shape) if self.is_transposed else shape
        stored = rows // self.rows.parts, columns // self.columns.parts
        stored = stored[::-1] if self.is_flipped else stored
        return stored if self.expert is not None else (self.count, *stored)

    def change(
        self, expert: int, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """The part of one expert's product B A that is added to a stored tensor.

        `a` is (count x r, d_in) and `b` is (d_out, r x count), as peft stores them for all experts.
        `shape`: shape of the stored tensor, for one expert.
        """
        a, b = a.reshape(self.count, -1, a.shape[1]), b.reshape(len(b), -1, self.count)
        a, b = a[expert : expert + 1], b[:, :, expert : expert + 1]
        axes = "e i o" if self.is_transposed else "e o i"
        b_times_a = torch.einsum(f"o r e, e r i -> {axes}", b, a)[0]
        rows, columns = shape[::-1] if self.is_flipped else shape
        part = b_times_a[self.rows.positions(rows)[:, None], self.columns.positions(columns)]
        return part.mT if self.is_flipped else part


def adapted_tensor(model: Any, layer: str, targets: Iterable[str]) -> str:
    """Name of the fused tensor that a LoRA layer of peft adapts.

    `layer`: name of peft's wrapper around the module of the experts, such as
    `model.layers.0.mlp.experts.base_layer`. peft wraps this module once for each of `targets`, in
    the order of the module's parameters. So the name without `.base_layer` is the wrapper of the
    last target, and each `.base_layer` leads to the wrapper of the target before it.
    """
    module_name = layer.replace(".base_layer", "")
    last_parts = {target.rpartition(".")[2] for target in targets}
    names = [name.strip(".") for name in expert_tensors(model.get_submodule(module_name))]
    wrapped = [name for name in names if name in last_parts]
    return f"{module_name}.{wrapped[-1 - layer.count('.base_layer')]}"


def expert_slices(
    model: Any, name: str, stored: StoredAs, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ExpertSlice]:
    """Key of each stored tensor -> the slice of the fused tensor `name` that it holds.

    `shapes`: shapes of the stored tensors. Raises UserError if a stored tensor is not such a slice.
    """
    count = model.get_parameter(name).shape[0]
    experts = model.get_submodule(name.rpartition(".")[0])
    whole = ExpertSlice(count=count, is_transposed=getattr(experts, "is_transposed", False))
    if stored.converter is None:
        return {stored.keys[0]: whole}
    shape = (_ROWS, _COLUMNS) if len(stored.keys) > 1 else (count, _ROWS, _COLUMNS)
    size = torch.Size(shape).numel()
    # the small tensors; their elements are numbered consecutively over all of them
    numbers = {
        key: torch.arange(size).reshape(shape) + i * size for i, key in enumerate(stored.keys)
    }
    model = _WithSmallParameter(model, name, _small_shape(model, name, shapes, numbers))
    fused = built_parameter(model, name, stored, numbers)
    slices = {key: _slice_of(whole, fused, tensor) for key, tensor in numbers.items()}
    if wrong := [key for key, part in slices.items() if part is None]:
        raise UserError(f"{wrong[0]} of the checkpoint is not a slice of {name}")
    return {key: part for key, part in slices.items() if part is not None}


def _small_shape(
    model: Any,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[str, torch.Tensor],
) -> torch.Size:
    """Shape that the parameter would have if its stored tensor had the shape of `numbers`.

    A conversion may compare the shapes of parameter and stored tensor, and transpose the tensor if
    they differ (Qwen3-VL).
    """
    expected = model.get_parameter(name).shape
    key, small = next(iter(numbers.items()))
    if len(numbers) == 1 and len(shapes[key]) == small.dim():
        if shapes[key] == tuple(expected):
            return small.shape
        if shapes[key] == (*expected[:-2], expected[-1], expected[-2]):
            return small.mT.shape
    return torch.Size(expected)


class _WithSmallParameter:
    """A model on the meta device with another shape of one parameter."""

    def __init__(self, model: Any, name: str, shape: torch.Size) -> None:
        self._model, self._name, self._shape = model, name, shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Any:
        """The parameter with this name."""
        if name == self._name:
            return torch.empty(self._shape, device="meta")
        return self._model.get_parameter(name)


def _slice_of(whole: ExpertSlice, fused: torch.Tensor, numbers: torch.Tensor) -> ExpertSlice | None:
    """The slice of `fused` whose elements are `numbers`; None if there is no such slice."""
    first_expert, first_row, first_column = (fused == numbers.flatten()[0]).nonzero()[0].tolist()
    has_one_expert = numbers.dim() < fused.dim()
    target = fused[first_expert] if has_one_expert else fused
    for is_flipped in (False, True):
        stored = numbers.mT if is_flipped else numbers
        possible_rows = _possible_axes(target.shape[-2], stored.shape[-2], first_row)
        possible_columns = _possible_axes(target.shape[-1], stored.shape[-1], first_column)
        for rows, columns in product(possible_rows, possible_columns):
            row_positions = rows.positions(stored.shape[-2])[:, None]
            column_positions = columns.positions(stored.shape[-1])
            if torch.equal(target[..., row_positions, column_positions], stored):
                return replace(
                    whole,
                    expert=first_expert if has_one_expert else None,
                    rows=rows,
                    columns=columns,
                    is_flipped=is_flipped,
                )
    return None


def _possible_axes(whole: int, part: int, first: int) -> list[Axis]:
    """The axes of length `part` that begin at index `first` of a fused axis of length `whole`."""
    num_parts, remainder = divmod(whole, part)
    if remainder:
        return []
    axes = []
    if first % part == 0:
        axes.append(Axis(num_parts, first // part))
    if num_parts > 1 and first < num_parts:
        axes.append(Axis(num_parts, first, is_interleaved=True))
    return axes
