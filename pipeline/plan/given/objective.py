"""Whether a checkpoint is a causal language model, from config.json.

It must have causal attention and a language-model head.
"""

import re
from collections.abc import Mapping
from typing import Any

# Keys of config.json that decide whether tokens attend to later tokens -> values of causal models.
_CAUSAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    # "vision" (Gemma 4): bidirectional only within the tokens of an image
    "use_bidirectional_attention": (None, False, "vision"),
    "is_encoder_decoder": (None, False),
}
# Names of classes in config.json: of models with bidirectional attention, and of models with a
# language-model head.
_BIDIRECTIONAL = re.compile(r"bidirec|bimodel|ForMaskedLM$", re.IGNORECASE)
_LANGUAGE_HEAD = re.compile(r"CausalLM|LMHead|ConditionalGeneration$")
# A backbone without any head; it has the weights of the language model except `lm_head`.
_BACKBONE = re.compile(r"Model$")


def bidirectional_entry(config: Mapping[str, Any]) -> str:
    """The entry of config.json that makes attention bidirectional; empty if it is causal."""
    for key, causal_values in _CAUSAL_VALUES.items():
        if config.get(key) not in causal_values:
            return f"{key}: {config[key]}"
    for name in _classes(config):
        if _BIDIRECTIONAL.search(name):
            return f"architectures: {name}"
    return ""


def other_head(config: Mapping[str, Any], *, is_tied: bool) -> str:
    """The class in config.json if it has no language-model head; empty if it has one.

    A backbone with tied embeddings has a head: the embedding matrix. A class in the model's own
    code may have any name, so the result for it is empty.
    """
    classes = _classes(config)
    if not classes or "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return ""
    if any(_LANGUAGE_HEAD.search(name) for name in classes):
        return ""
    are_backbones = all(_BACKBONE.search(name) and "Reward" not in name for name in classes)
    if is_tied and are_backbones:
        return ""
    return f"architectures: {', '.join(classes)}"


def _classes(config: Mapping[str, Any]) -> list[str]:
    """The names of classes in config.json."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
