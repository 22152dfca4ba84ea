"""AdapterCounts: sizes of the LoRA adapter, summed over the adapted linear layers of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.config.settings import RunSettings
from pipeline.plan.given.families import Linear
from pipeline.plan.given.patterns import full_matches
from pipeline.plan.given.shape import ModelShape

_ATTENTION_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
_ATTENTION_OUTPUT = {"o_proj", "dense"}
_MLP_INPUT = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}

_NamedLinears = Sequence[tuple[str, Linear]]


@dataclass(frozen=True, kw_only=True)
class AdapterCounts:
    """Sums over the adapted linear layers of a model, or of all its blocks of one kind."""

    layers: int
    parameters: int
    largest_matrix: int  # elements of the largest A or B
    input_width: int  # sum of d_in
    output_width: int  # sum of d_out
    blocks_reading_attention_input: int
    blocks_reading_attention_output: int
    blocks_reading_mlp_input: int
    other_input_width: int  # sum of d_in of layers that read another input (down projection)


def adapter_counts(shape: ModelShape, settings: RunSettings) -> AdapterCounts:
    """Counts for the layers that `lora_target_modules` selects in all blocks.

    Raises UserError if an entry selects no layer. A is (r, d_in) and B is (d_out, r) for every
    layer (LoRA, arXiv 2106.09685 s.4).
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
    selected = shape.targeted(targets)
    by_kind: list[list[tuple[str, Linear]]] = [[] for _ in shape.blocks]
    for name, linear in selected:
        by_kind[shape.kind_of(name)].append((name, linear))
    return _count(selected, r), tuple(_count(of_kind, r) for of_kind in by_kind)


def _count(selected: _NamedLinears, r: int) -> AdapterCounts:
    linears = [linear for _, linear in selected]
    return AdapterCounts(
        layers=len(linears),
        parameters=sum(r * (linear.d_in + linear.d_out) for linear in linears),
        largest_matrix=r * max((max(x.d_in, x.d_out) for x in linears), default=0),
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
