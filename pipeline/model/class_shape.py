"""Model shape, derived from the model's class, which is built on the meta device without weights.

    python -m pipeline.model.class_shape MODEL_FOLDER [--trust-remote-code]

prints the shape as JSON, or the reason why the class is refused or cannot be built.
plan/given/class_shape.py runs this command for a `model_type` that is not in the table
plan/given/families.py.

A block is a layer of the text decoder. A forward pass on the meta device shows which linear layers
are called, and which tensors autograd saves for backward (class_activations.py).
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from pipeline.model.class_activations import (
    COUNTED,
    RefusedClassError,
    document_receivers,
    saved_per_block,
)
from pipeline.model.peft_rewrites import rewritten_by_peft
from pipeline.model.structure import (
    blocks,
    expert_tensors,
    lora_sizes,
    num_blocks_with,
    text_decoder,
)

# Config keys for the number of experts per token in transformers 5.23.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
# Class names of modules that select or compress the keys to which a token attends.
_SELECTS_KEYS = re.compile(r"(Indexer|Compressor)$")


def derive_shape(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The model shape in the form that plan/given/class_shape.py reads.

    Raises RefusedClassError for a class that is known not to be trainable here.
    """
    model = _build(folder, trust_remote_code=trust_remote_code)
    decoder = text_decoder(model)
    names = {module: name for name, module in model.named_modules()}
    layers = blocks(model)
    _require_trainable(decoder, layers)
    configs = model.config.get_text_config(decoder=True).per_layer_config
    if len(configs) < len(layers):
        raise RefusedClassError(
            f"its decoder has {len(layers)} blocks, but config.json has the sizes of {len(configs)}"
        )
    with _observed_linears() as observed, _observed_inputs(layers) as input_values:
        counts = saved_per_block(model, decoder, layers)
    _require_all_blocks_called(layers, observed)
    linears = _block_linears(layers, observed)
    sizes = [
        _block_sizes(layer, configs[index]) | {"linears": linears[index]} | counts[index]
        for index, layer in enumerate(layers)
    ]
    for layer, block in zip(layers, sizes, strict=True):
        if (values := input_values.get(layer, 0)) > block["hidden_size"]:
            block["input_values"] = values
    sizes_as_text = [json.dumps(block) for block in sizes]  # hashable, to find equal blocks
    kinds = list(dict.fromkeys(sizes_as_text))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    receivers = document_receivers(decoder)
    return {
        "layers_name": names[layers[0]].rpartition(".")[0],
        "embeddings_name": _name_of_width(names, embeddings, sizes[0]["hidden_size"]),
        "head_name": _name_of_width(names, head, sizes[0]["hidden_size"]),
        "vocab_size": embeddings.weight.shape[0],
        "is_tied": head.weight is embeddings.weight,
        "has_other_towers": _has_other_towers(model, decoder, head),
        "has_head_bias": getattr(head, "bias", None) is not None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_other": _largest_other(model, (*layers, embeddings, head)),
        "rewritten_by_peft": rewritten_by_peft(model, decoder),
        "separate_blocks": num_blocks_with(receivers, layers),
        "mixing_modules": _mixing_modules(receivers, layers),
        "blocks": [json.loads(kind) for kind in kinds],
        "layer_kinds": [kinds.index(text) for text in sizes_as_text],
    }


def _largest_other(model: nn.Module, modules: Sequence[nn.Module]) -> int:
    """Values of the largest parameter outside these modules.

    Gemma 3n has one of 2 billion values: the embeddings that each block adds.
    """
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return max((p.numel() for p in model.parameters() if id(p) not in inside), default=0)


def _name_of_width(names: Mapping[nn.Module, str], module: Any, width: int) -> str:
    """The name of the embeddings or the head; empty if their width is not that of the blocks."""
    return names.get(module, "") if module.weight.shape[1] == width else ""


def _build(folder: Path, *, trust_remote_code: bool) -> Any:
    """Build the model on the meta device, with the auto class that supports its config."""
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise RefusedClassError(
            "its class is code in the model's folder: read that code, and set trust_remote_code: "
            "true in the run file if you trust it"
        ) from None
    if config.is_encoder_decoder:
        raise RefusedClassError(
            "it is an encoder-decoder (is_encoder_decoder: true in config.json), and only models "
            "with a decoder alone are trained here"
        )
    has_own_code = trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if has_own_code or type(config) in auto._model_mapping:
            with torch.device("meta"):
                try:
                    model = auto.from_config(  # type: ignore[no-untyped-call]
                        config, attn_implementation=COUNTED, **options
                    )
                except KeyError as error:
                    if error.args != (COUNTED,):
                        raise
                    raise RefusedClassError(_own_attention_message(config.model_type)) from None
            # A decoder must call the attention function that `attn_implementation` names. One that
            # computes attention itself (Bloom) is refused: our attention function needs no mask, so
            # transformers would give the decoder none, and its tokens would attend to later ones. A
            # vision tower may compute attention itself (GOT-OCR 2).
            decoder = text_decoder(model)
            if not isinstance(decoder, PreTrainedModel):
                decoder = model
            if not decoder._can_set_attn_implementation():
                names = sorted({type(m).__name__ for m in decoder.modules()})
                own = [name for name in names if name.endswith("Attention")]
                raise RefusedClassError(_own_attention_message(", ".join(own) or config.model_type))
            return model.requires_grad_(False)
    raise RefusedClassError(f"{config.model_type} is not a causal language model of transformers")


