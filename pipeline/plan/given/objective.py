"""The training objective of a checkpoint, as config.json states it: causal, and with which head."""

import re
from collections.abc import Mapping
from typing import Any

# Keys of config.json that decide whether a token attends to later ones, and the value for causal.
_CAUSAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    # "vision" (Gemma 4) applies only to the tokens of images
    "use_bidirectional_attention": (None, False, "vision"),
    "is_encoder_decoder": (None, False),
}
_BIDIRECTIONAL = re.compile(r"bidirec|bimodel|ForMaskedLM$", re.IGNORECASE)
_LANGUAGE_HEAD = re.compile(r"CausalLM|LMHead|ConditionalGeneration$")
# Backbone without any head: its weights are those of the language model except `lm_head`.
_BACKBONE = re.compile(r"Model$")


def bidirectional(config: Mapping[str, Any]) -> str:
    """The entry of config.json by which tokens attend to later tokens; empty if it is causal."""
    for key, causal in _CAUSAL_VALUES.items():
        if config.get(key) not in causal:
            return f"{key}: {config[key]}"
    return next((f"architectures: {x}" for x in _classes(config) if _BIDIRECTIONAL.search(x)), "")


def other_head(config: Mapping[str, Any], *, is_tied: bool) -> str:
    """The class of a checkpoint that has no language-model head; empty if it has one.

    A backbone with tied embeddings has one: the head is the embedding matrix. A class of the
    model's own code is not assessed by its name.
    """
    classes = _classes(config)
    if not classes or "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return ""
    if any(_LANGUAGE_HEAD.search(name) for name in classes):
        return ""
    if is_tied and all(_BACKBONE.search(name) and "Reward" not in name for name in classes):
        return ""
    return f"architectures: {', '.join(classes)}"


def _classes(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
