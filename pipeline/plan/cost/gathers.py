"""Elements of the frozen base that ZeRO-3 holds gathered, and the config limits that bound them.

DeepSpeed counts elements as stored: a packed 4-bit weight is half as many uint8 elements. Facts are
of DeepSpeed 0.19.8 runtime/zero/partitioned_param_coordinator.py and parameter_offload.py;
tests/train/test_sharding.py measures them.

Matrices of at most `stage3_param_persistence_threshold` elements (adapters, norms, biases, small
routers) are persistent: whole on every rank and never counted. Every other matrix is gathered when
its module runs and released after it, with three exceptions whose size the config sets:

- *Prefetched.* At each module the next matrices of the recorded order are fetched while fewer than
  `stage3_max_live_parameters` elements are gathered. `stage3_prefetch_bucket_size` limits one
  module's prefetch, not the total. What a module needs is fetched whatever the limit.
- *Reused.* A matrix is not released if it is used again within `stage3_max_reuse_distance`
  elements, persistent matrices included. The recomputed forward of a checkpointed block and its
  backward use each matrix of it within twice the block.
- *4-bit without re-entrant checkpointing* keeps every matrix from its forward to its backward
  (rule 4bit-zero3-unchecked).

With DeepSpeed's defaults (1e9) a base below a billion elements is never released between forward
and backward, and a larger one holds two to four gigabytes more than one block needs.
"""

from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.given.block import Block
from pipeline.plan.given.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """Elements of the base that are gathered and released.

    `block`: of the largest block. `persistent`: elements of frozen parameters below the persistence
    threshold, replicated on every rank, summed over all layers.
    """

    block: int
    head: int
    persistent: int
    reuse_distance: int

    @property
    def most(self) -> int:
        """Elements gathered at the worst moment: a block prefetched, and a block or head in use."""
        return self.block + max(self.block, self.head)


def gathers(shape: ModelShape, settings: RunSettings) -> Gathers:
    """Elements of the base that ZeRO-3 gathers, from the sizes of its matrices."""
    adapter = adapter_counts(shape, settings)
    block = persistent = largest = 0
    for kind, count in shape.counts():
        matrices = _frozen_parameters(kind, settings)
        kept = sum(elements for elements in matrices if elements <= adapter.largest_matrix)
        persistent += count * kept
        largest = max(largest, sum(matrices))
        block = max(block, sum(matrices) - kept)
    adapter_of_a_block = -(-adapter.parameters // shape.num_layers)
    return Gathers(
        block=block,
        head=shape.vocab_size * shape.hidden_size,
        persistent=persistent,
        reuse_distance=2 * (largest + adapter_of_a_block),
    )


def _frozen_parameters(block: Block, settings: RunSettings) -> list[int]:
    """Stored elements of each frozen parameter of one block."""
    sizes = []
    for linear in block.linears:
        sizes.append(-(-linear.weights // 2) if settings.load_in_4bit else linear.weights)
        sizes.append(linear.parameters - linear.weights)
    if block.num_experts:  # two fused parameters and the router, never quantised
        expert = block.num_experts * block.hidden_size * block.expert_size
        sizes += [2 * expert, expert, block.router_parameters]
    return [*sizes, block.norm_parameters]
