"""Hardware: rates and memory of one kind of machine; cluster/devices.py detects it."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

# Fraction of a GPU's memory, as NVML reports it, that a plan may use: an assumption, not measured
# on a GPU. The remaining 5 % are a margin for memory that the prediction leaves out, such as kernel
# workspaces. The prediction includes the CUDA context and allocator slack (memory.py).
_USABLE_GPU = 0.95
# The same fraction for ranks on a CPU, which share host memory with the system and the page cache.
_USABLE_HOST = 0.8


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A node and its devices. All nodes of a run are equal, and all devices of a node.

    `device_bytes`: memory of one device as NVML reports it. `host_bytes`: host memory of a node; 0
    if it is not known. `flops`: dense 16-bit matrix rate of one device in FLOP/s, the vendor's
    figure without sparsity. `memory_bandwidth`: bytes/s between a device and its own memory.

    Bytes/s of one device in each direction: `node_link` to another device of its node, `network` to
    other nodes (its share of the node's network cards), `host_link` to host memory.

    All CPU cores of a node together are one device, whose memory and rates the node's ranks share.
    `is_slow_in_bf16`: whether a CPU multiplies matrices faster in fp32 than in bf16.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    devices_per_node: int
    device_bytes: int
    host_bytes: int
    flops: float
    memory_bandwidth: float
    node_link: float
    network: float
    host_link: float
    compute_capability: tuple[int, int] | None = None
    is_slow_in_bf16: bool = False

    def usable_bytes(self, ranks_per_node: int) -> int:
        """Bytes of device memory that a rank may use; the plan keeps its prediction below them."""
        if self.kind == "cuda":
            return int(self.device_bytes * _USABLE_GPU)
        return int(self.device_bytes * _USABLE_HOST) // ranks_per_node
