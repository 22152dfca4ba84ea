"""Checks of speed: matrix products on each device, and communication between ranks.

Measured rates are compared with the plan's rates and with the median over devices or links. The
thresholds below are assumptions: these checks have not been measured on a GPU.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.commands import DOCS
from pipeline.plan.cost.speed import reachable_rates
from pipeline.plan.given.fast_paths import FP32_KERNELS
from pipeline.preflight.check import Check, Finding, ProbeResults, ok, warn
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import used_gpu_indices

if TYPE_CHECKING:
    import torch

# A rate causes a warning below these fractions of an expected rate.
# Fraction of the planned rate; only for GPUs, because the plan's rate for a CPU is rough.
_MIN_OF_PLAN = 0.5
# Fraction of the median over devices. GPUs of one model differ by a few percent; ranks that share
# CPU cores differ by more.
_MIN_OF_MEDIAN = {"cuda": 0.85, "cpu": 0.4}
# Fraction of the expected rate of a link between two ranks.
_MIN_OF_LINK = 0.5
_TERA, _GIGA = 1e12, 1e9
# A CPU is much faster in one dtype than in the other above this ratio of the rates.
_MUCH_FASTER = 1.3
# Matrix width and message size: large enough to saturate a device or a link, small enough for a
# measurement of seconds.
_WIDTH = {"cuda": 8192, "cpu": 768}
_SENT_BYTES = {"cuda": 2**26, "cpu": 2**22}
_NUM_WARM_UPS, _NUM_REPEATS = 2, 5


def _probe_product(context: RankContext) -> dict[str, Any]:
    """FLOP/s of a matrix product in the training dtype on each device of this rank.

    On a CPU also those in fp32, and whether the run multiplies bf16 tensors in fp32.
    """
    import torch

    plan, kind = context.known_plan, context.hardware.kind
    dtype, devices = getattr(torch, plan.training_dtype), devices_of(context)
    return {
        "kind": kind,
        "rates": [_product_rate(device, dtype) for device in devices],
        "planned": reachable_rates(plan.layout, plan.hardware).flops,
        "dtype": plan.training_dtype,
        "fp32_rate": _product_rate(devices[0], torch.float32) if kind == "cpu" else None,
        "has_fp32_kernels": not plan.fast_paths[FP32_KERNELS],
    }


def _product_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s of a square matrix product. Raises RuntimeError if the product is not finite."""
    import torch

    width = _WIDTH[device.type]
    left = torch.randn(width, width, device=device).to(dtype)
    right, product = left.t().contiguous(), torch.empty_like(left)
    seconds = _median_seconds(lambda: torch.mm(left, right, out=product), device)
    if not bool(torch.isfinite(product).all()):
        raise RuntimeError(f"a product of finite numbers is not finite on {device}")
    return 2 * width**3 / seconds


def _assess_product(results: ProbeResults) -> Iterable[Finding]:
    kind, planned = results.first["kind"], results.first["planned"]
    slowest_by_rank = {rank: min(result["rates"]) for rank, result in results.by_rank.items()}
    median_rate = median(rate for result in results.by_rank.values() for rate in result["rates"])
    text = f"{median_rate / _TERA:.3g} TFLOPS, planned {planned / _TERA:.3g}"
    threshold = _MIN_OF_MEDIAN[kind] * median_rate
    slow_ranks = [rank for rank, rate in slowest_by_rank.items() if rate < threshold]
    if slow_ranks:
        lowest = min(slowest_by_rank.values())
        yield warn(
            f"{results.name_ranks(slow_ranks)}: only {lowest / _TERA:.3g} TFLOPS, but the median "
            f"is {median_rate / _TERA:.3g} TFLOPS; every step waits for the slowest device",
            "check temperature, power limits and other processes (nvidia-smi -q -d PERFORMANCE; "
            "top)",
            slow_ranks,
        )
    if kind == "cuda" and median_rate < _MIN_OF_PLAN * planned:
        yield warn(text, "check power limits (nvidia-smi -q); steps will be slower than planned")
    elif not slow_ranks:
        yield _slower_dtype(results) or ok(text)