def _own_attention_message(name: str) -> str:
    """Message about a class that computes attention itself; `name`: the class or model_type."""
    return (
        f"{name} computes attention without transformers' attention interface, so attention within "
        "documents cannot replace it"
    )


def _require_trainable(decoder: Any, layers: Sequence[nn.Module]) -> None:
    """Raise RefusedClassError with the reason for blocks that cannot be trained here."""
    names = sorted({type(module).__name__ for module in decoder.modules()})
    if selecting := [name for name in names if _SELECTS_KEYS.search(name)]:
        raise RefusedClassError(
            f"its attention chooses or compresses keys ({selecting[0]}); only full, sliding and "
            "chunked attention is implemented here"
        )
    if not layers:
        raise RefusedClassError(
            "the layers of its decoder are not of transformers' class GradientCheckpointingLayer, "
            "so they cannot be recognised as blocks and checkpointed"
        )
    if not any(type(module) is nn.Linear for layer in layers for module in layer.modules()):
        others = sorted({type(m).__name__ for m in layers[0].modules() if hasattr(m, "weight")})
        raise RefusedClassError(f"its blocks have no nn.Linear to adapt, but {', '.join(others)}")


def _require_all_blocks_called(layers: Sequence[nn.Module], observed: "_Observed") -> None:
    """Raise RefusedClassError if text does not pass through a block (Mllama's cross-attention)."""
    used = observed.called | observed.weights_read
    uncalled = []
    for index, layer in enumerate(layers):
        linears = [module for module in layer.modules() if type(module) is nn.Linear]
        if linears and not any(linear in used for linear in linears):
            uncalled.append(f"{index} ({type(layer).__name__})")
    if uncalled:
        raise RefusedClassError(
            f"{len(uncalled)} of its {len(layers)} blocks are not called for text without images,"
            f" the first is {uncalled[0]}; only models whose blocks all process text are trained"
        )


def _has_other_towers(model: Any, decoder: Any, head: Any) -> bool:
    """Whether the model has linear layers outside decoder and head, such as a vision tower."""
    inside = {head, *decoder.modules()}
    return any(type(m) is nn.Linear and m not in inside for m in model.modules())


def _block_sizes(layer: nn.Module, config: Any) -> dict[str, Any]:
    """Sizes of the heads, norms and experts of a block, and its number of parameters."""
    experts = expert_tensors(layer)
    dims: list[Any] = [
        m.counted_head_dims for m in layer.modules() if hasattr(m, "counted_head_dims")
    ]
    key_dim, value_dim = dims[0] if dims else (0, 0)
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    return {
        "hidden_size": config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "num_norms": sum(
            m.weight.numel() == config.hidden_size
            for n, m in layer.named_modules()
            if "norm" in n and isinstance(getattr(m, "weight", None), nn.Parameter)
        ),
        "norm_kind": "layer" if any(type(m) is nn.LayerNorm for m in layer.modules()) else "rms",
        "experts": [[name, *lora_sizes(*tensor)] for name, tensor in experts.items()],
        "experts_per_token": _experts_per_token(config) if experts else 0,
        "parameters": sum(p.numel() for p in layer.parameters()),
    } | ({"key_dim": key_dim} if key_dim > value_dim else {})


@dataclass
class _Observed:
    """Linear layers that were called, and those whose weight was read outside their own call."""

    called: set[nn.Module] = field(default_factory=set)
    weights_read: set[nn.Module] = field(default_factory=set)


