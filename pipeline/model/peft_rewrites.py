"""Linear layers whose adapter plain peft would not load as it was trained."""

from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn


def rewritten_by_peft(model: nn.Module, decoder: nn.Module) -> list[str]:
    """Last parts of the names of such layers in a text decoder.

    peft 0.21.2 adapts fused experts instead of some layers, when it attaches and when it loads an
    adapter. It also applies transformers' conversion table to the keys of an adapter's file, which
    renames some layers of Laguna.
    """
    inside = set(decoder.modules())
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and m in inside]
    ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return [
        end
        for end in ends
        if not _is_read_back(model, end, [name for name in names if name.endswith(f".{end}")])
    ]


def _is_read_back(model: nn.Module, target: str, names: Sequence[str]) -> bool:
    """Whether peft loads an adapter on a target under the names of its layers."""
    config = LoraConfig(target_modules=[target])
    keys = [f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB"]
    try:
        convert_peft_config_for_transformers(config, model, None)
        if list(config.target_modules or ()) != [target]:
            return False
        tensors = {key: torch.empty(1, 1) for key in keys}
        read = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    except ValueError:  # gate_proj without up_proj
        return False
    return read.keys() == set(keys)
