"""Predicted memory of devices and hosts in a step and while loading, and predicted disk space.

The peak of a step may be at several moments, for example in the loss or in the backward pass of a
block. For each moment the memory is a sum of named terms, and a term is the size of some tensors.
The worst moment is the one with the largest sum. docs/memory.md compares the terms with measured
tensors. In the formulas b is the number of bytes per value in the training dtype.

"Sharded" means ZeRO-3, at which the frozen base is divided over the ranks. Modules that are trained
in full (`modules_to_save`) are embeddings or the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.cost.activations import Activations, activations, kept_activations
from pipeline.plan.cost.decompositions import initial_values_bytes
from pipeline.plan.cost.gathers import gathered_bytes, gathers
from pipeline.plan.cost.saved_gradients import saved_module_gradients
from pipeline.plan.given.adapter_counts import adapter_counts, trainable_parameters
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
# Bytes of NCCL's buffers for all-to-alls with one other rank: 0.47 GB on 8 H100s, whose use grew
# from 1.06 to 4.34 GB in the first all-to-all (github.com/NVIDIA/nccl/issues/1685). NCCL opens more
# channels on faster links; that their number is proportional to the rate is an assumption.
_EXCHANGE_BUFFERS = 470e6
_LINK_OF_EXCHANGE_BUFFERS = 450e9  # bytes/s in each direction, of that machine
# Memory that the caching allocator holds beyond live tensors, as a fraction of them: an assumption.
_ALLOCATOR_SLACK = 0.03
# Bytes of host memory of a rank's process for libraries and the CUDA runtime: an assumption.
_PROCESS = 4 * 2**30
# Terms that are not the sizes of live tensors.
_NOT_TENSORS = ("cuda_context", "allocator_slack", "exchange_buffers")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Predicted memory in bytes.

    `per_rank`: term -> bytes on a rank's device at the worst moment of a step. `worst_moment`: name
    of that moment. `load_peak_bytes`: peak on a rank's device while the base is loaded.
    `loading_tensor_bytes`: bytes of live tensors at that peak. `host_peak_bytes`: peak host memory
    of one node.
    """

    per_rank: Mapping[str, int]
    worst_moment: str
    load_peak_bytes: int
    loading_tensor_bytes: int
    host_peak_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Peak bytes on a rank's device in a step: the sum of `per_rank`."""
        return sum(self.per_rank.values())

    @property
    def tensor_bytes(self) -> int:
        """Peak bytes of live tensors while loading and training (max_memory_allocated)."""
        in_step = sum(size for term, size in self.per_rank.items() if term not in _NOT_TENSORS)
        return max(in_step, self.loading_tensor_bytes)

    @property
    def device_peak_bytes(self) -> int:
        """Peak bytes on a rank's device while loading and training."""
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
    of_activations = activations(shape, settings, layout, hardware, sequences)
    moments = _moments(shape, settings, layout, of_activations, is_cuda=is_cuda)
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    terms = _resident(shape, settings, layout) | moments[worst]
    initial = initial_values_bytes(shape, settings, layout, hardware, sequences)
    load = loading_tensor_bytes = _load_peak(shape, settings, layout, initial, is_cuda=is_cuda)
    if is_cuda:
        terms["allocator_slack"] = int(_ALLOCATOR_SLACK * sum(terms.values()))
        terms["cuda_context"] = _CUDA_CONTEXT
        terms["exchange_buffers"] = _exchange_buffers(layout, hardware)
        load = int(load * (1 + _ALLOCATOR_SLACK)) + _CUDA_CONTEXT
    peak = max(sum(terms.values()), load)
    return Memory(
        per_rank={term: size for term, size in terms.items() if size},
        worst_moment=worst,
        load_peak_bytes=load,
        loading_tensor_bytes=loading_tensor_bytes,
        host_peak_bytes=_host_peak(shape, settings, layout, 0 if is_cuda else peak)
        + (_offloaded_activations(layout, of_activations.block_input) if is_cuda else 0),
    )


def bucket_elements(shape: ModelShape, settings: RunSettings) -> int:
    """Elements of a ZeRO reduce bucket: all gradients of the adapter, but at most _MAX_BUCKET.

    The bucket is at least as large as the largest adapter matrix.
    """
    adapter = adapter_counts(shape, settings)
    elements = max(min(adapter.parameters, _MAX_BUCKET), adapter.largest_matrix)
    return elements + elements % 2  # DeepSpeed asserts an even number


