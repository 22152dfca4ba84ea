"""AdapterCounts: sizes of the LoRA adapter, summed over the adapted linear layers of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.config.settings import RunSettings
from pipeline.plan.given.families import ExpertTensor, Linear
from pipeline.plan.given.patterns import full_matches
from pipeline.plan.given.shape import ModelShape

_ATTENTION_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
_ATTENTION_OUTPUT = {"o_proj", "dense"}
_MLP_INPUT = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}

_NamedLinears = Sequence[tuple[str, Linear]]


@dataclass(frozen=True, kw_only=True)
class AdapterCounts:
    """Sums over the adapted linear layers of a model, or of all its blocks of one kind.

    `parameters` and `largest_matrix` include the adapter of fused experts. `expert_parameters`:
    parameters of that adapter. `adapted_experts`: elements of the fused tensors that it adapts.
    `largest_expert_tensor`: elements of the largest of them.
    """

    layers: int
    parameters: int
    largest_matrix: int  # elements of the largest A or B
    largest_linear_matrix: int  # elements of the largest A or B of a linear layer
    input_width: int  # sum of d_in
    output_width: int  # sum of d_out
    blocks_reading_attention_input: int
    blocks_reading_attention_output: int
    blocks_reading_mlp_input: int
    other_input_width: int  # sum of d_in of layers that read another input (down projection)
    expert_parameters: int
    adapted_experts: int
    largest_expert_tensor: int


def adapter_counts(shape: ModelShape, settings: RunSettings) -> AdapterCounts:
    """Counts for the layers that `lora_target_modules` selects in all blocks.

    Raises UserError if an entry selects no layer. A is (r, d_in) and B is (d_out, r) for every
    layer (LoRA, arXiv 2106.09685 s.4). For a fused tensor of n experts A is (n r, d_in) and B is
    (d_out, n r): r for each expert (peft 0.21.2 tuners/lora/layer.py ParamWrapper.update_layer).
    """
    return _counts(shape, _key(settings), settings.lora_r)[0]


def adapter_counts_by_kind(shape: ModelShape, settings: RunSettings) -> tuple[AdapterCounts, ...]:
    """Counts for the blocks of each kind, in the order of `shape.blocks`."""
    return _counts(shape, _key(settings), settings.lora_r)[1]


def trainable_parameters(shape: ModelShape, settings: RunSettings) -> int:
    """Number of trainable parameters: all parameters of the adapter."""
    return adapter_counts(shape, settings).parameters


def pattern_value(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first key that matches the end of a layer's name, as in peft's patterns.

    A key is a regular expression for the name or for its end after a dot (peft 0.21.2
    utils/other.py get_pattern_key).
    """
    for key, value in (pattern or {}).items():
        if full_matches(rf"(.*\.)?({key})", [name], "rank_pattern"):
            return value
    return default


def _key(settings: RunSettings) -> str | tuple[str, ...]:
    targets = settings.lora_target_modules
    return targets if isinstance(targets, str) else tuple(targets)


@lru_cache(maxsize=16)
def _counts(
    shape: ModelShape, targets: str | tuple[str, ...], r: int
) -> tuple[AdapterCounts, tuple[AdapterCounts, ...]]:
    selected, experts = shape.targeted(targets), shape.targeted_experts(targets)
    by_kind = [
        _count(
            [(name, linear) for name, linear in selected if shape.kind_of(name) == kind],
            [tensor for name, tensor in experts if shape.kind_of(name) == kind],
            r,
        )
        for kind in range(len(shape.blocks))
    ]
    return _count(selected, [tensor for _, tensor in experts], r), tuple(by_kind)


def _count(selected: _NamedLinears, experts: Sequence[ExpertTensor], r: int) -> AdapterCounts:
    linears = [linear for _, linear in selected]
    of_linears = r * max((max(x.d_in, x.d_out) for x in linears), default=0)
    of_experts = r * max((x.count * max(x.d_in, x.d_out) for x in experts), default=0)
    expert_parameters = sum(r * x.count * (x.d_in + x.d_out) for x in experts)
    return AdapterCounts(
        layers=len(linears),
        parameters=sum(r * (x.d_in + x.d_out) for x in linears) + expert_parameters,
        largest_matrix=max(of_linears, of_experts),
        largest_linear_matrix=of_linears,
        expert_parameters=expert_parameters,
        adapted_experts=sum(tensor.parameters for tensor in experts),
        largest_expert_tensor=max((tensor.parameters for tensor in experts), default=0),
        input_width=sum(linear.d_in for linear in linears),
        output_width=sum(linear.d_out for linear in linears),
        blocks_reading_attention_input=_blocks_with(selected, _ATTENTION_INPUT),
        blocks_reading_attention_output=_blocks_with(selected, _ATTENTION_OUTPUT),
        blocks_reading_mlp_input=_blocks_with(selected, _MLP_INPUT),
        other_input_width=sum(linear.d_in for linear in linears if _reads_other_input(linear)),
    )


def _blocks_with(selected: _NamedLinears, names: set[str]) -> int:
    """Number of blocks that have an adapted layer with one of these names."""
    return len({name.removesuffix(f".{x.name}") for name, x in selected if _last_part(x) in names})


def _reads_other_input(linear: Linear) -> bool:
    return _last_part(linear) not in _ATTENTION_INPUT | _ATTENTION_OUTPUT | _MLP_INPUT


def _last_part(linear: Linear) -> str:
    return linear.name.rsplit(".", 1)[-1]
