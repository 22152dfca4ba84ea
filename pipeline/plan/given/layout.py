"""Layout: how a run is divided over ranks, ZeRO stages and micro-batches."""

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "cpu"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Division of a run over ranks; with model, adapter and machine it determines memory and speed.

    `checkpointed_layers`: number of checkpointed blocks, counted from the first, because the first
    blocks' backward pass comes last, when the activations of the others have been freed.
    `hpz_partition_size`: ranks that share a second copy of the base at ZeRO-3; 1: no second copy.
    `loads_through_host`: a quantised base too large for one device is loaded into host memory and
    sharded from there.
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
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def bytes_per_value(self) -> int:
        """Bytes per value in the training dtype."""
        return DTYPE_BYTES[self.training_dtype]

    @property
    def is_sharded(self) -> bool:
        """Whether the frozen base is sharded over the ranks (ZeRO-3)."""
        return self.zero_stage == 3


@dataclass(frozen=True, kw_only=True)
class SequenceProfile:
    """Properties of the sequences of a micro-batch that memory and speed depend on.

    `tokens`: length of a sequence, padding included. `supervised_share`: fraction of tokens with
    labels, and so with logits. `attended`: for packed sequences the mean document length (attention
    does not cross documents); None if each sequence is one document. The defaults give upper
    bounds.
    """

    tokens: float
    supervised_share: float = 1.0
    attended: float | None = None
