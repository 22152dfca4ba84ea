"""Presets: named sets of values for settings, from the rules of thumb in docs/lora.md.

If the rule of thumb is a range, the preset has its lower end, and RANGES has both ends.
"""

from collections.abc import Mapping
from typing import Any, Literal

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


def preset_for(rows: int) -> Preset:
    """The preset for a training set with this number of rows."""
    if rows < 1_000:
        return "small"
    return "medium" if rows <= 10_000 else "large"
