"""Bytes of a run, term by term: a rank's device, its peak while loading, a node's host, the disk.

P: trainable parameters, W: ranks, b: bytes of a value in the training dtype. The peak is that of
the worst moment of a step, and the terms are what is alive then. docs/memory.md compares them with
measured tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.activations import activations
from pipeline.plan.adapted import adapted, trainable_parameters
from pipeline.plan.hardware import Hardware
from pipeline.plan.layout import DTYPE_BYTES, Layout
from pipeline.plan.shape import ModelShape

# Gradients and Adam's work run over flat buffers of at most this many elements.
_MAX_BUCKET = 50_000_000
# Of a process with CUDA, kernels and NCCL's buffers loaded; an assumption, not measured on a GPU.
_CUDA_CONTEXT = 700 * 2**20
# What the caching allocator holds beyond live tensors; an assumption, not measured on a GPU.
_ALLOCATOR_SLACK = 0.03
# Host memory of a rank's process: libraries and CUDA's share; an assumption.
_PROCESS = 4 * 2**30
_NOT_TENSORS = ("cuda_context", "allocator_slack")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. `per_rank` holds what is alive on a rank's device at the worst moment of a step."""

    per_rank: Mapping[str, int]
    worst_moment: str
    load_peak_bytes: int
    host_peak_bytes: int  # of one node

    @property
    def peak_bytes(self) -> int:
        """All of `per_rank`."""
        return sum(self.per_rank.values())

    @property
    def tensor_bytes(self) -> int:
        """Live tensors alone: what torch.cuda.max_memory_allocated counts."""
        return sum(size for term, size in self.per_rank.items() if term not in _NOT_TENSORS)

    @property
    def device_need(self) -> int:
        """What the device must have: loading, or a step."""
        return max(self.peak_bytes, self.load_peak_bytes)


def memory(
    shape: ModelShape, settings: RunSettings, layout: Layout, hardware: Hardware, tokens: int
) -> Memory:
    """Memory of a run whose longest sequences have `tokens` tokens."""
    is_cuda = hardware.kind == "cuda"
    moments = _moments(shape, settings, layout, tokens, is_cuda=is_cuda)
    always = _resident(shape, settings, layout)
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    terms = always | moments[worst]
    load = _load_peak(shape, settings, layout)
    if is_cuda:
        terms["allocator_slack"] = int(_ALLOCATOR_SLACK * sum(terms.values()))
        terms["cuda_context"] = _CUDA_CONTEXT
        load = int(load * (1 + _ALLOCATOR_SLACK)) + _CUDA_CONTEXT
    peak = max(sum(terms.values()), load)
    return Memory(
        per_rank={term: size for term, size in terms.items() if size},
        worst_moment=worst,
        load_peak_bytes=load,
        host_peak_bytes=_host_peak(shape, settings, layout, 0 if is_cuda else peak),
    )


def bucket_elements(shape: ModelShape, settings: RunSettings) -> int:
    """Elements of a ZeRO reduce bucket: all gradients at once if they are small enough."""
    adapter = adapted(shape, settings)
    return max(min(adapter.parameters, _MAX_BUCKET), adapter.largest_matrix)


def base_bytes(shape: ModelShape, settings: RunSettings, training_dtype: str) -> int:
    """The whole frozen base as it is held, before any sharding."""
    b = DTYPE_BYTES[training_dtype]
    n = shape.quantised_parameters
    if settings.is_quantised:
        each = n // 2 if settings.load_in_4bit else n
        return each + quantisation_constants(shape, settings) + (shape.parameters - n) * b
    return shape.parameters * b


def quantisation_constants(shape: ModelShape, settings: RunSettings) -> int:
    """What 4 or 8 bits need beside the packed weights.

    4 bits: an fp32 constant per 64 weights, or with double quantisation a byte per 64 and an fp32
    per 64 x 256 (QLoRA, arXiv 2305.14314 s.3). 8 bits: an fp32 scale a row (arXiv 2208.07339 s.3).
    """
    n = shape.quantised_parameters
    if settings.load_in_4bit:
        return int(n / 64 * (1 + 4 / 256)) if settings.bnb_4bit_use_double_quant else n // 16
    if settings.load_in_8bit:
        return 4 * shape.num_layers * sum(linear.d_out for linear in shape.linears)
    return 0


def checkpoint_bytes(trainable: int) -> int:
    """One checkpoint: fp32 weights and two moments."""
    return int(12 * trainable * 1.01)


def disk_bytes(shape: ModelShape, settings: RunSettings) -> dict[str, int]:
    """What a run leaves on disk; merging writes the base once more, in its own dtype."""
    trainable = trainable_parameters(shape, settings)
    # one more than is kept while a new one is written
    checkpoints = checkpoint_bytes(trainable) * (settings.save_total_limit + 1)
    merged = shape.parameters * DTYPE_BYTES.get(shape.dtype, 4)
    return {"checkpoints": checkpoints, "adapter": 4 * trainable, "merged": merged}