def base_bytes(shape: ModelShape, settings: RunSettings, training_dtype: str) -> int:
    """Bytes of the frozen base before sharding, after quantisation if the base is quantised."""
    b = DTYPE_BYTES[training_dtype]
    if not settings.is_quantised:
        return shape.parameters * b
    num_quantised = shape.quantised_parameters
    quantised = num_quantised // 2 if settings.load_in_4bit else num_quantised
    other = (shape.parameters - num_quantised) * b
    return quantised + quantisation_constants(shape, settings) + other


def quantisation_constants(shape: ModelShape, settings: RunSettings) -> int:
    """Bytes of the quantisation constants of a 4-bit or 8-bit base, without the weights.

    4 bits: one fp32 constant for each 64 weights. With double quantisation, one byte for each 64
    weights, and one fp32 constant for each 64 x 256 weights (QLoRA, arXiv 2305.14314 s.3). 8 bits:
    one fp32 scale for each row of a weight (arXiv 2208.07339 s.3).
    """
    if settings.load_in_4bit:
        num_constants = shape.quantised_parameters / 64
        bytes_per_constant = 1 + 4 / 256 if settings.bnb_4bit_use_double_quant else 4
        return int(num_constants * bytes_per_constant)
    if settings.load_in_8bit:
        rows = sum(
            count * sum(linear.d_out for linear in block.linears) for block, count in shape.counts()
        )
        return 4 * rows
    return 0


def checkpoint_bytes(trainable: int) -> int:
    """Bytes of one checkpoint: fp32 weights and two Adam moments, plus 1 % for other files."""
    return int(12 * trainable * 1.01)


