"""Layout: how a run is divided over ranks and micro-batches, and how it saves memory."""

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "cpu"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """ZeRO stage, batch sizes, activation checkpointing, offload and sequence parallelism of a run.

    `checkpointed_layers`: number of blocks with activation checkpointing. These are the first
    blocks, because their backward pass runs last, when the activations of the others are freed.
    `hpz_partition_size`: number of ranks that shard a second copy of the base (hpZ) at ZeRO-3; 1 if
    there is no second copy. `offload_param`: where ZeRO-3 keeps the shards of the base: `none` is
    the device, `cpu` host memory. `sequence_parallel_size`: number of consecutive ranks that share
    each sequence; 1 if each rank has its own sequences. `offload_activations`: whether inputs of
    checkpointed blocks are in host memory until the backward pass. `mlp_tiles`: number of parts of
    a sequence that each MLP computes one after another.
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
    sequence_parallel_size: int = 1
    offload_activations: bool = False
    mlp_tiles: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks, or of sequence-parallel groups of ranks, with different sequences."""
        return self.world_size // self.sequence_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.data_parallel_size

    @property
    def bytes_per_value(self) -> int:
        """Bytes per value in the training dtype."""
        return DTYPE_BYTES[self.training_dtype]

    def savings_text(self, num_layers: int) -> str:
        """The parts of the layout that save device memory, as text."""
        parts = [f"{self.checkpointed_layers} of {num_layers} layers checkpointed"]
        if self.hpz_partition_size > 1:
            parts.append(f"hpZ over {self.hpz_partition_size} ranks")
        if self.offload_param == "cpu":
            parts.append("base offloaded to host memory")
        if self.sequence_parallel_size > 1:
            parts.append(f"sequences split over {self.sequence_parallel_size} ranks")
        if self.offload_activations:
            parts.append("inputs of checkpointed layers in host memory")
        if self.mlp_tiles > 1:
            parts.append(f"MLPs in {self.mlp_tiles} tiles")
        return ", ".join(parts)

    @property
    def is_sharded(self) -> bool:
        """Whether the frozen base is sharded over the ranks (ZeRO-3)."""
        return self.zero_stage == 3

    @property
    def is_gathered(self) -> bool:
        """Whether gathered layers are copies in device memory, in addition to the shards.

        On one rank they are views of the shards, if these are on the device (DeepSpeed 0.19.8
        partition_parameters.py NoGatherHandle). Persistent parameters are always copies (measured).
        """
        return self.is_sharded and (self.world_size > 1 or self.offload_param == "cpu")


@dataclass(frozen=True, kw_only=True)
class SequenceProfile:
    """Lengths and labels of the sequences of a micro-batch, on which memory and speed depend.

    `tokens`: length of a sequence, including padding. `supervised_share`: fraction of the tokens
    that have labels; logits are computed only for these. `attended`: mean document length of packed
    sequences, because attention does not cross documents; None if each sequence is one document.
    The defaults give upper bounds of memory and time.
    """

    tokens: float
    supervised_share: float = 1.0
    attended: float | None = None
