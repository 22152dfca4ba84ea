"""Verify an adapter, gathered or written: keys, shapes, finite values, trained lora_B.

Under ZeRO-3 peft itself writes empty tensors with only a warning (peft 0.21.2), and an adapter
whose lora_B is still zero loads everywhere and has no effect. Keys are those of peft's file.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import RankZeroError

_NAMED = 3  # bad tensors that a message names

Shapes = Mapping[str, tuple[int, ...]]


def verify_tensors(tensors: Mapping[str, torch.Tensor], expected: Shapes, *, trained: bool) -> None:
    """Raise RankZeroError unless keys, shapes and values are right.

    `trained`: every lora_B, which is initialised with zeros, must have been updated.
    """
    _verify("the gathered adapter", tensors.keys(), tensors.__getitem__, expected, trained=trained)


def verify_adapter_file(path: Path, expected: Shapes, *, trained: bool) -> None:
    """Verify a written safetensors file, one tensor in memory at a time."""
    try:
        with safe_open(path, framework="pt") as file:
            _verify(str(path), file.keys(), file.get_tensor, expected, trained=trained)
    except (OSError, SafetensorError) as error:
        raise RankZeroError(f"{path}: the written adapter cannot be read back: {error}") from error


def _verify(
    what: str,
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
            f"{what} is damaged, {len(damages)} tensors are wrong: {_some(damages)}"
        )
    if zeros:
        matrices = sum(key.endswith(".lora_B.weight") for key in expected)
        raise RankZeroError(
            f"{what}: {len(zeros)} of {matrices} lora_B matrices are zero, as initialised: no "
            f"gradient reached {_some(zeros)}"
        )


def _damage(tensor: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    actual = tuple(tensor.shape)
    if actual != shape and tensor.numel() == 0:
        return f"has shape {actual} instead of {shape}: an ungathered ZeRO-3 placeholder"
    if actual != shape:
        return f"has shape {actual} instead of {shape}"
    bad = tensor.numel() - int(tensor.isfinite().sum())
    return f"has {bad} of {tensor.numel()} values that are not finite" if bad else None


def _some(items: list[str]) -> str:
    more = f"; and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more