@contextmanager
def _observed_linears() -> Iterator[_Observed]:
    """Observe all linear layers while this context is active.

    A class may read a weight without calling its layer: Gemma 3n clamps one in place. An adapter
    has no effect on such a read, and a 4-bit weight has another type and shape.
    """
    observed, running = _Observed(), set[nn.Module]()
    forward, read_attribute = nn.Linear.forward, nn.Module.__getattr__

    def observed_forward(linear: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        observed.called.add(linear)
        running.add(linear)
        try:
            return forward(linear, inputs)
        finally:
            running.discard(linear)

    def observed_read(linear: nn.Linear, name: str) -> Any:
        if name == "weight" and linear not in running:
            observed.weights_read.add(linear)
        return read_attribute(linear, name)

    with (
        patch.object(nn.Linear, "forward", observed_forward),
        patch.object(nn.Linear, "__getattr__", observed_read, create=True),
    ):
        yield observed


@contextmanager
def _observed_inputs(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Observe the values per token of each block's first input, if it is passed by position.

    The input of a block of Gemma 3n is four hidden states.
    """
    values: dict[nn.Module, int] = {}

    def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            values[layer] = inputs[0].numel() // inputs[0].shape[-2]

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    yield values
    for handle in handles:
        handle.remove()


def _block_linears(layers: Sequence[nn.Module], observed: _Observed) -> list[list[list[Any]]]:
    """The linear layers of each block, in the form that plan/given/block.py reads.

    A linear layer is a list: name in the block, d_in, d_out, and whether it has a bias, is called,
    is quantised in a 4-bit base, and shares its weight with an earlier block.
    """
    by_block = [
        {name: m for name, m in layer.named_modules() if type(m) is nn.Linear} for layer in layers
    ]
    read_directly = set(observed.weights_read)
    for layer, linears in zip(layers, by_block, strict=True):
        read_directly |= {x for name, x in linears.items() if _is_read_by_kernels(layer, name)}
    weights_read_directly = {id(linear.weight) for linear in read_directly}
    earlier_weights: set[int] = set()
    result: list[list[list[Any]]] = []
    for linears in by_block:
        result.append([
            [
                name,
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                linear in observed.called and linear not in read_directly,
                id(linear.weight) not in weights_read_directly,
                id(linear.weight) in earlier_weights,
            ]
            for name, linear in linears.items()
        ])  # fmt: skip
        earlier_weights |= {id(linear.weight) for linear in linears.values()}
    return result


def _is_read_by_kernels(layer: nn.Module, name: str) -> bool:
    """Whether fused kernels read the weight of a linear layer without calling the layer.

    The kernels of a Mamba mixer read its output projection in this way, although the PyTorch
    fallback calls it (transformers 5.23, models/bamba/modeling_bamba.py). A mixer is recognised by
    its parameters A_log and D.
    """
    parent, _, last_part = name.rpartition(".")
    parameters = dict(layer.get_submodule(parent).named_parameters(recurse=False))
    return last_part == "out_proj" and {"A_log", "D"} <= parameters.keys()


def _experts_per_token(config: Any) -> int:
    """Number of experts that a token is routed to; the largest, if it differs between blocks."""
    for name in _EXPERTS_PER_TOKEN:
        if count := getattr(config, name, None):
            return max(count) if isinstance(count, list) else int(count)
    raise RefusedClassError(f"the config has experts but none of {', '.join(_EXPERTS_PER_TOKEN)}")


def _mixing_modules(receivers: Sequence[nn.Module], layers: Sequence[nn.Module]) -> list[str]:
    """Classes of modules, such as Mamba mixers, that may not keep packed documents separate.

    These are modules with weight matrices in blocks whose attention is not in `receivers`. A module
    that the other blocks have too, such as an MLP, is left out.
    """
    names, harmless_names = dict[str, None](), set[str]()  # a dict keeps the order
    for layer in layers:
        for child in layer.children():
            if num_blocks_with(receivers, [layer]):
                harmless_names.add(type(child).__name__)
            elif any(parameter.dim() > 1 for parameter in child.parameters()):
                names[type(child).__name__] = None
    return [name for name in names if name not in harmless_names]


def shape_or_reason(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The shape, or `refused`: why the class cannot be trained, or `failed`: why it did not build.

    A failure may depend on this machine, for example on a package that the class needs.
    """
    try:
        return derive_shape(folder, trust_remote_code=trust_remote_code)
    except RefusedClassError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - a class may raise anything
        return {"failed": _failure(error)}


def _failure(error: Exception) -> str:
    """The error of a class that cannot be built: transformers' version, line and message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    line = f"{Path(frame.filename).name}:{frame.lineno}"
    remedy = (
        "install the package that it names"
        if isinstance(error, ImportError)
        else "check config.json, or use another model or version of transformers"
    )
    return f"transformers {transformers.__version__} raises ({line}) {reason}; {remedy}"


if __name__ == "__main__":
    trust = "--trust-remote-code" in sys.argv
    result = shape_or_reason(Path(sys.argv[1]), trust_remote_code=trust)
    sys.stdout.write(json.dumps(result) + "\n")
