"""Predicted memory of devices and hosts in a step and while loading, and predicted disk space.

Memory in a step is predicted for several moments, as a sum of named terms, each the size of some
tensors. The worst moment is the one with the largest sum. docs/memory.md compares the terms with
measured tensors. In the formulas b is the number of bytes per value in the training dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import Activations, activations
from pipeline.plan.cost.gathers import gathers
from pipeline.plan.cost.saved_gradients import saved_module_gradients
from pipeline.plan.given.adapter_counts import (
    adapter_counts,
    adapter_counts_by_kind,
    trainable_parameters,
)
from pipeline.plan.given.block import Block
from pipeline.plan.given.fast_paths import has_one_reduction
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.layout import DTYPE_BYTES, Layout, SequenceProfile
from pipeline.plan.given.new_tokens import token_rows
from pipeline.plan.given.saved_modules import saved_modules, saved_parameters
from pipeline.plan.given.shape import ModelShape

# Largest number of elements of a reduce bucket, 64 MB in fp32: large enough to saturate a link.
# Larger buckets would cost memory, since a bucket is copied twice while it is reduced.
_MAX_BUCKET = 2**24
# Bytes of a process's CUDA context, kernels and NCCL buffers: an assumption, not measured on a GPU.
_CUDA_CONTEXT = 700 * 2**20
# Memory that the caching allocator holds beyond live tensors, as a fraction of them: an assumption.
_ALLOCATOR_SLACK = 0.03
# Bytes of host memory of a rank's process for libraries and the CUDA runtime: an assumption.
_PROCESS = 4 * 2**30
# Inputs of checkpointed blocks on the device if they are offloaded (model/host_activations.py).
INPUTS_ON_DEVICE = 2
_NOT_TENSORS = ("cuda_context", "allocator_slack")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Predicted memory in bytes.

    `per_rank`: terms on a rank's device at the worst moment of a step. `worst_moment`: name of that
    moment. `load_peak_bytes`: peak on a rank's device while the base is loaded. `loading_tensors`:
    the part of that peak that is live tensors. `host_peak_bytes`: peak host memory of one node.
    """

    per_rank: Mapping[str, int]
    worst_moment: str
    load_peak_bytes: int
    loading_tensors: int
    host_peak_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Sum of `per_rank`."""
        return sum(self.per_rank.values())

    @property
    def tensor_bytes(self) -> int:
        """Peak bytes of live tensors while loading and training (max_memory_allocated)."""
        in_step = sum(size for term, size in self.per_rank.items() if term not in _NOT_TENSORS)
        return max(in_step, self.loading_tensors)

    @property
    def device_need(self) -> int:
        """Bytes that the device needs for loading and training."""
        return max(self.peak_bytes, self.load_peak_bytes)


def memory(
    shape: ModelShape,
    settings: RunSettings,
    layout: Layout,
    hardware: Hardware,
    sequences: SequenceProfile,
) -> Memory:
    """Predicted memory of a run; `sequences` is the profile of its longest sequences."""
    is_cuda = hardware.kind == "cuda"
    acts = activations(shape, settings, layout, hardware, sequences)
    moments = _moments(shape, settings, layout, acts, is_cuda=is_cuda)
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    terms = _resident(shape, settings, layout) | moments[worst]
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
        host_peak_bytes=_host_peak(shape, settings, layout, 0 if is_cuda else peak)
        + (_offloaded_activations(layout, acts.boundary) if is_cuda else 0),
    )


def bucket_elements(shape: ModelShape, settings: RunSettings) -> int:
    """Elements of a ZeRO reduce bucket: all gradients of the adapter, but at most _MAX_BUCKET.

    It is at least as large as the largest adapter matrix.
    """
    adapter = adapter_counts(shape, settings)
    elements = max(min(adapter.parameters, _MAX_BUCKET), adapter.largest_matrix)
    return elements + elements % 2  # DeepSpeed asserts an even number


def base_bytes(shape: ModelShape, settings: RunSettings, training_dtype: str) -> int:
    """Bytes of the frozen base before sharding, after quantisation if the base is quantised."""
    b = DTYPE_BYTES[training_dtype]
    n = shape.quantised_parameters
    if settings.is_quantised:
        packed = n // 2 if settings.load_in_4bit else n
        return packed + quantisation_constants(shape, settings) + (shape.parameters - n) * b
    return shape.parameters * b


def quantisation_constants(shape: ModelShape, settings: RunSettings) -> int:
    """Bytes of the quantisation constants of a 4-bit or 8-bit base, without the weights.

    4 bits: one fp32 constant for each 64 weights; with double quantisation one byte for each 64
    weights, and one fp32 constant for each 64 x 256 (QLoRA, arXiv 2305.14314 s.3). 8 bits: one fp32
    scale for each row (arXiv 2208.07339 s.3).
    """
    n = shape.quantised_parameters
    if settings.load_in_4bit:
        return int(n / 64 * (1 + 4 / 256)) if settings.bnb_4bit_use_double_quant else n // 16
    if settings.load_in_8bit:
        rows = sum(count * sum(x.d_out for x in block.linears) for block, count in shape.counts())
        return 4 * rows
    return 0


def checkpoint_bytes(trainable: int) -> int:
    """Bytes of one checkpoint: fp32 weights and two Adam moments, plus 1 % for other files."""
    return int(12 * trainable * 1.01)


def disk_bytes(shape: ModelShape, settings: RunSettings) -> dict[str, int]:
    """Disk space in bytes of what a run writes; `merged` is the model in the dtype of the base."""
    trainable = trainable_parameters(shape, settings)
    is_evaluated = settings.eval_data is not None and settings.evaluation_strategy != "no"
    # PiSSA and OLoRA: checkpoints and adapter also have the initial A and B.
    initial = 4 * trainable if settings.splits_base else 0
    checkpoint = checkpoint_bytes(trainable) + initial
    # Checkpoints on disk: save_total_limit, the one with the lowest held-out loss, and one that is
    # being written.
    checkpoints = checkpoint * (settings.save_total_limit + is_evaluated + 1)
    if settings.keep_best:  # fp32 weights of the best adapter, and of a better one being written
        checkpoints += 2 * checkpoint_bytes(trainable) // 3
    merged = shape.parameters * DTYPE_BYTES.get(shape.dtype, 4)
    # The adapter file stores a tied weight under both of its names (adapter/publish.py).
    tied = sum(m.parameters for m in saved_modules(shape, settings) if m.tied_name)
    return {
        "checkpoints": checkpoints,
        "adapter": 4 * (trainable + tied) + initial,
        "merged": merged,
    }


def _resident(shape: ModelShape, settings: RunSettings, layout: Layout) -> dict[str, int]:
    """Terms that stay allocated throughout training."""
    b, world = layout.bytes_per_value, layout.world_size
    trainable = trainable_parameters(shape, settings)
    base = base_bytes(shape, settings, layout.training_dtype)
    constants = quantisation_constants(shape, settings)
    terms = {
        # fp32 master weights and two Adam moments (ZeRO, arXiv 1910.02054 s.3.1), sharded at every
        # stage
        "optimizer_state": 12 * trainable // world,
        "quantisation_constants": constants,
        "adapter_weights": b * trainable,
        "base_weights": base - constants,
    }
    if layout.is_sharded:
        sharded = terms["base_weights"]
        is_offloaded = layout.offload_param == "cpu"
        terms["base_weights"] = 0 if is_offloaded else sharded // world
        element_bytes = 1 if settings.load_in_4bit else b  # 4-bit weights are stored as uint8
        terms["persistent_parameters"] = gathers(shape, settings).persistent * element_bytes
        if layout.hpz_partition_size > 1:
            terms["hpz_copy"] = sharded // layout.hpz_partition_size
        # Each rank has its shard of the adapter, and a whole copy of the adapter without the part
        # on experts and without modules that are trained in full.
        adapter = adapter_counts(shape, settings)
        replicated = adapter.parameters - adapter.expert_parameters
        terms["adapter_weights"] = b * trainable // world + b * replicated
        # DeepSpeed 0.19.8 stage3.py allocates fp32 gradients and one bucket persistently
        terms["adapter_gradients"] = 4 * trainable // world
        terms["zero_buckets"] = 4 * bucket_elements(shape, settings)
    return terms


def _moments(
    shape: ModelShape, settings: RunSettings, layout: Layout, acts: Activations, *, is_cuda: bool
) -> dict[str, dict[str, int]]:
    """Temporary terms at each moment that may be the peak of a step: moment -> term -> bytes."""
    num_checkpointed = layout.checkpointed_layers
    # With offload, the input of the present block and that of the next one are on the device.
    num_on_device = num_checkpointed
    if layout.offload_activations:
        num_on_device = min(num_checkpointed, INPUTS_ON_DEVICE)
        if not is_cuda:  # the copies in host memory count too, and one of them is copied back
            num_on_device = num_checkpointed + 1
    boundaries = num_on_device * acts.boundary
    not_checkpointed = [count for _, count in shape.counts(start=num_checkpointed)]
    saved_without_checkpoint = sum(
        n * block.saved for n, block in zip(not_checkpointed, acts.blocks, strict=True)
    )
    saved = boundaries + saved_without_checkpoint
    # The backward pass may have its peak at its start, when all blocks that are not checkpointed
    # hold their activations. Or it has its peak later, when these activations are freed and a
    # checkpointed block is recomputed.
    recomputed = [
        block.recomputed
        for (_, count), num_not_checkpointed, block in zip(
            shape.counts(), not_checkpointed, acts.blocks, strict=True
        )
        if count > num_not_checkpointed
    ]
    in_block = (
        max(saved_without_checkpoint, *recomputed) if recomputed else saved_without_checkpoint
    )
    accumulated, reduction = _gradients(shape, settings, layout, is_cuda=is_cuda)
    # Each backward pass allocates a new bucket (DeepSpeed 0.19.8 stage_1_and_2.py:3256).
    bucket = layout.bytes_per_value * bucket_elements(shape, settings)
    filling_bucket = {} if layout.is_sharded else {"zero_buckets": bucket}
    trainable = trainable_parameters(shape, settings)
    is_reduced_early = trainable > bucket_elements(shape, settings)
    # The only remaining activations are the input of a block and its gradient (measured).
    after_backward = {"activations": 2 * acts.boundary}
    if has_one_reduction(settings, layout):
        # every rank sums whole gradients in fp32
        accumulated, filling_bucket = {"local_gradients": 4 * trainable}, {}
        is_reduced_early = False
        reduction, after_backward = accumulated | reduction, {}
    earlier_gradients = accumulated if layout.accumulation_steps > 1 else {}
    saved_gradients = saved_module_gradients(shape, settings, layout)
    accumulated = accumulated | {"head_gradient": saved_gradients.until_embeddings}
    head, block, experts = _gathered(shape, settings, layout)
    # peft copies a whole embedding matrix to replace rows, in each forward pass, and autograd
    # computes the gradient of the copy (peft 0.21.2 tuners/trainable_tokens/layer.py, forward).
    copy = layout.bytes_per_value * shape.vocab_size * shape.hidden_size
    copied = copy if settings.new_tokens else 0
    dequantised = shape.largest_linear * layout.bytes_per_value
    return {
        "the loss": earlier_gradients
        | {
            "activations": saved,
            "logits": acts.logits,
            "head_gradient": saved_gradients.of_earlier_chunks,
            "token_copies": copied,
            "gathered_layers": head + block + experts,
        },
        "the backward pass of the head": earlier_gradients
        | {
            "activations": saved,
            "logits": acts.logits // 4 if saved_gradients.of_head else 0,
            "head_gradient": saved_gradients.of_head,
            "token_copies": 2 * copied,
            "gathered_layers": head + block + experts,
        },
        "the last norm's backward pass": earlier_gradients
        | filling_bucket
        | {
            "activations": saved,
            "working_set": acts.final_working,
            "head_gradient": saved_gradients.until_embeddings,
            "gathered_layers": 2 * block + experts,
        },
        "a block's backward pass": accumulated
        | filling_bucket
        | (reduction if is_reduced_early else {})
        | {"saved_gradients": saved_gradients.in_early_reduction}
        | {
            "activations": boundaries + in_block,
            "working_set": max(block.working for block in acts.blocks),
            "gathered_layers": 2 * block + experts,
            "dequantised_weight": dequantised if settings.is_quantised else 0,
        },
        "the backward pass of the embeddings": earlier_gradients
        | {
            "activations": 2 * acts.boundary,
            "saved_gradients": saved_gradients.of_embeddings,
            "token_copies": 2 * copied,
            "gathered_layers": head if saved_gradients.of_embeddings or copied else 0,
        },
        "the reduction of gradients": after_backward
        | reduction
        | {"saved_gradients": saved_gradients.in_reduction},
        "the optimizer's step": {
            "optimizer_step": _optimizer_step(shape, settings, layout, is_cuda=is_cuda)
        },
    }


def _optimizer_step(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> int:
    """Bytes of the gradients in fp32 and of temporary tensors, while Adam updates its partition.

    PyTorch's Adam has two temporary tensors on a CPU, and none in its fused kernel on a GPU.
    """
    tensors = 1 if is_cuda else 3
    return 4 * tensors * trainable_parameters(shape, settings) // layout.world_size


def _gradients(
    shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Gradient terms between two micro-batches, and gradient terms while a bucket is reduced.

    These are the facts of DeepSpeed 0.19.8.
    Stage 1 (stage_1_and_2.py): a rank accumulates all gradients in the training dtype, and an empty
    bucket stays allocated.
    Stage 2: a rank accumulates the gradients of its partition, in fp32 if training is bf16
    (grad_accum_dtype). A full bucket is flattened into a copy, which bf16 runs copy again to fp32.
    Stage 3 (stage3.py): partition and bucket are persistent and counted by `_resident`. A bucket is
    flattened and reduce-scattered in fp32; gloo, the backend of CPU ranks, makes another copy.
    """
    trainable, b = trainable_parameters(shape, settings), layout.bytes_per_value
    bucket, is_bf16 = bucket_elements(shape, settings), layout.training_dtype == "bfloat16"
    partition = (4 if is_bf16 else b) * trainable // layout.world_size
    if layout.is_sharded:
        return {}, {"reduction": (4 if is_cuda else 8) * bucket}
    reduction = {"zero_buckets": b * bucket, "reduction": (b + (4 if is_bf16 else 0)) * bucket}
    if layout.zero_stage == 1:
        return {"adapter_gradients": b * trainable, "zero_buckets": b * bucket}, reduction
    return {"adapter_gradients": partition}, {"adapter_gradients": partition} | reduction


