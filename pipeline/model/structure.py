"""Parts of any causal language model of transformers: body, text decoder, blocks.

The body is the child module that contains the embeddings. The text decoder is the body, or a module
inside the body if the model has a vision tower. A block is one layer of the text decoder.
"""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def body_name(causal: Any) -> str:
    """Name of the child of a causal model that contains its embeddings."""
    embeddings = causal.get_input_embeddings()
    for name, child in causal.named_children():
        if any(module is embeddings for module in child.modules()):
            return str(name)
    raise ValueError(f"{type(causal).__name__}: no child module contains the embeddings")


def text_decoder(causal: Any) -> Any:
    """The text decoder, a module from token ids to last hidden states."""
    decoder = causal.get_decoder()
    if decoder is causal:  # get_decoder() of Llama 4 returns the whole model (transformers 5.23)
        return getattr(causal, body_name(causal))
    return decoder


def blocks(causal: Any) -> list[nn.Module]:
    """The layers of the text decoder, without the layers of a vision tower."""
    modules = text_decoder(causal).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
