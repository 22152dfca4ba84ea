"""Longest document that a model's position encoding supports, from config.json. No torch.

Rope is the rotary position embedding. Rope scaling extends it beyond the length of pre-training.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.given.families import Config


def require_window(config: Config) -> None:
    """Raise UserError if a layer has sliding-window attention but config.json has no window."""
    has_window = config.get("sliding_window", True) and config.get("use_sliding_window", True)
    if "sliding_attention" in (config.get("layer_types") or ()) and not has_window:
        raise UserError(
            "layer_types has sliding_attention, but sliding_window is not set or "
            "use_sliding_window is false, so the model cannot run; set both, or layer_types to "
            "full_attention"
        )


def max_positions(config: Config) -> int | None:
    """Longest document in tokens that the position encoding supports, rope scaling included."""
    if not config.get("max_position_embeddings"):
        return None
    lengths = [int(config["max_position_embeddings"])]
    for rope in _rope_settings(config):
        factor = rope.get("factor") if _rope_type(rope) != "default" else None
        lengths.append(int(_original_length(config, rope) * float(factor or 1)))
    return max(lengths)


def rope_original_length(config: Config) -> int | None:
    """Length in tokens beyond which rope depends on the longest document; None if it never does."""
    lengths = [
        _original_length(config, rope)
        for rope in _rope_settings(config)
        if _rope_type(rope) in ("dynamic", "longrope", "su")
    ]
    return min(lengths, default=0) or None


def _rope_settings(config: Config) -> list[Mapping[str, Any]]:
    """The settings of rotary embeddings: one mapping, or one for each layer type (Gemma 3)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"rope_parameters or rope_scaling: expected an object, not {rope!r}")
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _original_length(config: Config, rope: Mapping[str, Any]) -> int:
    """Length in tokens before any rope scaling; 0 if it is not known."""
    key = "original_max_position_embeddings"
    original = rope.get(key) or config.get(key) or config.get("max_position_embeddings")
    return int(original or 0)
