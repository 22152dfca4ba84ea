"""Block: sizes of one kind of decoder block."""

from dataclasses import dataclass

from pipeline.plan.given.families import ExpertTensor, Linear, NormKind


@dataclass(frozen=True, kw_only=True)
class Block:
    """One kind of decoder block.

    `intermediate_size`: inner width of the dense MLP, or of the shared expert in a block with
    experts; 0 if there is neither. `experts`: fused tensors in the order in which the class defines
    them. `saved`: what the block saves for backward per token, adapters excluded: the number of
    values in the training dtype, and the number of bytes in other dtypes. It is counted on the
    model's class; None if activations.py computes it. `saved_for_expert_adapters`: number of values
    per token that are also saved if the experts have an adapter.
    """

    linears: tuple[Linear, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_kind: NormKind = "rms"
    num_norms: int = 2  # of the hidden width
    has_head_norms: bool = False  # each query head and each key head is normalised
    is_gated: bool = True
    has_fused_gate: bool = False  # gate and up projection are one linear layer
    experts: tuple[ExpertTensor, ...] = ()
    experts_per_token: int = 0
    other_parameters: int = 0  # parameters that the fields above do not include
    saved: tuple[int, int] | None = None
    saved_for_expert_adapters: int | None = None

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
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def has_fused_attention(self) -> bool:
        """Whether one linear layer computes queries, keys and values."""
        return any(x.name.endswith(("qkv_proj", "query_key_value")) for x in self.linears)

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
        full = self.num_norms * self.hidden_size
        per_value = 1 if self.norm_kind == "rms" else 2
        return per_value * (full + 2 * self.head_dim * self.has_head_norms)

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
