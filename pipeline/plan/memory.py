"""Bytes per rank, term by term.

B: sequences of a micro-batch, T: tokens of a sequence, P: trainable parameters, W: ranks.
Activations are an estimate from what the blocks keep for their backward pass; the other terms
count tensors that exist. docs/architecture.md says which of them have been compared with a run.
"""

from pipeline.config.settings import RunSettings
from pipeline.plan.layout import DTYPE_BYTES, Layout
from pipeline.plan.shape import ModelShape

# Logits are made for this many bytes of fp32 at a time (model/loss.py).
LOGITS_CHUNK_BYTES = 256 * 2**20
# Gradients and Adam's work run over flat buffers of at most this many elements.
_MAX_BUCKET = 50_000_000


def trainable_parameters(shape: ModelShape, settings: RunSettings) -> int:
    """A is (r, d_in) and B is (d_out, r) for every targeted layer (LoRA, arXiv 2106.09685 s.4)."""
    targets = shape.targeted(settings.lora_target_modules)
    return sum(settings.lora_r * (linear.d_in + linear.d_out) for _, linear in targets)


def largest_adapter_matrix(shape: ModelShape, settings: RunSettings) -> int:
    """Elements of the largest A or B."""
    targets = shape.targeted(settings.lora_target_modules)
    return settings.lora_r * max(max(linear.d_in, linear.d_out) for _, linear in targets)


def bucket_elements(shape: ModelShape, settings: RunSettings) -> int:
    """Elements of a ZeRO reduce bucket: all gradients at once if they are small enough."""
    largest = largest_adapter_matrix(shape, settings)
    return max(min(trainable_parameters(shape, settings), _MAX_BUCKET), largest)


def base_bytes(shape: ModelShape, settings: RunSettings, training_dtype: str) -> int:
    """The whole frozen base as it is held, before any sharding."""
    b = DTYPE_BYTES[training_dtype]
    n = shape.linear_parameters
    rest = (shape.parameters - n) * b
    if settings.load_in_4bit:
        # 4 bits a weight; one fp32 constant per 64 weights, or with double quantisation one byte
        # per 64 and one fp32 per 64 x 256 (QLoRA, arXiv 2305.14314 s.3).
        constants = n / 64 * (1 + 4 / 256) if settings.bnb_4bit_use_double_quant else n / 64 * 4
        return int(n / 2 + constants) + rest
    if settings.load_in_8bit:
        rows = shape.num_layers * sum(linear.d_out for linear in shape.linears)
        return n + 4 * rows + rest  # one fp32 scale a row (LLM.int8, arXiv 2208.07339 s.3)
    return n * b + rest


def memory_per_rank(shape: ModelShape, settings: RunSettings, layout: Layout) -> dict[str, int]:
    """Bytes of each term at the peak of a training step."""
    b = DTYPE_BYTES[layout.training_dtype]
    trainable = trainable_parameters(shape, settings)
    is_sharded = layout.is_sharded
    base = base_bytes(shape, settings, layout.training_dtype)
    states = 12 * trainable // layout.world_size  # fp32 master and two Adam moments (ZeRO, s.3.1)
    grads = 4 * trainable // (layout.world_size if layout.zero_stage > 1 else 1)
    terms = {
        "base_weights": base // layout.world_size if is_sharded else base,
        "adapter_weights": trainable * b,
        "adapter_gradients": grads + trainable * b,
        "optimizer_state": states,
        "zero_buckets": bucket_elements(shape, settings) * 4,
        "activations": _activations(shape, settings, layout, b),
        "logits": _logits(shape, settings, layout, b),
    }
    if is_sharded:  # the layer in use, the one fetched ahead, and the head
        head = shape.vocab_size * shape.hidden_size * b
        terms["gathered_layers"] = 2 * (base - head) // shape.num_layers + head
        if settings.load_in_4bit:  # the constants stay whole on every rank (DeepSpeed 0.19.8)
            constants = base_bytes(shape, settings, layout.training_dtype)
            constants -= shape.linear_parameters // 2
            constants -= (shape.parameters - shape.linear_parameters) * b
            terms["quantisation_constants"] = constants
    if settings.is_quantised:  # the largest matrix, expanded
        terms["dequantised_weight"] = max(x.parameters for x in shape.linears) * b
    return terms


def load_peak_bytes(shape: ModelShape, settings: RunSettings, layout: Layout) -> int:
    """Peak of a rank while the base is loaded.

    transformers 5.23 shards a 16-bit base as it is read, but builds a quantised one whole on
    every rank before DeepSpeed can shard it.
    """
    base = base_bytes(shape, settings, layout.training_dtype)
    if layout.is_sharded and not settings.is_quantised:
        return base // layout.world_size + 2 * base // shape.num_layers
    return base


def checkpoint_bytes(trainable: int) -> int:
    """One checkpoint: fp32 weights and two moments."""
    return int(12 * trainable * 1.01)


def _activations(shape: ModelShape, settings: RunSettings, layout: Layout, b: int) -> int:
    tokens = layout.micro_batch_size * settings.max_length
    h, inner = shape.hidden_size, shape.intermediate_size
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    # Kept by one block and token: two norms (input in training dtype and fp32), q k v and the
    # attention output, gate, up, their activation and product; peft keeps a dropped-out input
    # for every adapter when dropout is on.
    block = 2 * h * (b + 4) + 2 * heads * b + 4 * inner * b + 2 * h * b
    if settings.lora_dropout > 0:
        targets = shape.targeted(settings.lora_target_modules)
        block += sum(linear.d_in for _, linear in targets) * (b + 1) // shape.num_layers
    kept = max(1, shape.num_layers - layout.checkpointed_layers)
    boundaries = layout.checkpointed_layers * h * b
    return tokens * (kept * block + boundaries)


def _logits(shape: ModelShape, settings: RunSettings, layout: Layout, b: int) -> int:
    # Logits in the training dtype, in fp32, and their gradient in fp32.
    every = layout.micro_batch_size * settings.max_length * shape.vocab_size * 4
    return min(every, LOGITS_CHUNK_BYTES) * (8 + b) // 4
