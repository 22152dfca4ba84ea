"""Table of model families: names and sizes of the linear layers of a decoder block.

A family is a `model_type` of config.json, such as `llama`. Source: transformers 5.23,
models/*/modeling_*.py. In this version the weights of all experts of a block are stacked in two
tensors ("fused" experts), and the router is not an nn.Linear. Therefore peft cannot adapt experts
and routers by name, and bitsandbytes does not quantise them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NormKind = Literal["rms", "layer"]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: `weight` is (d_out, d_in).

    `name`: within the block, such as `self_attn.q_proj`. `is_adaptable`: False if peft cannot adapt
    the layer by name. `is_called`: False if the forward pass does not call the layer, or reads its
    weight directly, so that an adapter on it would have no effect. `is_quantised`: whether the
    weight is quantised in a 4-bit or 8-bit base. It is not if the class, or a kernel that it uses,
    reads the weight directly. `is_shared`: whether a layer of an earlier block has the same weight
    (Zamba 2).
    """

    name: str
    d_in: int
    d_out: int
    has_bias: bool = False
    is_adaptable: bool = True
    is_called: bool = True
    is_quantised: bool = True
    is_shared: bool = False

    @property
    def last_part(self) -> str:
        """Last part of the name, such as `q_proj`."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        """Elements of the weight matrix, without the bias."""
        return self.d_in * self.d_out

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.weights + (self.d_out if self.has_bias else 0)


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor with the weights of all experts of a block, such as `mlp.experts.down_proj`.

    `count`: number of experts. `d_in`, `d_out`: input and output width of one expert's matrix.
    """

    name: str
    count: int
    d_in: int
    d_out: int

    @property
    def parameters(self) -> int:
        """Elements of the tensor."""
        return self.count * self.d_in * self.d_out


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of the hidden state, the inner layer of the MLP, all query heads and all key heads."""

    hidden: int
    inner: int
    queries: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a block. Each is a gated MLP of inner width `size`.

    `per_token`: number of experts that a token is routed to.
    """

    count: int
    per_token: int
    size: int

    def tensors(self, hidden: int) -> tuple[ExpertTensor, ...]:
        """The fused tensors, in the order in which the class defines them; `hidden`: width."""
        return (
            ExpertTensor("mlp.experts.gate_up_proj", self.count, hidden, 2 * self.size),
            ExpertTensor("mlp.experts.down_proj", self.count, self.size, hidden),
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """Description of one `model_type`.

    `linears`: function from config.json and widths to the linear layers of a block. `defaults`:
    values of the config class for keys that config.json may omit. `layers`, `embeddings`, `head`:
    names of the ModuleList of blocks, the embeddings and the head. `inner_key`: key of config.json
    for the inner width of the MLP; None if the only MLPs are experts. `num_block_norms`: norms of
    the hidden width in a block. `head_norms`: function that returns whether query and key heads are
    normalised. `is_gated`: whether MLPs have a gate projection. `has_fused_gate`: whether gate and
    up projection are one linear layer.

    For models with experts, `experts(config)` returns their sizes, and `dense_linears` the linear
    layers of a block without experts. `has_experts(config, layer)` returns whether the block with
    this index has experts; None if every block has.
    """

    linears: Callable[[Config, Widths], tuple[Linear, ...]]
    dense_linears: Callable[[Config, Widths], tuple[Linear, ...]] | None = None
    has_experts: Callable[[Config, int], bool] | None = None
    defaults: Config = field(default_factory=dict)
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    inner_key: str | None = "intermediate_size"
    norm_kind: NormKind = "rms"
    num_block_norms: int = 2
    has_head_bias: bool = False
    is_gated: bool = True
    has_fused_gate: bool = False
    head_norms: Callable[[Config], bool] = lambda config: False
    experts: Callable[[Config], Experts] | None = None


def _llama(config: Config, widths: Widths) -> tuple[Linear, ...]:
    return (
        *_attention(widths, bool(config.get("attention_bias"))),
        *_gated_mlp(widths, has_bias=bool(config.get("mlp_bias"))),
    )


def _mistral(config: Config, widths: Widths) -> tuple[Linear, ...]:
    del config
    return (*_attention(widths), *_gated_mlp(widths))


def _qwen2(config: Config, widths: Widths) -> tuple[Linear, ...]:
    del config
    return (*_attention(widths, True, False), *_gated_mlp(widths))


def _qwen3(config: Config, widths: Widths) -> tuple[Linear, ...]:
    return (*_attention(widths, bool(config.get("attention_bias"))), *_gated_mlp(widths))


def _phi3(config: Config, widths: Widths) -> tuple[Linear, ...]:
    del config
    return (
        Linear("self_attn.qkv_proj", widths.hidden, widths.queries + 2 * widths.keys),
        Linear("self_attn.o_proj", widths.queries, widths.hidden),
        Linear("mlp.gate_up_proj", widths.hidden, 2 * widths.inner),
        Linear("mlp.down_proj", widths.inner, widths.hidden),
    )


def _phi(config: Config, widths: Widths) -> tuple[Linear, ...]:
    del config
    return (
        Linear("self_attn.q_proj", widths.hidden, widths.queries, True),
        Linear("self_attn.k_proj", widths.hidden, widths.keys, True),
        Linear("self_attn.v_proj", widths.hidden, widths.keys, True),
        Linear("self_attn.dense", widths.queries, widths.hidden, True),
        Linear("mlp.fc1", widths.hidden, widths.inner, True),
        Linear("mlp.fc2", widths.inner, widths.hidden, True),
    )


def _gpt_neox(config: Config, widths: Widths) -> tuple[Linear, ...]:
    has_bias = bool(config["attention_bias"])
    return (
        Linear("attention.query_key_value", widths.hidden, 3 * widths.hidden, has_bias),
        Linear("attention.dense", widths.hidden, widths.hidden, has_bias),
        Linear("mlp.dense_h_to_4h", widths.hidden, widths.inner, True),
        Linear("mlp.dense_4h_to_h", widths.inner, widths.hidden, True),
    )


def _mixtral(config: Config, widths: Widths) -> tuple[Linear, ...]:
    del config
    return _attention(widths)


def _qwen3_moe(config: Config, widths: Widths) -> tuple[Linear, ...]:
    return _attention(widths, bool(config.get("attention_bias")))


def _qwen3_moe_dense(config: Config, widths: Widths) -> tuple[Linear, ...]:
    # Not adaptable: peft 0.21 applies the names of these layers to the fused experts of the other
    # blocks (utils/transformers_weight_conversion.py).
    mlp = [replace(linear, is_adaptable=False) for linear in _gated_mlp(widths)]
    return (*_qwen3_moe(config, widths), *mlp)


def _qwen2_moe(config: Config, widths: Widths) -> tuple[Linear, ...]:
    return (
        *_attention(widths, bool(config["qkv_bias"]), False),
        *_gated_mlp(widths, "mlp.shared_expert"),
        Linear("mlp.shared_expert_gate", widths.hidden, 1),
    )


def _qwen2_moe_dense(config: Config, widths: Widths) -> tuple[Linear, ...]:
    return (*_attention(widths, bool(config["qkv_bias"]), False), *_gated_mlp(widths))


def _attention(
    widths: Widths, has_qkv_bias: bool = False, has_o_bias: bool | None = None
) -> tuple[Linear, ...]:
    """The four attention projections. If `has_o_bias` is None, it is the same as `has_qkv_bias`."""
    return (
        Linear("self_attn.q_proj", widths.hidden, widths.queries, has_qkv_bias),
        Linear("self_attn.k_proj", widths.hidden, widths.keys, has_qkv_bias),
        Linear("self_attn.v_proj", widths.hidden, widths.keys, has_qkv_bias),
        Linear(
            "self_attn.o_proj",
            widths.queries,
            widths.hidden,
            has_qkv_bias if has_o_bias is None else has_o_bias,
        ),
    )


def _gated_mlp(widths: Widths, name: str = "mlp", *, has_bias: bool = False) -> tuple[Linear, ...]:
    return (
        Linear(f"{name}.gate_proj", widths.hidden, widths.inner, has_bias),
        Linear(f"{name}.up_proj", widths.hidden, widths.inner, has_bias),
        Linear(f"{name}.down_proj", widths.inner, widths.hidden, has_bias),
    )


# The number of experts has two names in config.json. If both are set, these functions use the same
# one as the config class (attribute_map in transformers 5.23, models/*/configuration_*.py).
def _mixtral_experts(config: Config) -> Experts:
    return Experts(
        count=int(config.get("num_experts") or config["num_local_experts"]),
        per_token=int(config["num_experts_per_tok"]),
        size=int(config["intermediate_size"]),
    )


def _qwen2_moe_experts(config: Config) -> Experts:
    return _qwen_experts(config, int(config["num_experts"]))


def _qwen3_moe_experts(config: Config) -> Experts:
    return _qwen_experts(config, int(config.get("num_local_experts", config.get("num_experts", 0))))


def _qwen_experts(config: Config, count: int) -> Experts:
    return Experts(
        count=count,
        per_token=int(config["num_experts_per_tok"]),
        size=int(config["moe_intermediate_size"]),
    )


def _qwen_has_experts(config: Config, layer: int) -> bool:
    is_dense = layer in (config.get("mlp_only_layers") or ())
    return not is_dense and (layer + 1) % int(config.get("decoder_sparse_step", 1)) == 0


def _always(config: Config) -> bool:
    del config
    return True


_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
# Default of these classes: no sliding window, even if config.json has a value of sliding_window.
_NO_WINDOW = {"use_sliding_window": False}

FAMILIES: dict[str, Family] = {
    "llama": Family(linears=_llama),
    "mistral": Family(linears=_mistral, defaults={"num_key_value_heads": 8}),
    "qwen2": Family(linears=_qwen2, defaults=_NO_WINDOW | {"num_key_value_heads": 32}),
    "qwen3": Family(
        linears=_qwen3,
        defaults=_NO_WINDOW | {"head_dim": 128, "num_key_value_heads": 32},
        head_norms=_always,
    ),
    "gemma": Family(linears=_qwen3, defaults=_GEMMA | {"num_key_value_heads": 16}),
    "gemma2": Family(
        linears=_qwen3,
        defaults=_GEMMA
        | {"num_key_value_heads": 4}
        | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        num_block_norms=4,
    ),
    "gemma3_text": Family(
        linears=_qwen3,
        defaults=_GEMMA | {"num_key_value_heads": 4},
        num_block_norms=4,
        head_norms=_always,
    ),
    "smollm3": Family(
        linears=_llama,
        defaults=_NO_WINDOW | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "phi3": Family(linears=_phi3, has_fused_gate=True),
    "phi": Family(
        linears=_phi,
        defaults={"hidden_act": "gelu_new"},
        norm_kind="layer",
        num_block_norms=1,
        has_head_bias=True,
        is_gated=False,
        head_norms=lambda config: bool(config.get("qk_layernorm")),
    ),
    "gpt_neox": Family(
        linears=_gpt_neox,
        defaults={"attention_bias": True},
        layers="gpt_neox.layers",
        embeddings="gpt_neox.embed_in",
        norm_kind="layer",
        is_gated=False,
    ),
    "mixtral": Family(
        linears=_mixtral,
        defaults={"num_key_value_heads": 8},
        inner_key=None,
        experts=_mixtral_experts,
    ),
    "qwen2_moe": Family(
        linears=_qwen2_moe,
        dense_linears=_qwen2_moe_dense,
        has_experts=_qwen_has_experts,
        defaults=_NO_WINDOW | {"qkv_bias": True, "num_key_value_heads": 16},
        inner_key="shared_expert_intermediate_size",
        experts=_qwen2_moe_experts,
    ),
    "qwen3_moe": Family(
        linears=_qwen3_moe,
        dense_linears=_qwen3_moe_dense,
        has_experts=_qwen_has_experts,
        defaults=_NO_WINDOW | {"num_key_value_heads": 4},
        inner_key=None,
        head_norms=_always,
        experts=_qwen3_moe_experts,
    ),
}
