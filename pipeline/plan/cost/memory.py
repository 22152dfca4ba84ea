"""Bytes of a run, term by term: a rank's device, its peak while loading, a node's host, the disk.

P: trainable parameters, W: ranks, b: bytes of a value in the training dtype. The peak is that of
the worst moment of a step, and the terms are what is alive then. docs/memory.md compares them with
measured tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import Activations, activations
from pipeline.plan.cost.gathers import gathers
from pipeline.plan.given.adapter_counts import adapter_counts, trainable_parameters
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import DTYPE_BYTES, Layout
from pipeline.plan.given.shape import ModelShape

# Elements of a reduce bucket: 64 MB of fp32, enough to fill a link, and copied twice while reduced.
_MAX_BUCKET = 2**24
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
    loading_tensors: int  # of that, live tensors alone
    host_peak_bytes: int  # of one node

    @property
    def peak_bytes(self) -> int:
        """All of `per_rank`."""
        return sum(self.per_rank.values())

    @property
    def tensor_bytes(self) -> int:
        """Most bytes in live tensors, loading or in a step: torch.cuda.max_memory_allocated."""
        in_step = sum(size for term, size in self.per_rank.items() if term not in _NOT_TENSORS)
        return max(in_step, self.loading_tensors)

    @property
    def device_need(self) -> int:
        """What the device must have: loading, or a step."""
        return max(self.peak_bytes, self.load_peak_bytes)


def memory(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    hardware: Hardware,
    tokens: int,
    *,
    supervised_share: float = 1.0,
    attended: int | None = None,
) -> Memory:
    """Memory of a run whose longest sequences have `tokens` tokens.

    `supervised_share` of them have logits, and attention reaches over `attended` tokens, those of a
    document in a pack; without these over and for all of them, which is the upper bound.
    """
    is_cuda = hardware.kind == "cuda"
    acts = activations(
        shape, settings, layout, tokens, supervised_share, attended=attended, is_cuda=is_cuda
    )
    moments = _moments(shape, settings, layout, acts, is_cuda=is_cuda)
    always = _resident(shape, settings, layout)
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    terms = always | moments[worst]
    load = loading_tensors = _load_peak(shape, settings, layout, is_cuda=is_cuda)
    if is_cuda:
        terms["allocator_slack"] = int(_ALLOCATOR_SLACK * sum(terms.values()))
        terms["cuda_context"] = _CUDA_CONTEXT
        load = int(load * (1 + _ALLOCATOR_SLACK)) + _CUDA_CONTEXT
    peak = max(sum(terms.values()), load)
    return Memory(
        per_rank={term: size for term, size in terms.items() if size},
        worst_moment=worst,
        load_peak_bytes=load,
        loading_tensors=loading_tensors,
        host_peak_bytes=_host_peak(shape, settings, layout, 0 if is_cuda else peak),
    )


def bucket_elements(shape: ModelShape, settings: RunSettings) -> int:
    """Elements of a ZeRO reduce bucket: all gradients at once if they are small enough."""
    adapter = adapter_counts(shape, settings)
    elements = max(min(adapter.parameters, _MAX_BUCKET), adapter.largest_matrix)
    return elements + elements % 2  # DeepSpeed asserts an even number


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
    is_evaluated = settings.eval_data is not None and settings.evaluation_strategy != "no"
    # that of the lowest held-out loss beside those kept, and one more while a new one is written
    checkpoints = checkpoint_bytes(trainable) * (settings.save_total_limit + is_evaluated + 1)
    if settings.keep_best:  # fp32 weights: the best that a checkpoint names, and a better one
        checkpoints += 2 * checkpoint_bytes(trainable) // 3
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
        stored = 1 if settings.load_in_4bit else b
        terms["whole_on_every_rank"] = gathers(shape, settings).persistent * stored
        if layout.hpz_partition_size > 1:
            terms["hpz_copy"] = shared // layout.hpz_partition_size
        terms["adapter_weights"] += b * trainable // world  # its shard, and all of it
        # DeepSpeed 0.19.8 stage3.py: the fp32 gradients and one bucket are allocated for good
        terms["adapter_gradients"] = 4 * trainable // world
        terms["zero_buckets"] = 4 * bucket_elements(shape, settings)
    return terms


def _moments(
    shape: ModelShape, settings: RunSettings, layout: Layout, acts: Activations, *, is_cuda: bool
) -> dict[str, dict[str, int]]:
    """What is alive beside the resident terms, at each moment that may be the worst of a step."""
    k = layout.checkpointed_layers
    boundaries, others = k * acts.boundary, (shape.num_layers - k) * acts.block
    kept = boundaries + others
    # of the last block that keeps everything, and of the first one that is recomputed
    in_block = max(others, acts.recomputed if k else 0)
    waiting, reduction = _gradients(shape, settings, layout, is_cuda=is_cuda)
    between = waiting if layout.accumulation_steps > 1 else {}
    # DeepSpeed 0.19.8 stage_1_and_2.py:3256: each backward pass begins with an empty bucket
    bucket = layout.bytes_per_value * bucket_elements(shape, settings)
    filling = {} if layout.is_sharded else {"zero_buckets": bucket}
    is_reduced_early = trainable_parameters(shape, settings) > bucket_elements(shape, settings)
    head, block, experts = _gathered(shape, settings, layout)
    expanded = max(linear.weights for linear in shape.linears) * layout.bytes_per_value
    return {
        "the loss": between
        | {"activations": kept, "logits": acts.logits, "gathered_layers": head + block + experts},
        "the last norm's backward pass": between
        | filling
        | {
            "activations": kept,
            "working_set": acts.final_working,
            "gathered_layers": 2 * block + experts,
        },
        "a block's backward pass": waiting
        | filling
        | (reduction if is_reduced_early else {})
        | {
            "activations": boundaries + in_block,
            "working_set": acts.block_working,
            "gathered_layers": 2 * block + experts,
            "dequantised_weight": expanded if settings.is_quantised else 0,
        },
        # what is left then: a block's input and its gradient (measured)
        "the reduction of gradients": {"activations": 2 * acts.boundary} | reduction,
    }


def _gradients(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """What gradients take while they wait for the step, and while a bucket of them is reduced.

    DeepSpeed 0.19.8. Stage 2 (stage_1_and_2.py): this rank's part waits, in fp32 in a bf16 run
    (grad_accum_dtype); a full bucket is copied once to be flat and, in bf16, once to fp32. Stage
    1: all of them wait as they are, beside an empty bucket. Stage 3 (stage3.py): part and bucket
    are there for good (see `_resident`); a bucket is copied flat, and scattered, in fp32 (gloo, the
    library of CPU ranks, makes another copy).
    """
    trainable, b = trainable_parameters(shape, settings), layout.bytes_per_value
    bucket, is_bf16 = bucket_elements(shape, settings), layout.training_dtype == "bfloat16"
    own = (4 if is_bf16 else b) * trainable // layout.world_size
    if layout.is_sharded:
        return {}, {"reduction": (4 if is_cuda else 8) * bucket}
    reduction = {"zero_buckets": b * bucket, "reduction": (b + (4 if is_bf16 else 0)) * bucket}
    if layout.zero_stage == 1:
        return {"adapter_gradients": b * trainable, "zero_buckets": b * bucket}, reduction
    return {"adapter_gradients": own}, {"adapter_gradients": own} | reduction


def _gathered(shape: ModelShape, settings: RunSettings, layout: Layout) -> tuple[int, int, int]:
    """Bytes that are gathered at ZeRO-3, elsewhere none: the head, one block, and kept experts.

    A block that is not recomputed keeps its gathered experts until its backward pass (measured:
    fused experts go through no linear layer that gathers them again).
    """
    if not layout.is_sharded:
        return 0, 0, 0
    head = shape.vocab_size * shape.hidden_size * layout.bytes_per_value
    base = base_bytes(shape, settings, layout.training_dtype)
    embeddings = head * (1 if shape.is_tied else 2)
    block = (base - quantisation_constants(shape, settings) - embeddings) // shape.num_layers
    experts = shape.expert_parameters * layout.bytes_per_value // shape.num_layers
    return head, block, (shape.num_layers - layout.checkpointed_layers) * experts


def _load_peak(shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool) -> int:
    """Peak of a rank's device while the base is loaded.

    transformers 5.23 shards a 16-bit base as it is read by rank 0: its share, and the tensor that
    is being read. A quantised one is whole on every rank before DeepSpeed shards it, unless it
    goes through the host (model/base.py); one tensor waits in 16 bits to be quantised on a CPU
    (measured), up to four are reckoned with on a GPU (an assumption).
    """
    b = layout.bytes_per_value
    base = base_bytes(shape, settings, layout.training_dtype)
    largest = max(linear.weights for linear in shape.linears) * b
    constants = quantisation_constants(shape, settings)
    if layout.is_sharded and (not settings.is_quantised or layout.loads_through_host):
        experts = shape.expert_parameters * b // shape.num_layers  # fused while they are read
        widest = max(largest, shape.vocab_size * shape.hidden_size * b, experts)
        read = 0 if is_cuda else base  # what rank 0 reads is on the same device
        shared, copies = base - constants, layout.hpz_partition_size
        share = 0 if layout.offload_param == "cpu" else shared // layout.world_size
        share += shared // copies if copies > 1 else 0
        return share + constants + widest + read
    waiting = 4 if is_cuda else 1
    return base + (waiting * largest if settings.is_quantised else 0)


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
    elif layout.is_sharded and not settings.is_quantised and device_peak == 0:
        need += base  # rank 0 reads it whole
    return need + 16 * trainable_parameters(shape, settings)  # gathered and written by rank 0
