"""Block: sizes of one kind of decoder block, computed from config.json or derived from the class.

A model may have several kinds of blocks, such as dense blocks and blocks with experts. If the
`model_type` is in the table families.py, `blocks_of_family` computes the sizes. For any other
model, a subprocess derives them from the model's class (class_shape.py), and `block_of_class`
reads its result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.given.families import (
    Config,
    Experts,
    ExpertTensor,
    Family,
    Linear,
    NormKind,
    Widths,
)

# Last parts of the names of an MLP's last layer, in the classes of transformers 5.23.
_MLP_OUTPUTS = ("down_proj", "fc2", "w2", "c_proj", "fc_out", "output_linear")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One kind of decoder block.

    `intermediate_size`: inner width of the dense MLP, or of the shared expert in a block with
    experts; 0 if there is neither. `num_norms`: norms of the hidden width. `has_head_norms`:
    whether each query head and each key head is normalised. `has_fused_gate`: whether gate and up
    projection are one linear layer. `experts`: tensors that hold the weights of all experts, in the
    order in which the class defines them. `other_parameters`: parameters that the other fields do
    not include.

    `saved`: tensors that the block saves for backward, per token and without adapters, as the
    number of values in the training dtype and the number of bytes in other dtypes. It is derived
    from the model's class; None if cost/activations.py computes it. `saved_for_expert_adapters`:
    number of values per token that are also saved if the experts have an adapter. `counted_input`:
    values per token of the block's input, derived from the class; None if it is one hidden state.
    `counted_key_dim`: width of a query or key head, derived from the class; None if it is that of a
    value head, which `head_dim` has (it is larger in multi-head latent attention).
    """

    linears: tuple[Linear, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_kind: NormKind = "rms"
    num_norms: int = 2
    has_head_norms: bool = False
    is_gated: bool = True
    has_fused_gate: bool = False
    experts: tuple[ExpertTensor, ...] = ()
    experts_per_token: int = 0
    other_parameters: int = 0
    saved: tuple[int, int] | None = None
    saved_for_expert_adapters: int | None = None
    counted_input: int | None = None
    counted_key_dim: int | None = None

    @property
    def input_width(self) -> int:
        """Values per token of the block's input, which activation checkpointing saves."""
        return self.counted_input or self.hidden_size

    @property
    def has_tileable_mlp(self) -> bool:
        """Whether the MLP can compute a sequence in tiles (model/tiles.py).

        It can if it is a module `mlp` that treats each token separately. This is known only for the
        classes in families.py, whose `saved` is None. MLPs of blocks with experts are not tiled.
        """
        names = [linear.name for linear in self.linears]
        return self.saved is None and not self.experts and any("mlp." in name for name in names)

    @property
    def mlp_weights(self) -> int:
        """Weights of the linear layers of a tileable MLP."""
        return sum(linear.weights for linear in self.linears if "mlp." in linear.name)

    @property
    def num_experts(self) -> int:
        """Number of experts; 0 for a dense block."""
        return self.experts[0].count if self.experts else 0

    @property
    def expert_size(self) -> int:
        """Inner width of one expert, if its gate, up and down projections are equally wide."""
        return self._parameters_per_expert // (3 * self.hidden_size)

    @property
    def query_width(self) -> int:
        """Width of the attention output of all heads, and of all query heads together.

        Query heads are wider if there is a `counted_key_dim`.
        """
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together, which is also the width of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def key_dim(self) -> int:
        """Width of one query head or key head."""
        return self.counted_key_dim or self.head_dim

    @property
    def keys_and_values_width(self) -> int:
        """Width of all key heads and all value heads together."""
        return self.num_kv_heads * (self.key_dim + self.head_dim)

    @property
    def has_fused_attention(self) -> bool:
        """Whether one linear layer computes queries, keys and values."""
        fused_names = ("qkv_proj", "query_key_value")
        return any(linear.name.endswith(fused_names) for linear in self.linears)

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers, without biases."""
        return sum(linear.weights for linear in self.linears)

    @property
    def linear_parameters(self) -> int:
        """Weights and biases of the linear layers."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts: gate, up and down projections."""
        return sum(tensor.parameters for tensor in self.experts)

    @property
    def norm_parameters(self) -> int:
        """Parameters of all norms."""
        width = self.num_norms * self.hidden_size
        if self.has_head_norms:  # one norm for queries and one for keys
            width += 2 * self.head_dim
        return width if self.norm_kind == "rms" else 2 * width  # LayerNorm also has a bias

    @property
    def router_parameters(self) -> int:
        """Parameters of the router, which is not an nn.Linear and not in `linears`."""
        return self.num_experts * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters of the block."""
        other = self.norm_parameters + self.router_parameters + self.other_parameters
        return self.linear_parameters + self.expert_parameters + other

    @property
    def active_weights(self) -> int:
        """Weights that one token is multiplied by: linear layers, router and selected experts."""
        return self.linear_weights + self.router_parameters + self.active_expert_weights

    @property
    def active_expert_weights(self) -> int:
        """Weights of the experts that one token is routed to."""
        return self.experts_per_token * self._parameters_per_expert

    @property
    def _parameters_per_expert(self) -> int:
        return sum(tensor.d_in * tensor.d_out for tensor in self.experts)


def block_of_class(sizes: Mapping[str, Any], unadaptable: Sequence[str]) -> Block:
    """A Block from the sizes that model/class_shape.py derived from the model's class.

    Parameters for which Block has no field are counted in `other_parameters`. `unadaptable`: last
    parts of the names of linear layers, such as `gate_proj`, that no adapter may have, because
    peft 0.21 would load the adapter onto other layers or not at all (model/peft_rewrites.py). The
    class Linear (families.py) describes the fields of a linear layer.
    """
    linears = tuple(
        Linear(
            name=name,
            d_in=d_in,
            d_out=d_out,
            has_bias=has_bias,
            is_adaptable=name.rsplit(".", 1)[-1] not in unadaptable,
            is_called=is_called,
            is_quantised=is_quantised,
            is_shared=is_shared,
        )
        for name, d_in, d_out, has_bias, is_called, is_quantised, is_shared in sizes["linears"]
    )
    by_name = {linear.last_part: linear for linear in linears}
    output = by_name.get("o_proj") or by_name.get("dense") or by_name.get("out_proj")
    mlp = next((by_name[name] for name in _MLP_OUTPUTS if name in by_name), None)
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    block = Block(
        linears=linears,
        hidden_size=hidden,
        intermediate_size=mlp.d_in if mlp else 0,
        num_heads=heads,
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=output.d_in // heads if output else 0,
        norm_kind=sizes["norm_kind"],
        num_norms=sizes["num_norms"],
        experts=tuple(ExpertTensor(*tensor) for tensor in sizes["experts"]),
        experts_per_token=sizes["experts_per_token"],
        saved=(sizes["saved_values"], sizes["saved_bytes"]),
        saved_for_expert_adapters=sizes["saved_for_expert_adapters"],
        counted_input=sizes.get("input_values"),
        counted_key_dim=sizes.get("key_dim"),
    )
    return replace(block, other_parameters=sizes["parameters"] - block.parameters)


def blocks_of_family(family: Family, config: Config) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    """The kinds of blocks of a model in families.py, and for each layer the index of its kind."""
    num_layers = positive_integer(config, "num_hidden_layers")
    experts = family.experts(config) if family.experts else None
    if experts is None or not family.has_experts:
        return (_build_block(family, config, experts),), (0,) * num_layers
    has_experts = [
        experts.count > 0 and family.has_experts(config, layer) for layer in range(num_layers)
    ]
    kinds = list(dict.fromkeys(has_experts))  # a kind: whether its blocks have experts
    blocks = tuple(_build_block(family, config, experts if kind else None) for kind in kinds)
    return blocks, tuple(kinds.index(kind) for kind in has_experts)


def _build_block(family: Family, config: Config, experts: Experts | None) -> Block:
    """A kind of block of a model in families.py; `experts`: None for a block without experts."""
    heads = positive_integer(config, "num_attention_heads")
    hidden = positive_integer(config, "hidden_size")
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    inner_key, linears = family.inner_key, family.linears
    if experts is None and family.dense_linears is not None:
        inner_key, linears = "intermediate_size", family.dense_linears
    inner = 0 if inner_key is None else positive_integer(config, inner_key)
    widths = Widths(hidden=hidden, inner=inner, queries=heads * head_dim, keys=kv_heads * head_dim)
    return Block(
        linears=linears(config, widths),
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_kind=family.norm_kind,
        num_norms=family.num_block_norms,
        has_head_norms=family.head_norms(config),
        is_gated=family.is_gated,
        has_fused_gate=family.has_fused_gate,
        experts=experts.tensors(hidden) if experts and experts.count else (),
        experts_per_token=experts.per_token if experts else 0,
    )


def positive_integer(config: Config, key: str) -> int:
    """The value of a key, an integer above 0. Raises KeyError, or UserError for other values."""
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{key}: expected a whole number above 0, not {value!r}")
    return value
