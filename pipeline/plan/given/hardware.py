"""Hardware: rates and memory of one kind of machine; cluster/devices.py detects it."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

# Fraction of a GPU's memory, as NVML reports it, that a plan may fill: an assumption, not measured
# on a GPU. The remaining 5 % are a margin for memory that no term of the prediction includes, such
# as kernel workspaces; CUDA context and allocator slack are terms of their own (memory.py).
_FILLABLE_GPU = 0.95
# The same for a CPU, whose memory ranks share with the system, the page cache and each other.
_FILLABLE_HOST = 0.8


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and the node it is in; all nodes are equal.

    `device_bytes`: memory of one device as NVML reports it. `host_bytes`: host memory of a node, 0
    if it is not known.
    `flops`: dense 16-bit matrix rate of one device in FLOP/s, the vendor's figure without sparsity.
    `memory_bandwidth`: bytes/s between a device and its own memory.
    `node_link`, `network`, `host_link`: bytes/s in each direction from one device to a neighbour in
    its node, to other nodes (its share of the node's network cards), and to host memory.
    A CPU is one device, whose memory and rates are shared by the ranks on it.
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

    def usable_bytes(self, ranks_per_node: int) -> int:
        """Bytes of device memory that a rank may use: the limit for the sum of all terms."""
        if self.kind == "cuda":
            return int(self.device_bytes * _FILLABLE_GPU)
        return int(self.device_bytes * _FILLABLE_HOST) // ranks_per_node
