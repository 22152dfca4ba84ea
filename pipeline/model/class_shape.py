"""Model shape, counted on the model's class, which is built on the meta device without weights.

    python -m pipeline.model.class_shape MODEL_FOLDER [--trust-remote-code]

prints the shape as JSON, or the reason why the class is refused or cannot be built.
plan/given/class_shape.py runs this command for a `model_type` that families.py does not have. A
block is a layer of the text decoder.
"""

import inspect
import json
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    masking_utils,
)

from pipeline.model.attention import SINK_COLUMNS
from pipeline.model.peft_rewrites import rewritten_by_peft
from pipeline.model.structure import (
    blocks,
    expert_tensors,
    lora_sizes,
    num_blocks_with,
    text_decoder,
)

_COUNTED = "rankzero_counted"  # name of the attention below for `attn_implementation`
# Config keys for the number of experts per token in transformers 5.23.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
# Class names of modules with which a token attends only to selected or compressed keys.
_SELECTS_KEYS = re.compile(r"(Indexer|Compressor)$")
_TOKENS = 64  # sequence length of the counted forward pass; saved bytes are proportional to it


class RefusedClassError(ValueError):
    """A model class cannot be trained here, whatever is installed; the reason names no folder."""


class _Attention(torch.autograd.Function):
    """Attention that saves the same tensors as a fused kernel: q, k, v, output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError  # only the forward pass is counted


def _attend(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
    documents: list[Any] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if documents is not None:
        documents.append(module)
    if others.get("s_aux") is not None:  # sinks
        q, k = F.pad(q, (0, SINK_COLUMNS)), F.pad(k, (0, SINK_COLUMNS))
    width = v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v  # as in attention.py
    out: torch.Tensor = _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register(_COUNTED, _attend)
AttentionMaskInterface.register(_COUNTED, lambda **others: None)


def count_shape(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
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
    with _observed_linears() as observed:
        counts = _saved_per_block(model, decoder, layers)
    _require_all_blocks_called(layers, observed)
    linears = _block_linears(layers, observed)
    sizes = [
        _block_sizes(layer, configs[index]) | {"linears": linears[index]} | counts[index]
        for index, layer in enumerate(layers)
    ]
    kinds = [json.dumps(block) for block in sizes]
    distinct = list(dict.fromkeys(kinds))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    receivers = _document_receivers(decoder)
    return {
        "layers_name": names[layers[0]].rpartition(".")[0],
        "embeddings_name": _name_of_width(names, embeddings, sizes[0]["hidden_size"]),
        "head_name": _name_of_width(names, head, sizes[0]["hidden_size"]),
        "vocab_size": embeddings.weight.shape[0],
        "is_tied": head.weight is embeddings.weight,
        "has_other_towers": _has_other_towers(model, decoder, head),
        "has_head_bias": getattr(head, "bias", None) is not None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rewritten_by_peft": rewritten_by_peft(model, decoder),
        "separate_blocks": num_blocks_with(receivers, layers),
        "mixing_modules": _mixing_modules(receivers, layers),
        "blocks": [json.loads(kind) for kind in distinct],
        "layer_kinds": [distinct.index(kind) for kind in kinds],
    }


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
                        config, attn_implementation=_COUNTED, **options
                    )
                except KeyError as error:
                    if error.args != (_COUNTED,):
                        raise
                    raise RefusedClassError(_own_attention_message(config.model_type)) from None
            # A decoder that computes attention itself is refused: it would use only the mask that
            # belongs to the attention function. Bloom would get no mask, so its tokens would attend
            # to later ones. A vision tower may compute attention itself (GOT-OCR 2).
            decoder = text_decoder(model)
            if not isinstance(decoder, PreTrainedModel):
                decoder = model
            if not decoder._can_set_attn_implementation():
                names = sorted({type(m).__name__ for m in decoder.modules()})
                own = [name for name in names if name.endswith("Attention")]
                raise RefusedClassError(_own_attention_message(", ".join(own) or config.model_type))
            return model.requires_grad_(False)
    raise RefusedClassError(f"{config.model_type} is no causal language model of transformers")


def _own_attention_message(name: str) -> str:
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
    used = observed.called | observed.read
    uncalled = []
    for index, layer in enumerate(layers):
        linears = [module for module in layer.modules() if type(module) is nn.Linear]
        if linears and not any(linear in used for linear in linears):
            uncalled.append(f"{index} ({type(layer).__name__})")
    if uncalled:
        raise RefusedClassError(
            f"{len(uncalled)} of its {len(layers)} blocks are not called for text without pictures,"
            f" the first is {uncalled[0]}; only models whose blocks all process text are trained"
        )


def _has_other_towers(model: Any, decoder: Any, head: Any) -> bool:
    """Whether the model has linear layers outside decoder and head, such as a vision tower."""
    inside = {head, *decoder.modules()}
    return any(type(m) is nn.Linear and m not in inside for m in model.modules())


def _block_sizes(layer: nn.Module, config: Any) -> dict[str, Any]:
    """Sizes of the heads, norms and experts of a block, and its number of parameters."""
    experts = expert_tensors(layer)
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
    }


@dataclass
class _Observed:
    """Linear layers that were called, and those whose weight was read outside their own call."""

    called: set[nn.Module] = field(default_factory=set)
    read: set[nn.Module] = field(default_factory=set)


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
            observed.read.add(linear)
        return read_attribute(linear, name)

    with (
        patch.object(nn.Linear, "forward", observed_forward),
        patch.object(nn.Linear, "__getattr__", observed_read, create=True),
    ):
        yield observed


def _block_linears(layers: Sequence[nn.Module], observed: _Observed) -> list[list[list[Any]]]:
    """The linear layers of each block, in the form that plan/given/block.py reads."""
    by_block = [
        {name: m for name, m in layer.named_modules() if type(m) is nn.Linear} for layer in layers
    ]
    read = observed.read | {
        linear
        for layer, linears in zip(layers, by_block, strict=True)
        for name, linear in linears.items()
        if _is_read_by_kernels(layer, name)
    }
    read_weights = {id(linear.weight) for linear in read}
    earlier: set[int] = set()
    fields: list[list[list[Any]]] = []
    for linears in by_block:
        fields.append([
            [
                name,
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                linear in observed.called - read,
                id(linear.weight) not in read_weights,
                id(linear.weight) in earlier,
            ]
            for name, linear in linears.items()
        ])  # fmt: skip
        earlier |= {id(linear.weight) for linear in linears.values()}
    return fields


def _is_read_by_kernels(layer: nn.Module, name: str) -> bool:
    """Whether fused kernels read the weight of a linear layer without calling the layer.

    The kernels of a Mamba mixer read its output projection in this way, although the PyTorch
    fallback calls it (transformers 5.23, models/bamba/modeling_bamba.py). A mixer is recognised by
    its parameters.
    """
    parent, _, end = name.rpartition(".")
    own = dict(layer.get_submodule(parent).named_parameters(recurse=False))
    return end == "out_proj" and {"A_log", "D"} <= own.keys()


def _experts_per_token(config: Any) -> int:
    for name in _EXPERTS_PER_TOKEN:
        if count := getattr(config, name, None):
            return max(count) if isinstance(count, list) else int(count)
    raise RefusedClassError(f"the config has experts but none of {', '.join(_EXPERTS_PER_TOKEN)}")


def _saved_per_block(model: Any, decoder: Any, layers: Sequence[nn.Module]) -> list[dict[str, int]]:
    """Sizes of the activations that each block saves for backward, per token, without adapters.

    `saved_for_expert_adapters`: values that are saved in addition if the experts have an adapter,
    without the adapted weights themselves. They are counted with trainable expert weights, whose
    gradients need the same values.
    """
    counts = _count_saved(model, decoder, layers)
    with_experts = counts
    if experts := expert_tensors(decoder):
        for _, parameter in experts.values():
            parameter.requires_grad_(True)
        with_experts = _count_saved(model, decoder, layers)
        model.requires_grad_(False)
    for count, more in zip(counts, with_experts, strict=True):
        count["saved_for_expert_adapters"] = more["saved_values"] - count["saved_values"]
    return counts


def _pretended_tracing() -> AbstractContextManager[Any]:
    """Make transformers believe that it is tracing.

    It then does not read the values of masks and positions, which tensors on the meta device lack.
    """
    return patch.object(masking_utils, "is_tracing", lambda *_: True)


@torch.no_grad()
def _document_receivers(decoder: Any) -> list[nn.Module]:
    """The attention modules that receive the documents of a pack."""
    receivers: list[Any] = []
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with suppress(TypeError), _pretended_tracing():  # a decoder may not accept `documents`
        decoder(input_ids=ids, use_cache=False, documents=receivers)
    return receivers


def _mixing_modules(receivers: Sequence[nn.Module], layers: Sequence[nn.Module]) -> list[str]:
    """Class names of the modules with weight matrices in blocks that receive no documents.

    Modules that blocks with documents have too, such as an MLP, are left out.
    """
    names, other_names = dict[str, None](), set[str]()
    for layer in layers:
        for child in layer.children():
            if num_blocks_with(receivers, [layer]):
                other_names.add(type(child).__name__)
            elif any(parameter.dim() > 1 for parameter in child.parameters()):
                names[type(child).__name__] = None
    return [name for name in names if name not in other_names]


def _count_saved(model: Any, decoder: Any, layers: Sequence[nn.Module]) -> list[dict[str, int]]:
    """Saved activations of each block, per token, in one forward pass in bf16.

    `saved_values`: number of values in the training dtype. `saved_bytes`: bytes of all other
    dtypes, such as the fp32 copies in norms.
    """
    model.to(torch.bfloat16)
    weights = {id(parameter) for parameter in model.parameters()}
    current: list[int] = []
    saved: dict[int, torch.Tensor] = {}  # by id; the reference keeps the id from being reused
    saving_blocks: dict[int, set[int]] = defaultdict(set)  # by id of the tensor

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if current and id(base) not in weights:
            saved[id(base)] = base
            saving_blocks[id(base)].add(current[-1])
        return tensor

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, i=index: current.append(i)))
        handles.append(layer.register_forward_hook(lambda *_: (current.pop(), None)[1]))
    handles.append(
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(True)
        )
    )
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with (
        _pretended_tracing(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        try:
            decoder(input_ids=ids, use_cache=False)
        except (NotImplementedError, RuntimeError) as error:
            raise _forward_error(model, error) from None
    for handle in handles:
        handle.remove()
    counts = []
    # Tensors that several blocks save, such as rotary angles, are not counted.
    for index in range(len(layers)):
        tensors = [saved[key] for key, blocks in saving_blocks.items() if blocks == {index}]
        values = sum(t.numel() for t in tensors if t.dtype == torch.bfloat16)
        others = sum(t.numel() * t.element_size() for t in tensors if t.dtype != torch.bfloat16)
        counts.append({"saved_values": values // _TOKENS, "saved_bytes": others // _TOKENS})
    return counts


def _forward_error(model: Any, error: Exception) -> RefusedClassError:
    """The error for a forward pass that fails on the meta device, with the line that fails."""
    frames = traceback.extract_tb(error.__traceback__)
    own = inspect.getsourcefile(type(model))
    place = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    line = f"{Path(place.filename).name}:{place.lineno}, `{place.line}`"
    if "meta" in str(error).lower():
        return RefusedClassError(
            f"its forward pass reads values of tensors ({line}), so the memory of its activations "
            "cannot be counted without weights"
        )
    reason = str(error).partition("\n")[0]
    return RefusedClassError(f"its forward pass in bf16 without weights fails ({line}): {reason}")


def shape_or_reason(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The shape, or `refused`: why the class cannot be trained, or `failed`: why it did not build.

    A failure may depend on this machine, for example on a package that the class needs.
    """
    try:
        return count_shape(folder, trust_remote_code=trust_remote_code)
    except RefusedClassError as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - a class may raise anything
        return {"failed": _failure(error)}


def _failure(error: Exception) -> str:
    """The error of a class that cannot be built: library, place and message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    remedy = (
        "install the package that it names"
        if isinstance(error, ImportError)
        else "check config.json, or use another model or version of transformers"
    )
    return f"transformers {transformers.__version__} raises ({place}) {reason}; {remedy}"


if __name__ == "__main__":
    trust = "--trust-remote-code" in sys.argv
    result = shape_or_reason(Path(sys.argv[1]), trust_remote_code=trust)
    sys.stdout.write(json.dumps(result) + "\n")
