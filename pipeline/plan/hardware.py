"""Hardware: what a plan needs to know of the machines; detecting it is cluster/devices.py."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, the same number of them on every node."""

    kind: Literal["cuda", "cpu"]
    name: str
    devices_per_node: int
    device_bytes: int
    host_bytes: int
    compute_capability: tuple[int, int] | None = None

    def usable_bytes(self, ranks_per_node: int) -> int:
        """Memory that one rank may fill.

        CUDA's context and the allocator's fragments take a share of a device (8 % is allowed for
        here); ranks on a CPU share the machine's memory with everything else.
        """
        if self.kind == "cuda":
            return int(self.device_bytes * 0.92)
        return int(self.device_bytes * 0.8) // ranks_per_node


def gpu_of(gib: float) -> Hardware:
    """A GPU known by its memory alone, recent enough for bfloat16, in a machine of its own."""
    return Hardware(
        kind="cuda",
        name=f"GPU of {gib:g} GiB",
        devices_per_node=1,
        device_bytes=int(gib * GIB),
        host_bytes=0,
        compute_capability=(8, 0),
    )
