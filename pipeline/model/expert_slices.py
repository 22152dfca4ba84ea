"""Slices of fused expert tensors: the part of a fused tensor that each checkpoint tensor holds.

A checkpoint may store a tensor for each expert and projection, which transformers stacks and
concatenates, or the fused tensor itself. The slices are found by running transformers' own
conversion on small tensors of element numbers, so that no kind of conversion is assumed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.model.checkpoint_names import StoredAs, built_parameter
from pipeline.model.structure import expert_tensors

_ROWS, _COLUMNS = 4, 6  # of the small tensors: even, for conversions that interleave halves


@dataclass(frozen=True)
class Axis:
    """The part of one axis of a fused tensor that a stored tensor holds.

    The fused axis is `parts` times as long. For example, the rows of gate_proj and up_proj are the
    parts 0 and 1 (`index`) of gate_up_proj. Row i of a part is row i + `index` x (rows of a part)
    of the fused tensor or, if `is_interleaved`, row i x `parts` + `index`.
    """

    parts: int = 1
    index: int = 0
    is_interleaved: bool = False

    def positions(self, length: int) -> torch.Tensor:
        """Positions on the fused axis of a stored axis with this length."""
        elements = torch.arange(length)
        if self.is_interleaved:
            return elements * self.parts + self.index
        return elements + self.index * length


@dataclass(frozen=True, kw_only=True)
class ExpertSlice:
    """Part of a fused tensor of `count` experts (expert, row, column) that one stored tensor holds.

    `expert`: None if the stored tensor has all experts. `is_flipped`: its last two axes are those
    of the fused tensor in reverse order. `is_transposed`: rows of the fused tensor are inputs.
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
        """The product B A of one expert, in the slice and orientation of a stored tensor.

        `a` is (count x r, d_in) and `b` is (d_out, r x count), as peft stores them; `shape`: of the
        stored tensor, for one expert. The product is the same as that of peft for all experts.
        """
        a, b = a.reshape(self.count, -1, a.shape[1]), b.reshape(len(b), -1, self.count)
        a, b = a[expert : expert + 1], b[:, :, expert : expert + 1]
        axes = "e i o" if self.is_transposed else "e o i"
        product = torch.einsum(f"o r e, e r i -> {axes}", b, a)[0]
        rows, columns = shape[::-1] if self.is_flipped else shape
        part = product[self.rows.positions(rows)[:, None], self.columns.positions(columns)]
        return part.mT if self.is_flipped else part


def adapted_tensor(model: Any, layer: str, targets: Iterable[str]) -> str:
    """Name of the fused tensor that a LoRA layer of peft adapts.

    peft wraps the module that holds the tensors once for each of `targets`, in the order of the
    module's parameters. The last wrapper is the outermost, and each `.base_layer` in the name leads
    one wrapper further inside.
    """
    holder, ends = layer.replace(".base_layer", ""), {name.rpartition(".")[2] for name in targets}
    names = [name.strip(".") for name in expert_tensors(model.get_submodule(holder))]
    wrapped = [name for name in names if name in ends]
    return f"{holder}.{wrapped[-1 - layer.count('.base_layer')]}"


def expert_slices(
    model: Any, name: str, stored: StoredAs, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ExpertSlice]:
    """The slice of the fused tensor `name` that each stored tensor holds, by its key.

    `shapes`: of the stored tensors. Raises UserError if a stored tensor is not such a slice.
    """
    count = model.get_parameter(name).shape[0]
    holder = model.get_submodule(name.rpartition(".")[0])
    whole = ExpertSlice(count=count, is_transposed=getattr(holder, "is_transposed", False))
    if stored.converter is None:
        return {stored.keys[0]: whole}
    shape = (_ROWS, _COLUMNS) if len(stored.keys) > 1 else (count, _ROWS, _COLUMNS)
    size = torch.Size(shape).numel()
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
    """Shape of the parameter if its stored tensor had the shape of `numbers`.

    A conversion may compare the two shapes, and transpose if they differ (Qwen3-VL).
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
    """The slice of `fused` whose elements are `numbers`; None if they are not one."""
    experts, rows, columns = (fused == numbers.flatten()[0]).nonzero()[0].tolist()
    one_expert = numbers.dim() < fused.dim()
    target = fused[experts] if one_expert else fused
    for is_flipped in (False, True):
        stored = numbers.mT if is_flipped else numbers
        axes = [
            _possible_axes(length, part, first)
            for length, part, first in zip(
                target.shape[-2:], stored.shape[-2:], (rows, columns), strict=True
            )
        ]
        if None in axes:
            continue
        for row_axis, column_axis in _axis_pairs(axes):
            positions = (
                row_axis.positions(stored.shape[-2]),
                column_axis.positions(stored.shape[-1]),
            )
            if torch.equal(target[..., positions[0][:, None], positions[1]], stored):
                return replace(
                    whole,
                    expert=experts if one_expert else None,
                    rows=row_axis,
                    columns=column_axis,
                    is_flipped=is_flipped,
                )
    return None


def _possible_axes(whole: int, part: int, first: int) -> list[Axis] | None:
    """The axes of length `part` that begin at index `first` of a fused axis of length `whole`."""
    parts, rest = divmod(whole, part)
    if rest:
        return None
    contiguous = [Axis(parts, first // part)] if first % part == 0 else []
    return contiguous + ([Axis(parts, first, True)] if parts > 1 and first < parts else [])


def _axis_pairs(axes: list[list[Axis] | None]) -> Iterable[tuple[Axis, Axis]]:
    rows, columns = (axis or [] for axis in axes)
    return [(row, column) for row in rows for column in columns]
