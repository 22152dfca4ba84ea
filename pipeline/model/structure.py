"""Parts of any causal language model of transformers: body, text decoder, blocks.

Body: the child of the model that holds the embeddings. Decoder: the text decoder, which is the
body, or a module inside it if the model has a vision tower. Block: one layer of the decoder.
"""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def body_name(causal: Any) -> str:
    """Name of the child of a causal model that holds its embeddings."""
    embeddings = causal.get_input_embeddings()
    for name, child in causal.named_children():
        if any(module is embeddings for module in child.modules()):
            return str(name)
    raise ValueError(f"{type(causal).__name__}: no child holds the embeddings")


def text_decoder(causal: Any) -> Any:
    """The decoder: token ids in, last hidden states out."""
    decoder = causal.get_decoder()
    if decoder is causal:  # Llama 4 (transformers 5.23)
        return getattr(causal, body_name(causal))
    return decoder


def blocks(causal: Any) -> list[nn.Module]:
    """The layers of the decoder, without those of a vision tower."""
    modules = text_decoder(causal).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