def _slower_dtype(results: ProbeResults) -> Finding | None:
    """A warning if a CPU multiplies bf16 tensors much faster in the dtype that is not used."""
    ranks = list(results.by_rank.values())
    if any(rank["fp32_rate"] is None or rank["dtype"] != "bfloat16" for rank in ranks):
        return None
    bf16, fp32 = (
        median(rates) / _TERA
        for rates in zip(*((rank["rates"][0], rank["fp32_rate"]) for rank in ranks), strict=True)
    )
    text = f"matrix products: {bf16:.3g} TFLOPS in bf16, {fp32:.3g} in fp32"
    if not results.first["has_fp32_kernels"] and fp32 > _MUCH_FASTER * bf16:
        return warn(
            f"{text}; this run multiplies in bf16",
            "set bf16: false and fp16: false, which trains in fp32 with twice the memory",
        )
    if results.first["has_fp32_kernels"] and bf16 > _MUCH_FASTER * fp32:
        return warn(f"{text}; this run multiplies bf16 tensors in fp32", "set fast_paths: false")
    return None


def _probe_all_reduce(context: RankContext) -> dict[str, Any]:
    """Bytes/s over each link in an all-reduce over all ranks. Collective.

    NCCL and gloo choose the algorithm; the rate is computed as if they had chosen a ring.
    """
    import torch

    plan, kind, device = context.known_plan, context.hardware.kind, context.session.device
    values = torch.zeros(_SENT_BYTES[kind] // 4, device=device)  # fp32, 4 bytes each
    seconds = _median_seconds(lambda: context.session.all_reduce_sum(values), device)
    return {
        "kind": kind,
        "rate": ring_rate(context.placement.world_size, _SENT_BYTES[kind], seconds),
        "planned": reachable_rates(plan.layout, plan.hardware).ring,
    }


def ring_rate(ranks: int, num_bytes: int, seconds: float) -> float:
    """Bytes/s over each link of a ring all-reduce of `num_bytes` bytes.

    With W ranks, each link carries 2 (W - 1) / W times `num_bytes`.
    """
    return 2 * (ranks - 1) / ranks * num_bytes / seconds


def _probe_all_to_all(context: RankContext) -> dict[str, Any]:
    """Bytes/s that this rank sends in an all-to-all of its sequence-parallel group. Collective.

    The result has only "size" if the run uses no sequence parallelism. Raises RuntimeError if the
    ranks receive other values than were sent.
    """
    import torch

    plan, kind, device = context.known_plan, context.hardware.kind, context.session.device
    group = context.session.sequence_group(plan.layout.sequence_parallel_size)
    if group is None:
        return {"size": 1}
    # Row i goes to rank i of the group; all values are the sender's index in the group.
    sent = torch.full(
        (group.size, _SENT_BYTES[kind] // 4 // group.size), float(group.rank), device=device
    )
    seconds = _median_seconds(lambda: group.all_to_all(sent), device)
    received = group.all_to_all(sent)
    expected = torch.arange(group.size, device=device)[:, None].expand_as(received)
    if not torch.equal(received, expected.to(received)):
        raise RuntimeError("an all-to-all returned other values than were sent")
    return {
        "size": group.size,
        "kind": kind,
        "rate": (group.size - 1) / group.size * _SENT_BYTES[kind] / seconds,
        "planned": reachable_rates(plan.layout, plan.hardware).exchange,
    }


def _assess_all_to_all(results: ProbeResults) -> Iterable[Finding]:
    if (size := results.first["size"]) == 1:
        yield ok("not used: each rank has its own sequences (sequence_parallel_size: 1)")
        return
    for finding in _assess_rate(results):
        yield replace(finding, text=f"groups of {size} ranks: {finding.text}")


def _assess_rate(results: ProbeResults) -> Iterable[Finding]:
    """Compare the rate of the slowest rank with the planned rate."""
    planned = results.first["planned"]
    rate = min(result["rate"] for result in results.by_rank.values())
    text = f"{rate / _GIGA:.3g} GB/s in each direction, planned {planned / _GIGA:.3g}"
    if results.first["kind"] == "cuda" and rate < _MIN_OF_PLAN * planned:
        yield warn(
            text,
            "name a faster interface in NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO logs the one in use), "
            f"or plan for this rate ({DOCS}/speed.md)",
        )
    else:
        yield ok(text)


def _probe_links(context: RankContext) -> dict[str, Any]:
    """Bytes/s in each direction between this rank and each of its neighbours. Collective."""
    import torch

    placement, kind, device = context.placement, context.hardware.kind, context.session.device
    rank, local_size = placement.rank, placement.local_size
    sent = torch.zeros(_SENT_BYTES[kind] // 4, device=device)
    received, links = torch.empty_like(sent), {}
    plan = context.known_plan
    planned_rate = reachable_rates(plan.layout, plan.hardware).ring
    for other in neighbours(rank, placement.world_size, local_size):

        def swap(other: int = other) -> None:
            context.session.swap_with(other, sent, received)

        rate = _SENT_BYTES[kind] / _median_seconds(swap, device)
        is_local = other // local_size == rank // local_size
        # The planned rate is that of the network between nodes.
        planned = None if is_local or kind == "cpu" else planned_rate
        links[str(other)] = {"rate": rate, "is_local": is_local, "planned": planned}
    return links


def neighbours(rank: int, world_size: int, local_size: int) -> list[int]:
    """The ranks with which a rank exchanges data, in the order of the exchanges.

    All ranks exchange at the same time, in up to four passes. The first two passes pair the local
    ranks of each node: 0-1, 2-3, ..., then 1-2, 3-4, ... The last two passes pair the nodes in the
    same way. There each rank exchanges with the same local rank of the other node, so that all
    network cards are used.
    """
    node, local_rank = divmod(rank, local_size)
    num_nodes = world_size // local_size
    same_node = [node * local_size + other for other in _partners(local_rank, local_size)]
    other_nodes = [other * local_size + local_rank for other in _partners(node, num_nodes)]
    return same_node + other_nodes


def _partners(index: int, count: int) -> list[int]:
    """Up to two neighbours of an index below `count`: first in 0-1, 2-3, ..., then in 1-2, ..."""
    is_even = index % 2 == 0
    pairs = (index + 1, index - 1) if is_even else (index - 1, index + 1)
    return [other for other in pairs if 0 <= other < count]


def _assess_links(results: ProbeResults) -> Iterable[Finding]:
    """Compare each link with the plan and with the median of the links within or between nodes.

    If a rank has two slow links, the finding names only this rank: it is the likely cause.
    """
    links = {
        (rank, int(other)): link
        for rank, result in results.by_rank.items()
        for other, link in result.items()
        if rank < int(other)  # both ranks of a pair have measured the link
    }
    medians, slow = [], dict[tuple[int, int], str]()
    for is_local, name in ((True, "within nodes"), (False, "between nodes")):
        group = {pair: link for pair, link in links.items() if link["is_local"] is is_local}
        if not group:
            continue
        median_rate = median(link["rate"] for link in group.values())
        medians.append(f"{name} {median_rate / _GIGA:.3g} GB/s")
        for (rank, other), link in group.items():
            rate, expected = link["rate"], max(median_rate, link["planned"] or 0.0)
            if rate < _MIN_OF_LINK * expected:
                text = f"{rank}-{other} {rate / _GIGA:.3g} of {expected / _GIGA:.3g} GB/s"
                slow[rank, other] = text
    if not slow:
        yield ok(", ".join(medians))
        return
    num_slow_links = Counter(rank for pair in slow for rank in pair)
    with_two = [rank for rank, num_slow in num_slow_links.items() if num_slow > 1]
    ranks = sorted(with_two or num_slow_links)
    yield warn(
        f"{results.name_ranks(ranks)}: slow links {', '.join(slow.values())}",
        "check the card, cable and slot (nvidia-smi topo -m, ibstat), or exclude the node",
        ranks,
    )


def devices_of(context: RankContext) -> "list[torch.device]":
    """The device of this rank; without a launcher, all devices of the node."""
    import torch

    if context.hardware.kind == "cpu":
        return [torch.device("cpu")]
    return [torch.device("cuda", i) for i in used_gpu_indices(context, torch.cuda.device_count())]


def _median_seconds(function: Callable[[], object], device: "torch.device") -> float:
    """Median time of several calls, each synchronised with the device, after warm-up calls."""
    seconds = []
    for _ in range(_NUM_WARM_UPS + _NUM_REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[_NUM_WARM_UPS:])


_REMEDY = "set NCCL_DEBUG=INFO, which logs what NCCL tries"
MATRIX_PRODUCT = Check(
    "matrix product", _probe_product, _assess_product,
    "check nvidia-smi -q and dmesg for a broken device",
)  # fmt: skip
ALL_REDUCE = Check("all-reduce", _probe_all_reduce, _assess_rate, _REMEDY)
ALL_TO_ALL = Check("all-to-all", _probe_all_to_all, _assess_all_to_all, _REMEDY)
LINKS = Check("links", _probe_links, _assess_links, _REMEDY)
