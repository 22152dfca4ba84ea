"""Layout: how a run is divided over ranks, stages and micro-batches; what the plan chooses."""

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "cpu"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides the memory and the speed of a run beside its model, adapter and machine.

    The first `checkpointed_layers` blocks are recomputed in the backward pass: by the time it
    reaches them, what the others kept is gone. `hpz_partition_size` ranks share a second copy of
    the base at ZeRO-3 (1: there is none). `loads_through_host`: a quantised base goes from host
    memory to the ranks a share at a time, because all of it would not fit on one device.
    """

    zero_stage: int
    micro_batch_size: int
    accumulation_steps: int
    checkpointed_layers: int
    nodes: int
    ranks_per_node: int
    training_dtype: str
    hpz_partition_size: int = 1
    offload_param: Offload = "none"
    loads_through_host: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one number in the training dtype."""
        return DTYPE_BYTES[self.training_dtype]

    @property
    def is_sharded(self) -> bool:
        """Whether the frozen base is divided over the ranks (ZeRO-3)."""
        return self.zero_stage == 3
