"""FLOPs and bytes of a token, a micro-batch and a step, before rates and layout.

N: weights of the blocks' linear layers, P: trainable parameters, D: hidden size, V: vocabulary,
L: blocks, T: tokens of a sequence. A multiplication and its addition are 2 FLOPs. Kernels and
passes are those of transformers 5.23 (models/llama/modeling_llama.py) and peft 0.21
(tuners/lora/layer.py); tests/plan/cost/test_per_token.py counts them on models.
"""

from dataclasses import dataclass
from functools import lru_cache

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import has_scores, is_by_document
from pipeline.plan.given.adapter_counts import trainable_parameters
from pipeline.plan.given.layout import DTYPE_BYTES
from pipeline.plan.given.shape import ModelShape

# Numbers that a forward pass of a block reads or writes beside its matrix products, in units of
# the training dtype.
_NORM_PASSES = 18  # RMSNorm in fp32: cast, square, mean, two products and a cast, each a kernel
_RESIDUAL_PASSES = 3  # two read, one written, after attention and after the MLP
_ROTARY_PASSES = 10  # halves turned and joined, two products, one sum
_GATE_PASSES = 5  # activation: one read, one written; product: two read, one written
_LORA_IN_PASSES = 1  # A reads its input
_DROPOUT_PASSES = 2  # and dropout reads and writes it first
_LORA_OUT_PASSES = 6  # B writes; scaling reads and writes; the sum reads two and writes one
# Of a block with experts (grouped_mm): around them, and for each expert of a token at the width of
# the hidden state (copied in and out, weighted, summed) and at the inner width.
_ROUTING_PASSES = 8
_EXPERT_HIDDEN_PASSES = 12
_EXPERT_INNER_PASSES = 8
# Of scores that exist: scaled, capped in three kernels, masked, softmax in fp32, cast.
_SCORE_PASSES = 22

# Kernels of a forward pass of a block: two norms (8 each), rotary (10), residuals and gate (4) and
# attention.
_BLOCK_KERNELS = 31
_LORA_KERNELS = 4  # A, B, scaling, sum; dropout is one more
_DEQUANTISE_KERNELS = 2  # the constants, then the weight
_SCORES_KERNELS = 15  # of a document's attention that makes its scores; else one kernel
_EXPERTS_KERNELS = 22  # routing, sorting, two grouped products, and back


@dataclass(frozen=True, kw_only=True)
class CostPerToken:
    """Sums over a model and its adapter. `_flops` are of one token and one forward pass.

    `score_flops` are those for each token of its sequence. `token_values`: numbers that a token
    moves in a forward pass through all blocks, attention's scores apart: `score_values` are those
    for each token of its sequence, none where the scores stay on the chip. `linear_values` and
    `expert_values`: weights of linear layers and of all experts, of which a token meets
    `expert_share`. `packed_bytes`: the linear weights as stored where they are quantised, else 0.
    `document_kernels` are those for each document of a pack, beside the `kernels` of a micro-batch.
    `stored_bytes`: the base as ZeRO-3 divides it, without quantisation's constants, which stay
    whole on every rank.
    """

    trainable: int
    base_flops: float
    adapter_flops: float
    score_flops: float
    head_flops: float
    token_values: float
    score_values: float
    linear_values: int
    expert_values: int
    expert_share: float
    packed_bytes: float
    stored_bytes: float
    kernels: int
    document_kernels: int
    modules: int


def cost_per_token(shape: ModelShape, settings: RunSettings, training_dtype: str) -> CostPerToken:
    """The sums for a model; kept for the last few, so that a search asks for the price of one."""
    return _cached(_Identity(shape, settings), training_dtype)


@dataclass(frozen=True, kw_only=True)
class SequenceFlops:
    """Model FLOPs of a sequence, forward and backward: what is dealt to the ranks.

    For each token, for each squared length of a document (attention does not cross documents), and
    for each token that counts in the loss and so has logits.
    """

    per_token: float
    per_square: float
    per_logit: float


def sequence_flops(work: CostPerToken) -> SequenceFlops:
    """What a sequence costs, recomputation apart.

    The backward pass of a frozen weight costs as much as its forward pass, for the gradient of its
    input alone; that of an adapter, and of attention's products of two inputs, twice as much.
    """
    return SequenceFlops(
        per_token=2 * work.base_flops + 3 * work.adapter_flops,
        per_square=3 * work.score_flops,
        per_logit=2 * work.head_flops,
    )