def _gathered(shape: ModelShape, settings: RunSettings, layout: Layout) -> tuple[int, int, int]:
    """Bytes that ZeRO-3 gathers: the output head, the largest block, experts that stay gathered.

    At other stages the three numbers are 0.

    The experts of every block that is not checkpointed stay gathered until its backward pass
    (measured: only linear layers release their weights and gather them again in the backward pass).
    If experts have an adapter, only the adapter stays gathered: the backward pass does not need the
    experts' weights, because autograd saves their sum with the adapter (activations.py).
    """
    if not layout.is_sharded:
        return 0, 0, 0
    b = layout.bytes_per_value
    head = shape.vocab_size * shape.hidden_size * b
    experts, largest = 0, 0
    not_checkpointed = [n for _, n in shape.counts(start=layout.checkpointed_layers)]
    adapters = adapter_counts_by_kind(shape, settings)
    for (block, count), num_not_checkpointed, adapter in zip(
        shape.counts(), not_checkpointed, adapters, strict=True
    ):
        of_adapter = b * adapter.expert_parameters // max(1, count)
        experts += num_not_checkpointed * (of_adapter or b * block.expert_parameters)
        largest = max(largest, _block_bytes(block, settings, b) + of_adapter)
    return head, largest, experts


def _block_bytes(block: Block, settings: RunSettings, b: int) -> int:
    """Bytes of one block as ZeRO-3 gathers it: packed weights without quantisation constants."""
    if not settings.is_quantised:
        return block.parameters * b
    packed = block.linear_weights // 2 if settings.load_in_4bit else block.linear_weights
    return packed + (block.parameters - block.linear_weights) * b


