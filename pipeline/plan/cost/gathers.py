"""What ZeRO-3 holds gathered of the frozen base, in elements, and the limits that keep it there.

DeepSpeed counts elements as they are stored: a packed 4-bit weight is half as many uint8 elements.
Facts are of DeepSpeed 0.19.8 runtime/zero/partitioned_param_coordinator.py and
parameter_offload.py; tests/train/test_sharding.py measures them.

Matrices of at most `stage3_param_persistence_threshold` elements (adapters, norms, biases, small
routers) stay whole and are never counted. Every other one is gathered when its module is reached
and released after it, with three exceptions that the config sets the size of:

- *Fetched ahead.* At each module the next matrices of the recorded order are fetched while fewer
  than `stage3_max_live_parameters` elements are gathered. `stage3_prefetch_bucket_size` is a limit
  for one module, not for what is ahead. What a module needs is fetched whatever the limit.
- *Used again soon.* A matrix is not released if it is used again within
  `stage3_max_reuse_distance` elements, those of persistent matrices counted too. The recomputed
  forward of a checkpointed block and its backward use each matrix of it within twice the block.
- *4-bit without re-entrant checkpointing* keeps every matrix from its forward to its backward
  (rule 4bit-zero3-reentrant).

With DeepSpeed's defaults (1e9) a base below a billion elements is never released between forward
and backward, and a larger one holds two to four gigabytes more than one block needs.
"""

from dataclasses import dataclass

from pipeline.config.settings import RunSettings
from pipeline.plan.given.adapter_counts import adapter_counts
from pipeline.plan.given.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """Elements of what is gathered and released.

    `persistent` are elements of the frozen base that are whole on every rank: of all blocks.
    """

    block: int
    head: int
    persistent: int
    reuse_distance: int

    @property
    def most(self) -> int:
        """Elements gathered at the worst moment.

        A block's worth is fetched ahead, whatever it is for; the block or the head that is in use
        is gathered all the same.
        """
        return self.block + max(self.block, self.head)


def gathers(shape: ModelShape, settings: RunSettings) -> Gathers:
    """What is gathered of a base at ZeRO-3, from the sizes of its matrices."""
    adapter = adapter_counts(shape, settings)
    threshold = adapter.largest_matrix
    every = _frozen_of_block(shape, settings)
    kept = [elements for elements in every if elements <= threshold]
    block = sum(every) - sum(kept)
    adapters = -(-adapter.parameters // shape.num_layers)
    return Gathers(
        block=block,
        head=shape.vocab_size * shape.hidden_size,
        persistent=shape.num_layers * sum(kept),
        reuse_distance=2 * (sum(every) + adapters),
    )


def _frozen_of_block(shape: ModelShape, settings: RunSettings) -> list[int]:
    """Storage elements of each frozen parameter of one block."""
    every = []
    for linear in shape.linears:
        every.append(-(-linear.weights // 2) if settings.load_in_4bit else linear.weights)
        every.append(linear.parameters - linear.weights)
    if shape.num_experts:  # two fused parameters and the router, never quantised
        expert = shape.num_experts * shape.hidden_size * shape.expert_size
        every += [2 * expert, expert, shape.num_experts * shape.hidden_size]
    return [*every, shape.norm_parameters]