class _Identity:
    """Key of a cache: these two objects, which are frozen and which it keeps alive."""

    def __init__(self, shape: ModelShape, settings: RunSettings) -> None:
        self.shape = shape
        self.settings = settings
        self._ids = (id(shape), id(settings))

    def __hash__(self) -> int:
        return hash(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other._ids == self._ids


@lru_cache(maxsize=16)
def _cached(key: _Identity, training_dtype: str) -> CostPerToken:
    shape, settings = key.shape, key.settings
    n, b = shape.linear_parameters, DTYPE_BYTES[training_dtype]
    share = 0.5 if settings.load_in_4bit else 1.0
    packed = share * n if settings.is_quantised else 0.0
    trainable = trainable_parameters(shape, settings)
    scores = shape.num_layers * shape.num_heads
    # Causal kernels skip the half of the scores that causality hides (FlashAttention-2, arXiv
    # 2307.08691 s.3.1), PyTorch's too: training hands it no mask (model/loss.py). Soft-capped
    # scores are made whole unless FlashAttention caps them.
    are_made = has_scores(shape, settings)
    return CostPerToken(
        trainable=trainable,
        base_flops=2 * shape.active_linear_parameters,
        adapter_flops=2 * trainable,
        # Scores and their product with the values, 2 FLOPs each (PaLM, arXiv 2204.02311 app. B).
        score_flops=(4 if are_made else 2) * scores * shape.head_dim,
        head_flops=2 * shape.vocab_size * shape.hidden_size,
        token_values=_token_values(shape, settings),
        score_values=_SCORE_PASSES * scores if are_made else 0,
        linear_values=n,
        expert_values=shape.expert_parameters,
        expert_share=shape.experts_per_token / max(1, shape.num_experts),
        packed_bytes=packed,
        stored_bytes=(packed or n * b) + (shape.parameters - n) * b,
        kernels=_kernels(shape, settings),
        document_kernels=_document_kernels(shape, settings),
        modules=shape.num_layers * len(shape.linears),
    )


def _token_values(shape: ModelShape, settings: RunSettings) -> float:
    queries = shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    block = (
        _NORM_PASSES * shape.norm_parameters
        + 2 * _RESIDUAL_PASSES * shape.hidden_size
        + _ROTARY_PASSES * (queries + keys)
        + 2 * (queries + keys)  # attention reads q, k and v and writes its output
        + _GATE_PASSES * shape.intermediate_size
        + sum(linear.d_in + linear.d_out for linear in shape.linears)
        + (2 * queries if is_by_document(settings) else 0)  # outputs of documents are joined
    )
    if shape.num_experts:
        each = _EXPERT_HIDDEN_PASSES * shape.hidden_size + _EXPERT_INNER_PASSES * shape.expert_size
        block += _ROUTING_PASSES * shape.hidden_size + shape.experts_per_token * each
    on_input = _LORA_IN_PASSES + (_DROPOUT_PASSES if settings.lora_dropout > 0 else 0)
    adapters = sum(
        on_input * linear.d_in + _LORA_OUT_PASSES * linear.d_out
        for _, linear in shape.targeted(settings.lora_target_modules)
    )
    return shape.num_layers * block + adapters


def _kernels(shape: ModelShape, settings: RunSettings) -> int:
    linears = shape.num_layers * len(shape.linears)
    per_linear = 1 + (_DEQUANTISE_KERNELS if settings.is_quantised else 0)
    per_adapter = _LORA_KERNELS + (1 if settings.lora_dropout > 0 else 0)
    adapters = len(shape.targeted(settings.lora_target_modules))
    per_block = _BLOCK_KERNELS + (_EXPERTS_KERNELS if shape.num_experts else 0)
    return shape.num_layers * per_block + per_linear * linears + per_adapter * adapters


def _document_kernels(shape: ModelShape, settings: RunSettings) -> int:
    if not is_by_document(settings):
        return 0
    return shape.num_layers * (_SCORES_KERNELS if has_scores(shape, settings) else 1)
