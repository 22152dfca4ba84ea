"""Parts of any causal language model of transformers: body, text decoder, blocks, experts.

The body is the child module that contains the embeddings, such as `model`. The text decoder is the
body, or a module inside the body if the model has a vision tower. A block is one layer of the text
decoder.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
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
    """The layers of the text decoder, without those of a vision tower.

    A layer may contain others (Zamba 2): only the outer one is a block. A vision tower may be a
    model inside the decoder (Phi 4 multimodal): its layers are not blocks.
    """
    decoder = text_decoder(causal)
    outer: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in decoder.modules():
        if isinstance(module, PreTrainedModel) and module is not decoder:
            inside.update(module.modules())
    for module in decoder.modules():  # an outer layer comes before those inside it
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            outer.append(module)
            inside.update(module.modules())
    return outer


def num_blocks_with(modules: Collection[nn.Module], layers: Sequence[nn.Module]) -> int:
    """Number of blocks that contain at least one of the modules."""
    return sum(any(module in modules for module in layer.modules()) for layer in layers)


def expert_tensors(module: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Fused expert tensors inside a module: name -> the module that holds the tensor, the tensor.

    A fused tensor has the weights of all experts of a block. It is recognised by its three
    dimensions (the first is the expert), and by `expert` in the name or class of its module: the
    gates of RecurrentGemma also have three dimensions.
    """
    return {
        f"{name}.{key}": (child, parameter)
        for name, child in module.named_modules()
        for key, parameter in child.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{name} {type(child).__name__}".lower()
    }


def lora_sizes(module: nn.Module, parameter: nn.Parameter) -> tuple[int, int, int]:
    """Number of experts in a fused tensor of a module, and input and output width of one expert.

    LoRA's A is (r x experts, d_in) and B is (d_out, r x experts) (peft 0.21.2 tuners/lora/layer.py
    ParamWrapper.update_layer).
    """
    count, rows, columns = parameter.shape
    if getattr(module, "is_transposed", False):
        return count, rows, columns
    return count, columns, rows
