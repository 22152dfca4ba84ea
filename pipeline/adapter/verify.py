"""Verification of an adapter's tensors: keys, shapes, finite values, trained lora_B.

It is needed because at ZeRO-3 peft writes empty tensors with only a warning (peft 0.21.2), and
because an adapter whose lora_B matrices are still zero loads without an error but has no effect.
Keys are the keys of peft's adapter file.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import RankZeroError, first_few

Shapes = Mapping[str, tuple[int, ...]]


def verify_tensors(tensors: Mapping[str, torch.Tensor], expected: Shapes, *, trained: bool) -> None:
    """Verify a gathered adapter. Raises RankZeroError for wrong keys, shapes or values.

    `trained`: also require that no lora_B is zero, which is its initial value.
    """
    _verify("the gathered adapter", tensors.keys(), tensors.__getitem__, expected, trained=trained)


def verify_gradients(moments: Mapping[str, torch.Tensor]) -> None:
    """Raise RankZeroError if a moment of Adam is zero, so that no gradient reached its parameter.

    It is needed for modules that are trained in full, whose initial values are not zero.
    """
    if zeros := [key for key, moment in moments.items() if not moment.any()]:
        raise RankZeroError(
            f"the moments of {len(zeros)} of {len(moments)} tensors are zero: no gradient reached "
            f"{first_few(zeros)}"
        )


def verify_adapter_file(path: Path, expected: Shapes, *, trained: bool) -> None:
    """Verify a written adapter file; only one tensor at a time is in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            _verify(str(path), file.keys(), file.get_tensor, expected, trained=trained)
    except (OSError, SafetensorError) as error:
        raise RankZeroError(f"{path}: the written adapter cannot be read back: {error}") from error


def _verify(
    name: str,
    keys: Iterable[str],
    read: Callable[[str], torch.Tensor],
    expected: Shapes,
    *,
    trained: bool,
) -> None:
    present = set(keys)
    damages = [f"{key} is missing" for key in expected if key not in present]
    damages += [f"{key} is unexpected" for key in sorted(present - expected.keys())]
    zeros = []
    for key, shape in expected.items():
        if key not in present:
            continue
        tensor = read(key)
        if damage := _damage(tensor, shape):
            damages.append(f"{key} {damage}")
        elif trained and key.endswith(".lora_B.weight") and not tensor.any():
            zeros.append(key)
    if damages:
        raise RankZeroError(
            f"{name} is damaged, {len(damages)} tensors are wrong: {first_few(damages, '; ')}"
        )
    if zeros:
        matrices = sum(key.endswith(".lora_B.weight") for key in expected)
        raise RankZeroError(
            f"{name}: {len(zeros)} of {matrices} lora_B matrices are zero, their initial value: "
            f"no gradient reached {first_few(zeros)}"
        )


def _damage(tensor: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    actual = tuple(tensor.shape)
    if actual != shape and tensor.numel() == 0:
        return f"has shape {actual} instead of {shape}: an ungathered ZeRO-3 placeholder"
    if actual != shape:
        return f"has shape {actual} instead of {shape}"
    bad = tensor.numel() - int(tensor.isfinite().sum())
    return f"has {bad} of {tensor.numel()} values that are not finite" if bad else None