def _load_peak(shape: ModelShape, settings: RunSettings, layout: Layout, *, is_cuda: bool) -> int:
    """Peak bytes on a rank's device while the base is loaded.

    At ZeRO-3, transformers 5.23 shards a 16-bit base while rank 0 reads it: each rank holds its
    shard and the tensor that is being read. A quantised base is whole on every rank before
    DeepSpeed shards it, unless it is loaded through the host (model/base.py). A rank also holds
    16-bit tensors that are not quantised yet: one on a CPU (measured), up to four on a GPU
    (assumed).
    """
    b = layout.bytes_per_value
    base = base_bytes(shape, settings, layout.training_dtype)
    largest = shape.largest_linear * b
    constants = quantisation_constants(shape, settings)
    saved = b * saved_parameters(shape, settings)  # copied before DeepSpeed shards them
    if settings.splits_base:  # a weight in fp32, its singular vectors, and its remainder
        saved += 4 * 4 * shape.largest_linear
    if (rows := token_rows(shape, settings)) is not None:  # whole until DeepSpeed shards them
        saved += b * shape.vocab_size * shape.hidden_size * len(rows.modules)
    if layout.is_sharded and (not settings.is_quantised or layout.loads_through_host):
        tensors = [tensor for block in shape.blocks for tensor in block.experts]
        experts = b * max((tensor.parameters for tensor in tensors), default=0)
        being_read = max(largest, shape.vocab_size * shape.hidden_size * b, experts)
        on_rank_0 = 0 if is_cuda else base  # a CPU rank 0 reads the whole base into device memory
        sharded, hpz_size = base - constants, layout.hpz_partition_size
        shard = 0 if layout.offload_param == "cpu" else sharded // layout.world_size
        shard += sharded // hpz_size if hpz_size > 1 else 0
        return shard + constants + being_read + on_rank_0 + saved
    num_unquantised = 4 if is_cuda else 1
    return base + saved + (num_unquantised * largest if settings.is_quantised else 0)


