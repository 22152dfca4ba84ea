"""Linear layers whose adapter peft would load onto other layers, or not at all."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn


def rewritten_by_peft(model: nn.Module, decoder: nn.Module) -> list[str]:
    """Last parts of names, such as `gate_proj`, of layers that peft would not adapt.

    These are linear layers of the text decoder. For some model types, peft 0.21.2 replaces a target
    module such as `gate_proj` by the experts of the block, both when it attaches an adapter and
    when it loads one. It also applies transformers' conversion table to the keys of an adapter
    file, which renames some layers of Laguna.
    """
    inside = set(decoder.modules())
    names_by_last_part: defaultdict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module in inside:
            names_by_last_part[name.rsplit(".", 1)[-1]].append(name)
    return [
        last_part
        for last_part, names in names_by_last_part.items()
        if not _is_loaded_unchanged(model, last_part, names)
    ]


def _is_loaded_unchanged(model: nn.Module, target: str, names: Sequence[str]) -> bool:
    """Whether peft loads an adapter on this target onto the layers with these names."""
    config = LoraConfig(target_modules=[target])
    keys = [f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB"]
    try:
        convert_peft_config_for_transformers(config, model, None)
        if list(config.target_modules or ()) != [target]:
            return False
        tensors = {key: torch.empty(1, 1) for key in keys}
        loaded = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    except ValueError:  # peft raises it for gate_proj without up_proj
        return False
    return loaded.keys() == set(keys)