def disk_bytes(shape: ModelShape, settings: RunSettings) -> dict[str, int]:
    """Disk space in bytes of the files of a run: checkpoints, adapter file and merged model."""
    trainable = trainable_parameters(shape, settings)
    is_evaluated = settings.eval_data is not None and settings.evaluation_strategy != "no"
    # With PiSSA and OLoRA, checkpoints and adapter file also contain the initial A and B.
    initial = 4 * trainable if settings.initialises_from_base else 0
    checkpoint = checkpoint_bytes(trainable) + initial
    # Checkpoints on disk: save_total_limit, the one with the lowest held-out loss, and one that is
    # being written.
    checkpoints = checkpoint * (settings.save_total_limit + is_evaluated + 1)
    if settings.keep_best:  # fp32 weights of the best adapter, and of a better one being written
        checkpoints += 2 * checkpoint_bytes(trainable) // 3
    merged = shape.parameters * DTYPE_BYTES.get(shape.dtype, 4)  # in the dtype of the base's files
    # The adapter file stores a tied weight under both of its names (adapter/publish.py).
    saved = saved_modules(shape, settings)
    tied = sum(module.parameters for module in saved if module.tied_name)
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
        # Each rank has its shard of all trained weights. In addition it has a whole copy of the
        # adapters of linear layers, which are small. The adapters of experts and the modules that
        # are trained in full are not replicated.
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
    kept = kept_activations(shape, layout, acts, is_cuda=is_cuda)
    accumulated, reduction = _gradients(shape, settings, layout, is_cuda=is_cuda)
    # Each backward pass allocates a new bucket (DeepSpeed 0.19.8 stage_1_and_2.py:3256).
    bucket = layout.bytes_per_value * bucket_elements(shape, settings)
    filling_bucket = {} if layout.is_sharded else {"zero_buckets": bucket}
    trainable = trainable_parameters(shape, settings)
    # If not all gradients fit in a bucket, a full bucket is reduced during the backward pass.
    is_reduced_early = trainable > bucket_elements(shape, settings)
    # After the backward pass the only activations are the input of one block and its gradient
    # (measured).
    after_backward = {"activations": 2 * acts.block_input}
    if has_one_reduction(settings, layout):
        # Each rank sums whole gradients in fp32, and reduces them after the last micro-batch.
        accumulated, filling_bucket = {"local_gradients": 4 * trainable}, {}
        is_reduced_early = False
        reduction, after_backward = accumulated | reduction, {}
    # gradients of earlier micro-batches of the same step
    earlier_gradients = accumulated if layout.accumulation_steps > 1 else {}
    if layout.zero_stage == 2 and not is_reduced_early:  # the first reduction is after the pass
        accumulated = earlier_gradients
    saved_gradients = saved_module_gradients(shape, settings, layout)
    accumulated = accumulated | {"head_gradient": saved_gradients.until_embeddings}
    head, largest_block, kept_experts = gathered_bytes(shape, settings, layout)
    # peft copies a whole embedding matrix to replace rows, in each forward pass, and autograd
    # computes the gradient of the copy (peft 0.21.2 tuners/trainable_tokens/layer.py, forward).
    embedding_bytes = layout.bytes_per_value * shape.vocab_size * shape.hidden_size
    embedding_copy = embedding_bytes if settings.new_tokens else 0
    dequantised = shape.largest_linear * layout.bytes_per_value if settings.is_quantised else 0
    in_backward = accumulated | filling_bucket | (reduction if is_reduced_early else {})
    in_backward |= {
        "saved_gradients": saved_gradients.in_early_reduction,
        "dequantised_weight": dequantised,
    }
    outside = layout.bytes_per_value * shape.largest_outside if layout.is_gathered else 0
    return {
        "the embeddings": earlier_gradients
        | {
            "activations": acts.of_tokens + acts.block_input,
            "token_copies": embedding_copy,
            "gathered_layers": outside + largest_block,
        },
        "the loss": earlier_gradients
        | {
            "activations": kept.at_loss,
            "logits": acts.logits,
            "head_gradient": saved_gradients.of_earlier_chunks,
            "token_copies": embedding_copy,
            "gathered_layers": head + largest_block + kept_experts,
        },
        "the backward pass of the head": earlier_gradients
        | {
            "activations": kept.at_loss,
            "logits": acts.logits // 4 if saved_gradients.of_head else 0,
            "head_gradient": saved_gradients.of_head,
            "token_copies": 2 * embedding_copy,
            "gathered_layers": head + largest_block + kept_experts,
        },
        "the last norm's backward pass": earlier_gradients
        | filling_bucket
        | {
            "activations": kept.at_loss,
            "working_set": acts.final_working,
            "head_gradient": saved_gradients.until_embeddings,
            "gathered_layers": largest_block + kept_experts,
        },
        # The backward pass of a block begins with its tiled MLP, so the bucket is still empty.
        "the first tiled MLP's backward pass": earlier_gradients
        | {
            "activations": kept.in_first_block,
            "working_set": max(block.in_tiles for block in acts.blocks),
            "gathered_layers": largest_block + kept_experts,
            "dequantised_weight": dequantised,
        },
        "a later tiled MLP's backward pass": in_backward
        | {
            "activations": kept.in_later_block,
            "working_set": max(block.in_tiles for block in acts.blocks),
            "gathered_layers": largest_block + kept_experts,
        },
        "a block's backward pass": in_backward
        | {
            "activations": kept.in_first_block - kept.input_of_tiles,
            "working_set": max(block.working for block in acts.blocks),
            "gathered_layers": largest_block + kept_experts,
        },
        "the backward pass of the embeddings": earlier_gradients
        | {
            "activations": 2 * acts.block_input,
            "saved_gradients": saved_gradients.of_embeddings,
            "token_copies": 2 * embedding_copy,
            "gathered_layers": head if saved_gradients.of_embeddings or embedding_copy else 0,
        },
        "the reduction of gradients": after_backward
        | reduction
        | {"saved_gradients": saved_gradients.in_reduction},
        "the optimizer's step": {
            "optimizer_step": _optimizer_step(shape, settings, layout, is_cuda=is_cuda)
        },
    }


def _exchange_buffers(layout: Layout, hardware: Hardware) -> int:
    """Bytes of NCCL's buffers in the communicator of a sequence-parallel group."""
    size = layout.sequence_parallel_size
    in_node = min(size, layout.ranks_per_node) - 1
    links = [hardware.node_link] * in_node + [hardware.network] * (size - 1 - in_node)
    shares = (min(1.0, link / _LINK_OF_EXCHANGE_BUFFERS) for link in links)
    return int(_EXCHANGE_BUFFERS * sum(shares))


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

    DeepSpeed 0.19.8 allocates the following tensors.
    Stage 1 (stage_1_and_2.py): a rank accumulates all gradients in the training dtype, and an empty
    bucket stays allocated.
    Stage 2: a rank accumulates the gradients of its partition, in fp32 if training is bf16
    (grad_accum_dtype). A full bucket is flattened into a copy, which bf16 runs copy again to fp32.
    Stage 3 (stage3.py): partition and bucket are always allocated, so `_resident` counts them. A
    bucket is flattened and reduce-scattered in fp32. gloo, the backend of CPU ranks, makes one more
    copy.
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


