"""GPUs by name, with the rates of their data sheets; and the rates of what is not in the table.

A data sheet's figure is a ceiling; speed.py says what share of it is reckoned with. Networks are
not a property of a GPU: they are assumptions, said beside them.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace

from pipeline.errors import UserError
from pipeline.plan.given.hardware import GIB, Hardware

_MIB = 2**20
_GB = 1e9
_T = 1e12

# PCI Express x16, each way: 16, 32 and 64 GB/s for generations 3, 4 and 5 (PCI-SIG).
_PCIE3, _PCIE4, _PCIE5 = 16 * _GB, 32 * _GB, 64 * _GB
# GeForce drivers allow no peer-to-peer access, so every transfer crosses host memory: half of
# PCIe 4. An assumption.
_THROUGH_HOST = _PCIE4 / 2

# Bytes/s each way of one GPU to other nodes. All four are assumptions.
_FABRIC_400 = 25 * _GB  # half of the 400 Gb/s a GPU of DGX H100, H200 and B200
_FABRIC_200 = 12.5 * _GB  # half of the 200 Gb/s a GPU of DGX A100
_SERVER = 100 / 8 * _GB / 4  # one card of 100 Gb/s shared by four GPUs
_OFFICE = 10 / 8 * _GB / 2  # 10 Gb/s Ethernet shared by two GPUs


def _gpu(
    name: str,
    mib: int,
    capability: tuple[int, int],
    *,
    tflops: float,
    gb_s: float,
    link: float,
    host: float,
    network: float,
) -> Hardware:
    return Hardware(
        kind="cuda",
        name=name,
        devices_per_node=1,
        device_bytes=mib * _MIB,
        host_bytes=0,
        compute_capability=capability,
        flops=tflops * _T,
        memory_bandwidth=gb_s * _GB,
        node_link=link,
        network=network,
        host_link=host,
    )


# Memory: MiB that `nvidia-smi` shows (recent drivers, ECC as shipped), which is below the
# nominal size on cards that take ECC from it. Rates: NVIDIA's data sheet or architecture white
# paper of the name beside each row: bf16 or fp16 tensor cores with fp32 accumulation, dense (half
# of a figure "with sparsity"); NVLink's total divided by two for each way. `link` of a PCIe card is
# its slot: bridges join pairs only.
# fmt: off
GPUS: Mapping[str, Hardware] = {
    "b200-180gb": _gpu("NVIDIA B200", 183359, (10, 0),  # DGX B200 data sheet, an eighth of it
        tflops=2250, gb_s=8000, link=900 * _GB, host=_PCIE5, network=_FABRIC_400),
    "h200-141gb": _gpu("NVIDIA H200", 143771, (9, 0),  # H200 data sheet
        tflops=989.5, gb_s=4800, link=450 * _GB, host=_PCIE5, network=_FABRIC_400),
    "h100-80gb": _gpu("NVIDIA H100 80GB HBM3", 81559, (9, 0),  # H100 data sheet, SXM
        tflops=989.5, gb_s=3350, link=450 * _GB, host=_PCIE5, network=_FABRIC_400),
    "h100-80gb-pcie": _gpu("NVIDIA H100 PCIe", 81559, (9, 0),  # H100 data sheet, PCIe
        tflops=756.5, gb_s=2000, link=_PCIE5, host=_PCIE5, network=_SERVER),
    "a100-80gb": _gpu("NVIDIA A100-SXM4-80GB", 81920, (8, 0),  # A100 data sheet, SXM
        tflops=312, gb_s=2039, link=300 * _GB, host=_PCIE4, network=_FABRIC_200),
    "a100-80gb-pcie": _gpu("NVIDIA A100 80GB PCIe", 81920, (8, 0),  # A100 data sheet, PCIe
        tflops=312, gb_s=1935, link=_PCIE4, host=_PCIE4, network=_SERVER),
    "a100-40gb": _gpu("NVIDIA A100-SXM4-40GB", 40960, (8, 0),  # A100 architecture white paper
        tflops=312, gb_s=1555, link=300 * _GB, host=_PCIE4, network=_FABRIC_200),
    "l40s-48gb": _gpu("NVIDIA L40S", 46068, (8, 9),  # L40S data sheet
        tflops=362, gb_s=864, link=_PCIE4, host=_PCIE4, network=_SERVER),
    "a40-48gb": _gpu("NVIDIA A40", 46068, (8, 6),  # A40 data sheet
        tflops=149.7, gb_s=696, link=_PCIE4, host=_PCIE4, network=_SERVER),
    "rtx-a6000-48gb": _gpu("NVIDIA RTX A6000", 49140, (8, 6),  # RTX A6000 data sheet
        tflops=154.8, gb_s=768, link=_PCIE4, host=_PCIE4, network=_OFFICE),
    "rtx-4090-24gb": _gpu("NVIDIA GeForce RTX 4090", 24564, (8, 9),  # Ada architecture white paper
        tflops=165.2, gb_s=1008, link=_THROUGH_HOST, host=_PCIE4, network=_OFFICE),
    "rtx-3090-24gb": _gpu("NVIDIA GeForce RTX 3090", 24576, (8, 6),  # GA102 white paper
        tflops=71, gb_s=936, link=_THROUGH_HOST, host=_PCIE4, network=_OFFICE),
    "a10-24gb": _gpu("NVIDIA A10", 23028, (8, 6),  # A10 data sheet
        tflops=125, gb_s=600, link=_PCIE4, host=_PCIE4, network=_SERVER),
    "a10g-24gb": _gpu("NVIDIA A10G", 23028, (8, 6),  # A10G data sheet
        tflops=70, gb_s=600, link=_PCIE4, host=_PCIE4, network=_SERVER),
    "l4-24gb": _gpu("NVIDIA L4", 23034, (8, 9),  # L4 data sheet
        tflops=121, gb_s=300, link=_PCIE4, host=_PCIE4, network=_SERVER),
    "v100-32gb": _gpu("Tesla V100-SXM2-32GB", 32768, (7, 0),  # V100 data sheet, NVLink
        tflops=125, gb_s=900, link=150 * _GB, host=_PCIE3, network=_SERVER),
    "v100-16gb": _gpu("Tesla V100-SXM2-16GB", 16384, (7, 0),  # as above; the memory is nominal
        tflops=125, gb_s=900, link=150 * _GB, host=_PCIE3, network=_SERVER),
    "t4-16gb": _gpu("Tesla T4", 15360, (7, 5),  # T4 data sheet
        tflops=65, gb_s=300, link=_PCIE3, host=_PCIE3, network=_SERVER),
}
# fmt: on

# What counts as the same memory: drivers differ by less, MIG slices by more.
_SAME_MEMORY = 1.1

# A core of a server's CPU: 16-bit matrix rate (AVX512-BF16 or AMX; without them bf16 is slower than
# this by far) and its share of the memory's bandwidth. Set so that speed.py comes near both
# figures of docs/benchmarks.md on two cores; another CPU may differ several times over.
_CORE_FLOPS = 1.5e11
_CORE_BANDWIDTH = 8 * _GB
# Ranks on one CPU exchange gradients through gloo over the loopback; an assumption.
_LOOPBACK = 1 * _GB


def gpu_named(key: str) -> Hardware:
    """The GPU of this key of GPUS, one a node. Raises UserError with the nearest for another."""
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key.lower(), GPUS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(GPUS)}"
    raise UserError(
        f"{key!r} is no GPU that is known; {hint} Any other can be described by "
        "its memory and its 16-bit rate (--gpu-memory-gib, --gpu-tflops)"
    )


def gpu_like(gib: float, tflops: float | None = None) -> Hardware:
    """A GPU known by its memory and, if given, its dense 16-bit rate; new enough for bfloat16.

    It is reckoned as a card of the catalogue: without `tflops` the slowest one of about the same
    memory, else the one nearest in memory and rate, its memory bandwidth scaled with the rate.
    Links and network are that card's. Raises UserError for what is not above 0.
    """
    size = int(gib * GIB)
    if size < 1 or (tflops is not None and tflops <= 0):
        rate = "" if tflops is None else f" and {tflops:g} TFLOPS"
        raise UserError(f"a GPU of {gib:g} GiB{rate}: expected more than 0")
    cards = GPUS.values()
    if tflops is None:
        nearest = min(_ratio(card.device_bytes, size) for card in cards)
        alike = [c for c in cards if _ratio(c.device_bytes, size) <= nearest * _SAME_MEMORY]
        card = min(alike, key=lambda card: (card.flops, card.memory_bandwidth))
        factor = 1.0
    else:
        rate_wanted = tflops * _T
        card = min(cards, key=lambda c: _ratio(c.flops, rate_wanted) * _ratio(c.device_bytes, size))
        factor = rate_wanted / card.flops
    return replace(
        card,
        name=f"GPU of {gib:g} GiB",
        device_bytes=size,
        compute_capability=(8, 0),
        flops=card.flops * factor,
        memory_bandwidth=card.memory_bandwidth * factor,
    )


def rates_of(nvml_name: str, device_bytes: int) -> Hardware:
    """The catalogue's card of NVML's product name and about this memory, else one like it.

    Only its rates are meant to be used: counts, memory and name are what was detected.
    """
    for card in GPUS.values():
        is_same = _plain(card.name) == _plain(nvml_name)
        if is_same and _ratio(card.device_bytes, device_bytes) <= _SAME_MEMORY:
            return card
    return gpu_like(device_bytes / GIB)


def cpu_of(num_cores: int, memory_bytes: int) -> Hardware:
    """A CPU as one device; its rates are rough, its network is an assumption."""
    return Hardware(
        kind="cpu",
        name="CPU",
        devices_per_node=1,
        device_bytes=memory_bytes,
        host_bytes=memory_bytes,
        flops=num_cores * _CORE_FLOPS,
        memory_bandwidth=num_cores * _CORE_BANDWIDTH,
        node_link=_LOOPBACK,
        network=_OFFICE,
        host_link=num_cores * _CORE_BANDWIDTH,
    )


def _plain(name: str) -> str:
    """The product name without the maker's and the family's, which drivers write or leave out."""
    return re.sub(r"\b(NVIDIA|Tesla|GeForce)\b|\s+", "", name).lower()


def _ratio(one: float, other: float) -> float:
    """How many times the larger is the smaller; 1 for equals."""
    return max(one, other) / min(one, other)
