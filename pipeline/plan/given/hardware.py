"""Hardware: rates and memory of one kind of machine; cluster/devices.py detects it."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

# Fraction of a GPU's memory, as NVML reports it, that a plan may fill. CUDA's context and allocator
# fragments are terms of the predicted need (memory.py); the other 5 % are the margin for what no
# term includes, such as workspaces of kernels. An assumption, not measured on a GPU.
_FILLABLE_GPU = 0.95
# Ranks on a CPU share its memory with the system, the page cache and each other. An assumption.
_FILLABLE_HOST = 0.8


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, the same number of them on every node.

    `device_bytes`: memory of one device as NVML reports it. `host_bytes`: memory of a node, 0 where
    it is not known.
    `flops`: dense matrix rate in a 16-bit type, FLOP/s of one device, the vendor's figure without
    sparsity. `memory_bandwidth`: bytes/s between a device and its own memory.
    `node_link`, `network`, `host_link`: bytes/s each way of one device to its neighbour in the
    node, to other nodes (its share of the node's network cards), and to the host's memory.
    A CPU is one device, whose rates its ranks share.
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
        """Memory that a rank may use: the limit for the sum of all terms of memory.py."""
        if self.kind == "cuda":
            return int(self.device_bytes * _FILLABLE_GPU)
        return int(self.device_bytes * _FILLABLE_HOST) // ranks_per_node
