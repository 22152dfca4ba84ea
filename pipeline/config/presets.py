"""Presets: named sets of values for settings, from the rules of thumb in docs/lora.md.

If a rule of thumb is a range, the preset has the lower value, and `RANGES` has the range.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

Preset = Literal[
    "conservative", "balanced", "aggressive", "small", "medium", "large", "memory-constrained",
    "speed-optimized",
]  # fmt: skip

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "conservative": {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1},
    "balanced": {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05},
    "aggressive": {"lora_r": 128, "lora_alpha": 256, "lora_dropout": 0.05},
    "small": {"epochs": 3, "lora_r": 16, "lora_dropout": 0.1, "lr": 1e-4},
    "medium": {"epochs": 2, "lora_r": 64, "lora_dropout": 0.05, "lr": 2e-4},
    "large": {"epochs": 1, "lora_r": 64, "lora_dropout": 0.05, "lr": 2e-4},
    "memory-constrained": {
        "load_in_4bit": True,
        "gradient_checkpointing": True,
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
    },
    "speed-optimized": {
        "bf16": True,
        "use_flash_attention": True,
        "gradient_checkpointing": False,
        "batch_size": 4,
        "dataloader_num_workers": 4,
    },
}

RANGES: Mapping[Preset, Mapping[str, tuple[int, int]]] = {
    "small": {"epochs": (3, 5), "lora_r": (16, 32)},
    "medium": {"epochs": (2, 3)},
    "large": {"epochs": (1, 2), "lora_r": (64, 128)},
    "speed-optimized": {"batch_size": (4, 8)},
}

# Key of a preset -> key of the run file that replaces it. The two exclude each other, or they
# determine the same quantity, such as the length of the run.
_REPLACED_BY = {
    "epochs": "max_steps",
    "gradient_accumulation_steps": "global_batch_size",
    "load_in_4bit": "load_in_8bit",
    "bf16": "fp16",
}


def preset_values(names: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The merged values of presets; later presets override earlier ones.

    `given`: the user's own values. A key of a preset is left out if the user has set the key that
    replaces it (_REPLACED_BY). Unknown names are ignored here; RunSettings refuses them.
    """
    values: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        if name in get_args(Preset):
            values |= PRESETS[name]
    replaced = {key for key, other in _REPLACED_BY.items() if _is_set(other, given)}
    return {key: value for key, value in values.items() if key not in replaced}


def replaced_preset_values(names: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """Mapping from each key whose preset value a run does not have to the reason."""
    values = preset_values(names, {})
    return {
        key: f"{other} is set, which replaces the preset's {key}: {values[key]}"
        for key, other in _REPLACED_BY.items()
        if key in values and settings[key] != values[key] and _is_set(other, settings)
    }


def _is_set(key: str, values: Mapping[str, Any]) -> bool:
    return values.get(key) not in (None, False, "auto")


def preset_for(rows: int) -> Preset:
    """The preset for a training set with this number of rows."""
    if rows < 1_000:
        return "small"
    return "medium" if rows <= 10_000 else "large"