def _resident(shape: ModelShape, settings: RunSettings, layout: Layout) -> dict[str, int]:
    """What stays from the first step on."""
    b, world = layout.bytes_per_value, layout.world_size
    trainable = trainable_parameters(shape, settings)
    base = base_bytes(shape, settings, layout.training_dtype)
    constants = quantisation_constants(shape, settings)
    terms = {
        # fp32 master and two Adam moments (ZeRO, arXiv 1910.02054 s.3.1), divided at every stage
        "optimizer_state": 12 * trainable // world,
        "quantisation_constants": constants,
        "adapter_weights": b * trainable,
        "base_weights": base - constants,
    }
    if layout.is_sharded:
        shared = terms["base_weights"]
        is_offloaded = layout.offload_param == "cpu"
        terms["base_weights"] = 0 if is_offloaded else shared // world
        if layout.hpz_partition_size > 1:
            terms["hpz_copy"] = shared // layout.hpz_partition_size
        terms["adapter_weights"] += b * trainable // world  # its shard, and all of it
        # DeepSpeed 0.19.8 stage3.py: the fp32 gradients and one bucket are allocated for good
        terms["adapter_gradients"] = 4 * trainable // world
        terms["zero_buckets"] = 4 * bucket_elements(shape, settings)
    return terms


def _moments(
    shape: ModelShape, settings: RunSettings, layout: Layout, tokens: int, *, is_cuda: bool
) -> dict[str, dict[str, int]]:
    """What is alive beside the resident terms, at each moment that may be the worst of a step."""
    acts = activations(shape, settings, layout, tokens, is_cuda=is_cuda)
    k = layout.checkpointed_layers
    boundaries, others = k * acts.boundary, (shape.num_layers - k) * acts.block
    kept = boundaries + others
    gradients, reduction = _gradients(shape, settings, layout)
    between = {"adapter_gradients": gradients if layout.accumulation_steps > 1 else 0}
    # of the last block that keeps everything, and of the first one that is recomputed
    in_block = max(others if k < shape.num_layers else 0, acts.block if k else 0)
    is_reduced_early = trainable_parameters(shape, settings) > bucket_elements(shape, settings)
    during = {"adapter_gradients": gradients} | (reduction if is_reduced_early else {})
    head, block = _gathered(shape, settings, layout)
    expanded = max(linear.weights for linear in shape.linears) * layout.bytes_per_value
    return {
        "the loss": between
        | {"activations": kept, "logits": acts.logits, "gathered_layers": head + block},
        "the last norm's backward pass": between
        | {"activations": kept, "working_set": acts.final_working, "gathered_layers": 2 * block},
        "a block's backward pass": during
        | {
            "activations": boundaries + in_block,
            "working_set": acts.block_working,
            "gathered_layers": 2 * block,
            "dequantised_weight": expanded if settings.is_quantised else 0,
        },
        "the reduction of gradients": {"adapter_gradients": gradients, "activations": boundaries}
        | reduction,
    }


def _gradients(
    shape: ModelShape, settings: RunSettings, layout: Layout
) -> tuple[int, dict[str, int]]:
    """Gradients that wait for the step, and what reducing a bucket of them needs for a moment.

    DeepSpeed 0.19.8 zero/stage_1_and_2.py: gradients wait in fp32, this rank's part of them, at
    stage 2 and as they are at stage 1; a bucket is copied once to be flat and once to fp32. At
    stage 3 both are resident; a bucket is flattened and scattered in fp32.
    """
    trainable, b = trainable_parameters(shape, settings), layout.bytes_per_value
    bucket = bucket_elements(shape, settings)
    if layout.is_sharded:
        resident = 4 * trainable // layout.world_size
        return resident, {"zero_buckets": 4 * bucket + 8 * bucket}
    wait = b * trainable if layout.zero_stage == 1 else 4 * trainable // layout.world_size
    return wait, {"zero_buckets": (2 * b + (4 if b < 4 else 0)) * bucket}


def _gathered(shape: ModelShape, settings: RunSettings, layout: Layout) -> tuple[int, int]:
    """Bytes of the head and of one block as they are gathered at ZeRO-3; elsewhere nothing is."""
    if not layout.is_sharded:
        return 0, 0
    head = shape.vocab_size * shape.hidden_size * layout.bytes_per_value
    base = base_bytes(shape, settings, layout.training_dtype)
    embeddings = head * (1 if shape.is_tied else 2)
    block = (base - quantisation_constants(shape, settings) - embeddings) // shape.num_layers
    return head, block


def _load_peak(shape: ModelShape, settings: RunSettings, layout: Layout) -> int:
    """Peak of a rank's device while the base is loaded.

    transformers 5.23 shards a 16-bit base as it is read: its share and the tensor being read. A
    quantised one is whole on every rank before DeepSpeed shards it, unless it is loaded through
    the host (model/base.py); up to four tensors wait in 16 bits to be quantised.
    """
    b = layout.bytes_per_value
    base = base_bytes(shape, settings, layout.training_dtype)
    embedding = shape.vocab_size * shape.hidden_size * b
    largest = max(linear.weights for linear in shape.linears) * b
    if layout.is_sharded and (not settings.is_quantised or layout.loads_through_host):
        constants = quantisation_constants(shape, settings)
        return (base - constants) // layout.world_size + constants + max(embedding, largest)
    return base + (4 * largest if settings.is_quantised else 0)


def _host_peak(shape: ModelShape, settings: RunSettings, layout: Layout, device_peak: int) -> int:
    """Host memory of one node; `device_peak` is a rank's where its device is the host itself.

    Weights are memory-mapped, so that they need no memory of their own but on the way.
    """
    ranks = layout.ranks_per_node
    need = ranks * (device_peak or _PROCESS)
    base = base_bytes(shape, settings, layout.training_dtype)
    if layout.offload_param == "cpu":  # a shard a rank, pinned
        need += ranks * base // layout.world_size
    if layout.loads_through_host:
        need += ranks * base
    return need + 16 * trainable_parameters(shape, settings)  # gathered and written by rank 0
