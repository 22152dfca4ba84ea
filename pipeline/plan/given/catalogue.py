"""Catalogue of GPUs with the rates of their data sheets, and estimated rates for other devices.

The rates are upper bounds; speed.py has the fraction of each that a run is assumed to reach.
Network rates are not a property of a GPU, so they are assumptions.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pipeline.errors import UserError
from pipeline.plan.given.hardware import GIB, Hardware

_MIB = 2**20
_GB = 1e9
_T = 1e12

# PCI Express x16, each way: 16, 32 and 64 GB/s for generations 3, 4 and 5 (PCI-SIG).
_PCIE3, _PCIE4, _PCIE5 = 16 * _GB, 32 * _GB, 64 * _GB
# Rate between two GeForce GPUs: their drivers allow no peer-to-peer access, so transfers go through
# host memory, assumed at half the rate of PCIe 4.
_THROUGH_HOST = _PCIE4 / 2

# Network bandwidth of one GPU to other nodes, bytes/s in each direction. All four are assumptions.
_FABRIC_400 = 25 * _GB  # half of the 400 Gb/s per GPU of DGX H100, H200 and B200
_FABRIC_200 = 12.5 * _GB  # half of the 200 Gb/s per GPU of DGX A100
_SERVER = 100 / 8 * _GB / 4  # one network card of 100 Gb/s shared by four GPUs
_OFFICE = 10 / 8 * _GB / 2  # 10 Gb/s Ethernet shared by two GPUs


_gpu = partial(Hardware, kind="cuda", devices_per_node=1, host_bytes=0)


# Memory: MiB that `nvidia-smi` shows with recent drivers and the default ECC setting. Cards that
# store ECC bits in device memory show less than their nominal size.
# Rates: from the data sheet or architecture white paper named above each row. `flops`: dense rate
# of the bf16 or fp16 tensor cores with fp32 accumulation (half of a figure "with sparsity").
# `node_link`: half of NVLink's total, for one direction; for PCIe cards the rate of the slot, since
# an NVLink bridge joins only two cards.
# fmt: off
GPUS: Mapping[str, Hardware] = {
    # DGX B200 data sheet, whose figures are for eight GPUs
    "b200-180gb": _gpu(name="NVIDIA B200", device_bytes=183359 * _MIB,
        compute_capability=(10, 0), flops=2250 * _T, memory_bandwidth=8000 * _GB,
        node_link=900 * _GB, host_link=_PCIE5, network=_FABRIC_400),
    # H200 data sheet
    "h200-141gb": _gpu(name="NVIDIA H200", device_bytes=143771 * _MIB,
        compute_capability=(9, 0), flops=989.5 * _T, memory_bandwidth=4800 * _GB,
        node_link=450 * _GB, host_link=_PCIE5, network=_FABRIC_400),
    # H100 data sheet, SXM
    "h100-80gb": _gpu(name="NVIDIA H100 80GB HBM3", device_bytes=81559 * _MIB,
        compute_capability=(9, 0), flops=989.5 * _T, memory_bandwidth=3350 * _GB,
        node_link=450 * _GB, host_link=_PCIE5, network=_FABRIC_400),
    # H100 data sheet, PCIe
    "h100-80gb-pcie": _gpu(name="NVIDIA H100 PCIe", device_bytes=81559 * _MIB,
        compute_capability=(9, 0), flops=756.5 * _T, memory_bandwidth=2000 * _GB,
        node_link=_PCIE5, host_link=_PCIE5, network=_SERVER),
    # A100 data sheet, SXM
    "a100-80gb": _gpu(name="NVIDIA A100-SXM4-80GB", device_bytes=81920 * _MIB,
        compute_capability=(8, 0), flops=312 * _T, memory_bandwidth=2039 * _GB,
        node_link=300 * _GB, host_link=_PCIE4, network=_FABRIC_200),
    # A100 data sheet, PCIe
    "a100-80gb-pcie": _gpu(name="NVIDIA A100 80GB PCIe", device_bytes=81920 * _MIB,
        compute_capability=(8, 0), flops=312 * _T, memory_bandwidth=1935 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_SERVER),
    # A100 architecture white paper
    "a100-40gb": _gpu(name="NVIDIA A100-SXM4-40GB", device_bytes=40960 * _MIB,
        compute_capability=(8, 0), flops=312 * _T, memory_bandwidth=1555 * _GB,
        node_link=300 * _GB, host_link=_PCIE4, network=_FABRIC_200),
    # L40S data sheet
    "l40s-48gb": _gpu(name="NVIDIA L40S", device_bytes=46068 * _MIB,
        compute_capability=(8, 9), flops=362 * _T, memory_bandwidth=864 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_SERVER),
    # A40 data sheet
    "a40-48gb": _gpu(name="NVIDIA A40", device_bytes=46068 * _MIB,
        compute_capability=(8, 6), flops=149.7 * _T, memory_bandwidth=696 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_SERVER),
    # RTX A6000 data sheet
    "rtx-a6000-48gb": _gpu(name="NVIDIA RTX A6000", device_bytes=49140 * _MIB,
        compute_capability=(8, 6), flops=154.8 * _T, memory_bandwidth=768 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_OFFICE),
    # Ada architecture white paper
    "rtx-4090-24gb": _gpu(name="NVIDIA GeForce RTX 4090", device_bytes=24564 * _MIB,
        compute_capability=(8, 9), flops=165.2 * _T, memory_bandwidth=1008 * _GB,
        node_link=_THROUGH_HOST, host_link=_PCIE4, network=_OFFICE),
    # GA102 white paper
    "rtx-3090-24gb": _gpu(name="NVIDIA GeForce RTX 3090", device_bytes=24576 * _MIB,
        compute_capability=(8, 6), flops=71 * _T, memory_bandwidth=936 * _GB,
        node_link=_THROUGH_HOST, host_link=_PCIE4, network=_OFFICE),
    # A10 data sheet
    "a10-24gb": _gpu(name="NVIDIA A10", device_bytes=23028 * _MIB,
        compute_capability=(8, 6), flops=125 * _T, memory_bandwidth=600 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_SERVER),
    # A10G data sheet
    "a10g-24gb": _gpu(name="NVIDIA A10G", device_bytes=23028 * _MIB,
        compute_capability=(8, 6), flops=70 * _T, memory_bandwidth=600 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_SERVER),
    # L4 data sheet
    "l4-24gb": _gpu(name="NVIDIA L4", device_bytes=23034 * _MIB,
        compute_capability=(8, 9), flops=121 * _T, memory_bandwidth=300 * _GB,
        node_link=_PCIE4, host_link=_PCIE4, network=_SERVER),
    # V100 data sheet, NVLink
    "v100-32gb": _gpu(name="Tesla V100-SXM2-32GB", device_bytes=32768 * _MIB,
        compute_capability=(7, 0), flops=125 * _T, memory_bandwidth=900 * _GB,
        node_link=150 * _GB, host_link=_PCIE3, network=_SERVER),
    # V100 data sheet, NVLink; the memory is the nominal size
    "v100-16gb": _gpu(name="Tesla V100-SXM2-16GB", device_bytes=16384 * _MIB,
        compute_capability=(7, 0), flops=125 * _T, memory_bandwidth=900 * _GB,
        node_link=150 * _GB, host_link=_PCIE3, network=_SERVER),
    # T4 data sheet
    "t4-16gb": _gpu(name="Tesla T4", device_bytes=15360 * _MIB,
        compute_capability=(7, 5), flops=65 * _T, memory_bandwidth=300 * _GB,
        node_link=_PCIE3, host_link=_PCIE3, network=_SERVER),
}
# fmt: on

# Two memory sizes count as equal if their ratio is below this. The sizes that different drivers
# report for one card differ by less; a card and its MIG slices differ by more.
_SAME_MEMORY = 1.1

# One core of a server CPU: 16-bit matmul FLOP/s (with AVX512-BF16 or AMX; without them bf16 is far
# slower) and memory bandwidth in bytes/s. Fitted so that speed.py matches the two measurements on
# two cores in docs/benchmarks.md; another CPU may be several times faster or slower.
_CORE_FLOPS = 1.5e11
_CORE_BANDWIDTH = 8 * _GB
# Bytes/s between ranks on one CPU, which communicate with gloo over the loopback interface: an
# assumption.
_LOOPBACK = 1 * _GB


def gpu_named(key: str) -> Hardware:
    """The GPU with this key in GPUS. Raises UserError with similar keys if there is none."""
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key.lower(), GPUS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known GPUs: {', '.join(GPUS)}."
    raise UserError(
        f"unknown GPU {key!r}; {hint} Describe any other GPU by its memory and its 16-bit rate "
        "(--gpu-memory-gib, --gpu-tflops)"
    )


def gpu_like(gib: float, tflops: float | None = None) -> Hardware:
    """A GPU described by its memory in GiB and, if known, its dense 16-bit rate in TFLOPS.

    It is assumed to support bfloat16. Its other rates come from a card of the catalogue. Without
    `tflops` this is the slowest card with about the same memory. With `tflops` it is the card
    closest in memory and rate, and its memory bandwidth is scaled by the ratio of the rates. Raises
    UserError for a value that is not above 0.
    """
    size = int(gib * GIB)
    if size < 1 or (tflops is not None and tflops <= 0):
        rate = "" if tflops is None else f" and {tflops:g} TFLOPS"
        raise UserError(f"a GPU of {gib:g} GiB{rate}: expected more than 0")
    cards = GPUS.values()
    if tflops is None:
        smallest_ratio = min(_ratio(card.device_bytes, size) for card in cards)
        limit = smallest_ratio * _SAME_MEMORY
        similar = [card for card in cards if _ratio(card.device_bytes, size) <= limit]
        card = min(similar, key=lambda card: (card.flops, card.memory_bandwidth))
        factor = 1.0
    else:
        flops = tflops * _T

        def distance(card: Hardware) -> float:
            return _ratio(card.flops, flops) * _ratio(card.device_bytes, size)

        card = min(cards, key=distance)
        factor = flops / card.flops
    return replace(
        card,
        name=f"GPU of {gib:g} GiB",
        device_bytes=size,
        compute_capability=(8, 0),
        flops=card.flops * factor,
        memory_bandwidth=card.memory_bandwidth * factor,
    )


def rates_of(nvml_name: str, device_bytes: int) -> Hardware:
    """The catalogue's rates for a detected GPU.

    If the catalogue has no card with this NVML name and about this memory, `gpu_like` estimates the
    rates from the memory. The caller replaces name, memory and number of devices with the detected
    values.
    """
    for card in GPUS.values():
        is_same = _product_name(card.name) == _product_name(nvml_name)
        if is_same and _ratio(card.device_bytes, device_bytes) <= _SAME_MEMORY:
            return card
    return gpu_like(device_bytes / GIB)


def cpu_of(num_cores: int, memory_bytes: int) -> Hardware:
    """All cores of a CPU as one device, with estimated rates and an assumed network."""
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


def _product_name(name: str) -> str:
    """The name without vendor and product family, which drivers do not always include."""
    return re.sub(r"\b(NVIDIA|Tesla|GeForce)\b|\s+", "", name).lower()


def _ratio(one: float, other: float) -> float:
    """The larger value divided by the smaller one."""
    return max(one, other) / min(one, other)
