"""Gathers of ZeRO-3: how much of the sharded base a rank gathers at a time, and DeepSpeed's limits.

Sizes are numbers of elements as DeepSpeed counts them: a packed 4-bit weight has half as many uint8
elements as the matrix has. The facts below are from DeepSpeed 0.19.8
(runtime/zero/partitioned_param_coordinator.py, parameter_offload.py). tests/train/test_sharding.py
measures them.

Parameters of at most `stage3_param_persistence_threshold` elements (adapters of linear layers,
norms, biases, small routers) are persistent: they are replicated on every rank, and the limits
below do not count them. Adapters of experts are not persistent, because they are larger than many
base matrices; they are gathered with the experts. Every other parameter is gathered when its module
runs and released afterwards, with three exceptions:

- *Prefetch.* At each module DeepSpeed also gathers the next parameters in the recorded order, as
  long as fewer than `stage3_max_live_parameters` elements are gathered.
  `stage3_prefetch_bucket_size` limits the prefetch of one module, not the total. The parameters of
  the module itself are always gathered.
- *Reuse.* A parameter is not released if it is used again within the next
  `stage3_max_reuse_distance` elements, persistent parameters included. When a checkpointed block is
  recomputed, its backward pass uses each parameter again within twice the size of the block.
- *4-bit without re-entrant checkpointing.* Every parameter stays gathered from its forward to its
  backward pass (rule 4bit-zero3-unchecked).

DeepSpeed's defaults of these limits (1e9) are too large for a frozen base. A base below a billion
elements would never be released between forward and backward. With a larger base, two
to four gigabytes more than one block needs would stay gathered.
"""

from dataclasses import dataclass
from math import ceil

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import adapter_counts, adapter_counts_by_kind
from pipeline.plan.given.block import Block
from pipeline.plan.given.layout import Layout
from pipeline.plan.given.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """Numbers of elements of the frozen base, as DeepSpeed counts them.

    `block`: gathered parameters of the largest block. `head`: the output head. `persistent`: all
    frozen parameters below the persistence threshold, replicated on every rank. `reuse_distance`:
    elements that a rank uses between the recomputation and the backward pass of a parameter.
    """

    block: int
    head: int
    persistent: int
    reuse_distance: int

    @property
    def peak(self) -> int:
        """Elements gathered at the peak: a prefetched block, and the block or head in use."""
        return self.block + max(self.block, self.head)


def persistence_threshold(shape: ModelShape, settings: RunSettings) -> int:
    """The persistence threshold in elements: the size of the largest adapter matrix.

    Matrices of adapters on experts are ignored. If only experts are adapted, the threshold is the
    size of an adapter matrix for a linear layer of the hidden width.
    """
    adapter = adapter_counts(shape, settings)
    return adapter.largest_linear_matrix or settings.lora_r * shape.hidden_size


def gathers(shape: ModelShape, settings: RunSettings) -> Gathers:
    """Elements of the base that ZeRO-3 gathers, from the sizes of its matrices.

    The field `block` also includes the adapter on the block's experts.
    """
    adapter, threshold = adapter_counts(shape, settings), persistence_threshold(shape, settings)
    largest_gathered = largest_block = persistent = 0
    kinds = zip(shape.counts(), adapter_counts_by_kind(shape, settings), strict=True)
    for (block, count), adapters in kinds:
        sizes = _frozen_parameters(block, settings)
        persistent_in_block = sum(size for size in sizes if size <= threshold)
        persistent += count * persistent_in_block
        largest_block = max(largest_block, sum(sizes))
        expert_adapter = adapters.expert_parameters // max(1, count)
        gathered = sum(sizes) - persistent_in_block + expert_adapter
        largest_gathered = max(largest_gathered, gathered)
    adapter_of_a_block = ceil(adapter.parameters / shape.num_layers)
    return Gathers(
        block=largest_gathered,
        head=shape.vocab_size * shape.hidden_size,
        persistent=persistent,
        reuse_distance=2 * (largest_block + adapter_of_a_block),
    )


def _frozen_parameters(block: Block, settings: RunSettings) -> list[int]:
    """Stored elements of each frozen parameter of one block."""
    sizes = []
    for linear in block.linears:
        sizes.append(ceil(linear.weights / 2) if settings.load_in_4bit else linear.weights)
        sizes.append(linear.parameters - linear.weights)
    if block.experts:  # fused tensors and the router, never quantised
        sizes += [*(tensor.parameters for tensor in block.experts), block.router_parameters]
    return [*sizes, block.norm_parameters]


def gathered_bytes(
    shape: ModelShape, settings: RunSettings, layout: Layout
) -> tuple[int, int, int]:
    """Bytes that ZeRO-3 gathers: the head, the largest block, and experts that stay gathered.

    At other stages, and if gathered parameters need no memory, the three numbers are 0.

    DeepSpeed prefetches only while less than a block is gathered (`stage3_max_live_parameters`). In
    the backward pass of a block's MLP the block is gathered, so no other block is (measured).

    If a block is not checkpointed, its experts stay gathered until its backward pass (measured:
    only linear layers release their weights and gather them again in the backward pass). If experts
    have an adapter, only the adapter stays gathered. Then the backward pass does not need the
    experts' weights, because autograd saves the sums of weight and adapter (activations.py).
    """
    if not layout.is_gathered:
        return 0, 0, 0
    b = layout.bytes_per_value
    head = shape.vocab_size * shape.hidden_size * b
    experts, largest = 0, 0
    not_checkpointed = [count for _, count in shape.counts(start=layout.checkpointed_layers)]
    adapters = adapter_counts_by_kind(shape, settings)
    for (block, count), num_not_checkpointed, adapter in zip(
        shape.counts(), not_checkpointed, adapters, strict=True
    ):
        expert_adapter = b * adapter.expert_parameters // max(1, count)  # of one block
        experts += num_not_checkpointed * (expert_adapter or b * block.expert_parameters)
        largest = max(largest, _block_bytes(block, settings, b) + expert_adapter)
    return head, largest, experts


def _block_bytes(block: Block, settings: RunSettings, b: int) -> int:
    """Bytes of one block as ZeRO-3 gathers it: quantised weights without their constants."""
    if not settings.is_quantised:
        return block.parameters * b
    quantised = block.linear_weights // 2 if settings.load_in_4bit else block.linear_weights
    return quantised + (block.parameters - block.linear_weights) * b