def _load_peak(
    shape: ModelShape, settings: RunSettings, layout: Layout, initial: int, *, is_cuda: bool
) -> int:
    """Peak bytes on a rank's device until DeepSpeed has its parameters.

    `initial`: bytes beside the base while the initial values of the adapter are computed, after the
    base has been loaded.

    At ZeRO-3 the base is sharded while it is loaded (model/sharded_loading.py): each rank holds its
    shard and up to two parameters: one that it has read and perhaps quantised, and one that it
    receives. The two largest ones are assumed.

    At other stages the base is whole on each rank. While it is quantised, a rank also holds 16-bit
    tensors that are not quantised yet: one on a CPU (measured), up to four on a GPU (assumed).
    """
    b = layout.bytes_per_value
    base = base_bytes(shape, settings, layout.training_dtype)
    largest = shape.largest_linear * b
    constants = quantisation_constants(shape, settings)
    # Trained copies of modules in `modules_to_save`, before DeepSpeed shards them.
    copies = b * saved_parameters(shape, settings)
    if (rows := token_rows(shape, settings)) is not None:
        # Embeddings and head with new rows are whole on each rank until DeepSpeed shards them.
        copies += b * shape.vocab_size * shape.hidden_size * len(rows.modules)
    if layout.is_sharded:
        # A tied head may be in the files too.
        sizes = [shape.vocab_size * shape.hidden_size * b] * 2 + [shape.largest_other * b]
        sizes += [t.parameters * b for block in shape.blocks for t in block.experts] * 2
        # A quantised layer is received in 4 bits.
        sizes += [largest, shape.largest_linear // 2 if settings.is_quantised else largest]
        held = max(sum(sorted(sizes)[-2:]), initial)
        sharded, hpz_size = base - constants, layout.hpz_partition_size
        shard = 0 if layout.offload_param == "cpu" else sharded // layout.world_size
        shard += sharded // hpz_size if hpz_size > 1 else 0
        return shard + constants + held + copies
    unquantised = (4 if is_cuda else 1) * largest if settings.is_quantised else 0
    return base + copies + max(unquantised, initial)


def _offloaded_activations(layout: Layout, block_input: int) -> int:
    """Bytes of pinned host memory of a node for the inputs of checkpointed blocks.

    `block_input`: bytes of one input. It is stored in parts of 64 MiB. PyTorch rounds the last part
    up to a power of two (model/host_activations.py).
    """
    if not layout.offload_activations:
        return 0
    part_bytes = 64 * 2**20
    num_full, last = divmod(block_input, part_bytes)
    pinned = num_full * part_bytes + _pinned_bytes(last)
    return layout.ranks_per_node * layout.checkpointed_layers * pinned


def _pinned_bytes(size: int) -> int:
    """Bytes of pinned host memory that PyTorch 2.13 allocates for a tensor: a power of two.

    Source: ATen/core/CachingHostAllocator.h:303.
    """
    return 1 << (size - 1).bit_length() if size else 0


def _pinned_shards(shape: ModelShape, settings: RunSettings, layout: Layout) -> int:
    """Bytes of pinned host memory of a rank for its shards of the base (`offload_param`).

    DeepSpeed pins the shard of each parameter separately. Small parameters are not rounded here.
    """
    b, world = layout.bytes_per_value, layout.world_size
    base = base_bytes(shape, settings, layout.training_dtype)
    sizes = [  # of the large parameters
        linear.weights // 2 if settings.load_in_4bit and linear.is_quantised else linear.weights * b
        for linear in shape.linears.values()
        if not linear.is_shared
    ]
    for block, count in shape.counts():
        sizes += [tensor.parameters * b for tensor in block.experts] * count
    sizes += [shape.vocab_size * shape.hidden_size * b] * (1 if shape.is_tied else 2)
    shards = sum(_pinned_bytes(-(-size // world)) for size in sizes)
    return shards + (base - quantisation_constants(shape, settings) - sum(sizes)) // world


def _host_peak(shape: ModelShape, settings: RunSettings, layout: Layout, device_peak: int) -> int:
    """Peak bytes of host memory of one node.

    `device_peak`: peak of a rank that trains on the CPU; 0 on GPUs. Weights are read through a
    memory map, so they need host memory only while they are copied.
    """
    ranks = layout.ranks_per_node
    need = ranks * (device_peak or _PROCESS)
    if layout.offload_param == "cpu" and device_peak:  # the shards of ranks on the CPU
        need += ranks * base_bytes(shape, settings, layout.training_dtype) // layout.world_size
    elif layout.offload_param == "cpu":
        need += ranks * _pinned_shards(shape, settings, layout)
    # Rank 0 gathers and writes the adapter and the optimizer states.
    return need + 16 * trainable_parameters(shape, settings)
