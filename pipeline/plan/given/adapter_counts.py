"""What an adapter adds to a model: counts over all blocks, made once for each choice of layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.config.settings import RunSettings
from pipeline.plan.given.families import Linear
from pipeline.plan.given.shape import ModelShape

_ATTENTION_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
_ATTENTION_OUTPUT = {"o_proj", "dense"}
_MLP_INPUT = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}


@dataclass(frozen=True, kw_only=True)
class AdapterCounts:
    """Counts over all adapted linear layers of all blocks."""

    layers: int
    parameters: int
    largest_matrix: int  # elements of the largest A or B
    input_width: int  # sum of d_in
    output_width: int  # sum of d_out
    blocks_reading_attention_input: int
    blocks_reading_attention_output: int
    blocks_reading_mlp_input: int
    product_width: int  # sum of d_in of those that read what the MLP's activation makes


def adapter_counts(shape: ModelShape, settings: RunSettings) -> AdapterCounts:
    """Counts for the layers that the settings name.

    Raises UserError where an entry selects nothing. A is (r, d_in) and B is (d_out, r) for every
    layer (LoRA, arXiv 2106.09685 s.4).
    """
    targets = settings.lora_target_modules
    key = targets if isinstance(targets, str) else tuple(targets)
    return _count(shape, key, settings.lora_r)


def trainable_parameters(shape: ModelShape, settings: RunSettings) -> int:
    """Parameters of the adapter."""
    return adapter_counts(shape, settings).parameters


@lru_cache(maxsize=16)
def _count(shape: ModelShape, targets: str | tuple[str, ...], r: int) -> AdapterCounts:
    found = shape.targeted(targets)
    every = [linear for _, linear in found]
    return AdapterCounts(
        layers=len(every),
        parameters=sum(r * (linear.d_in + linear.d_out) for linear in every),
        largest_matrix=r * max(max(linear.d_in, linear.d_out) for linear in every),
        input_width=sum(linear.d_in for linear in every),
        output_width=sum(linear.d_out for linear in every),
        blocks_reading_attention_input=_blocks_with(found, _ATTENTION_INPUT),
        blocks_reading_attention_output=_blocks_with(found, _ATTENTION_OUTPUT),
        blocks_reading_mlp_input=_blocks_with(found, _MLP_INPUT),
        product_width=sum(linear.d_in for linear in every if _reads_product(linear)),
    )


def _blocks_with(found: Sequence[tuple[str, Linear]], names: set[str]) -> int:
    return len({name.removesuffix(f".{x.name}") for name, x in found if _last(x) in names})


def _reads_product(linear: Linear) -> bool:
    return _last(linear) not in _ATTENTION_INPUT | _ATTENTION_OUTPUT | _MLP_INPUT


def _last(linear: Linear) -> str:
    return linear.name.rsplit(".", 1)[-1]