def _offloaded_activations(layout: Layout, boundary: int) -> int:
    """Bytes of the inputs of checkpointed blocks in a node's host memory.

    They are in parts of 64 MiB; the last part is rounded up to a power of two
    (model/host_activations.py).
    """
    if not layout.offload_activations:
        return 0
    whole, rest = divmod(boundary, 64 * 2**20)
    pinned = whole * 64 * 2**20 + (1 << (rest - 1).bit_length() if rest else 0)
    return layout.ranks_per_node * layout.checkpointed_layers * pinned


def _host_peak(shape: ModelShape, settings: RunSettings, layout: Layout, device_peak: int) -> int:
    """Peak bytes of host memory of one node.

    `device_peak`: peak of a rank that trains on the CPU; 0 on GPUs. Weights are read through a
    memory map, so they need host memory only while they are copied.
    """
    ranks = layout.ranks_per_node
    need = ranks * (device_peak or _PROCESS)
    base = base_bytes(shape, settings, layout.training_dtype)
    if layout.offload_param == "cpu":  # one pinned shard per rank
        need += ranks * base // layout.world_size
    if layout.loads_through_host:
        need += ranks * base
    elif layout.is_sharded and not settings.is_quantised and device_peak == 0:
        need += base  # rank 0 reads the whole base
    # Rank 0 gathers and writes the adapter and the optimizer states.
    return need + 16 * trainable_parameters(shape, settings)
