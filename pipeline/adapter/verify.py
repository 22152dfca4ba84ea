"""Verification of an adapter's tensors: keys, shapes, finite values, trained lora_B.

There are two reasons. At ZeRO-3 peft writes empty tensors with only a warning (peft 0.21.2). And an
adapter whose lora_B matrices are still zero loads without an error but has no effect. Keys are the
keys of peft's adapter file.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import RankZeroError, first_few

Shapes = Mapping[str, tuple[int, ...]]


def verify_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Shapes, *, is_trained: bool
) -> None:
    """Verify a gathered adapter. Raises RankZeroError for wrong keys, shapes or values.

    `expected`: shape of the tensor of each key. `is_trained`: also require that no lora_B is zero,
    which is its initial value.
    """
    _verify(
        "the gathered adapter", tensors.keys(), tensors.__getitem__, expected, is_trained=is_trained
    )


def verify_gradients(moments: Mapping[str, torch.Tensor]) -> None:
    """Raise RankZeroError if a moment of Adam is zero: then no gradient reached its parameter.

    This check is for modules that are trained in full. Their initial values are not zero, so
    `verify_tensors` cannot detect that they were not trained.
    """
    if zeros := [key for key, moment in moments.items() if not moment.any()]:
        raise RankZeroError(
            f"the moments of {len(zeros)} of {len(moments)} tensors are zero: no gradient reached "
            f"{first_few(zeros)}"
        )


def verify_adapter_file(path: Path, expected: Shapes, *, is_trained: bool) -> None:
    """Verify a written adapter file; only one tensor at a time is in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            _verify(str(path), file.keys(), file.get_tensor, expected, is_trained=is_trained)
    except (OSError, SafetensorError) as error:
        raise RankZeroError(f"{path}: the written adapter cannot be read back: {error}") from error


def _verify(
    name: str,
    keys: Iterable[str],
    read: Callable[[str], torch.Tensor],
    expected: Shapes,
    *,
    is_trained: bool,
) -> None:
    """Verify the tensors with these keys. `name`: their origin, for messages."""
    present = set(keys)
    problems = [f"{key} is missing" for key in expected if key not in present]
    problems += [f"{key} is unexpected" for key in sorted(present - expected.keys())]
    zeros = []
    for key, shape in expected.items():
        if key not in present:
            continue
        tensor = read(key)
        if problem := _problem(tensor, shape):
            problems.append(f"{key} {problem}")
        elif is_trained and key.endswith(".lora_B.weight") and not tensor.any():
            zeros.append(key)
    if problems:
        raise RankZeroError(
            f"{name} is damaged, {len(problems)} tensors are wrong: {first_few(problems, '; ')}"
        )
    if zeros:
        num_matrices = sum(key.endswith(".lora_B.weight") for key in expected)
        raise RankZeroError(
            f"{name}: {len(zeros)} of {num_matrices} lora_B matrices are zero, their initial "
            f"value: no gradient reached {first_few(zeros)}"
        )


def _problem(tensor: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a tensor is wrong; None if it has this shape and finite values."""
    actual = tuple(tensor.shape)
    if actual != shape and tensor.numel() == 0:
        return f"has shape {actual} instead of {shape}: an ungathered ZeRO-3 placeholder"
    if actual != shape:
        return f"has shape {actual} instead of {shape}"
    num_wrong = tensor.numel() - int(tensor.isfinite().sum())
    return f"has {num_wrong} of {tensor.numel()} values that are not finite" if num_wrong else None
