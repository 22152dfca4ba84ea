"""Is the machine as fast as the plan reckons? A product on each device, sums over links.

The shares below which a line warns are assumptions; on a GPU none of this has been measured.
"""

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.plan.cost.speed import reachable_rates
from pipeline.preflight.check import Finding, ProbeResults, ok, warn
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import own_devices

if TYPE_CHECKING:
    import torch

# Of what the plan reckons with. A CPU's figures are rough, so it is held to nothing but its peers.
_LEAST_SHARE = 0.5
# Of the median of all: devices of one kind differ by a few percent, ranks on shared cores by more.
_LEAST_OF_MEDIAN = {"cuda": 0.85, "cpu": 0.4}
_LEAST_OF_PAIRS = 0.5
_TERA, _GIGA = 1e12, 1e9
# Width of the square matrices and bytes moved: enough to fill a device or a link, little to wait.
_WIDTH = {"cuda": 8192, "cpu": 768}
_MOVED_BYTES = {"cuda": 2**26, "cpu": 2**22}
_WARM_UP, _ROUNDS = 2, 5


def probe_product(context: RankContext) -> dict[str, Any]:
    """FLOP/s of a matrix product in the training dtype on each device of this rank, all at once."""
    import torch

    plan, kind = context.known_plan, context.hardware.kind
    dtype = getattr(torch, plan.training_dtype)
    rates = []
    for device in devices_of(context):
        width = _WIDTH[kind]
        left = torch.randn(width, width, device=device).to(dtype)
        right, product = left.t().contiguous(), torch.empty_like(left)

        def multiply(
            left: torch.Tensor = left, right: torch.Tensor = right, product: torch.Tensor = product
        ) -> None:
            torch.mm(left, right, out=product)

        rates.append(2 * width**3 / _seconds(multiply, device))
        if not bool(torch.isfinite(product).all()):
            raise RuntimeError(f"a product of finite numbers is not finite on {device}")
    reckoned = reachable_rates(plan.layout, plan.hardware).flops
    return {"kind": kind, "rates": rates, "reckoned": reckoned}


def assess_product(seen: ProbeResults) -> Iterable[Finding]:
    """As fast as planned and as the others."""
    first = next(iter(seen.answers.values()))
    kind, reckoned = first["kind"], first["reckoned"]
    slowest = {rank: min(answer["rates"]) for rank, answer in seen.answers.items()}
    middle = median(rate for answer in seen.answers.values() for rate in answer["rates"])
    said = f"{middle / _TERA:.3g} TFLOPS, the plan reckons with {reckoned / _TERA:.3g}"
    late = [rank for rank, rate in slowest.items() if rate < _LEAST_OF_MEDIAN[kind] * middle]
    if late:
        worst = min(late, key=lambda rank: slowest[rank])
        yield warn(
            f"{seen.where(late)}: down to {slowest[worst] / _TERA:.3g} TFLOPS where the median is "
            f"{middle / _TERA:.3g}; every step waits for the slowest",
            "look for heat, power limits and other processes (nvidia-smi -q -d PERFORMANCE; top)",
            late,
        )
    if kind == "cuda" and middle < _LEAST_SHARE * reckoned:
        yield warn(said, "expect steps longer than planned; look for power limits (nvidia-smi -q)")
    elif not late:
        yield ok(said)


def probe_sum(context: RankContext) -> dict[str, Any]:
    """Bytes/s of a sum over all ranks, as a ring moves them. Collective."""
    import torch

    plan, kind, device = context.known_plan, context.hardware.kind, context.session.device
    values = torch.zeros(_MOVED_BYTES[kind] // 4, device=device)
    seconds = _seconds(lambda: context.session.add_over_ranks(values), device)
    return {
        "kind": kind,
        "rate": ring_rate(context.placement.world_size, _MOVED_BYTES[kind], seconds),
        "reckoned": reachable_rates(plan.layout, plan.hardware).ring,
    }


def ring_rate(ranks: int, num_bytes: int, seconds: float) -> float:
    """Bytes/s over each link of a ring that sums so many bytes: 2 (W - 1) / W of them cross it."""
    return 2 * (ranks - 1) / ranks * num_bytes / seconds


def assess_sum(seen: ProbeResults) -> Iterable[Finding]:
    """As fast as planned; who is slow is the next check's to say."""
    first = next(iter(seen.answers.values()))
    rate = min(answer["rate"] for answer in seen.answers.values())
    said = (
        f"{rate / _GIGA:.3g} GB/s each way, the plan reckons with {first['reckoned'] / _GIGA:.3g}"
    )
    if first["kind"] == "cuda" and rate < _LEAST_SHARE * first["reckoned"]:
        yield warn(
            said,
            "NCCL_DEBUG=INFO shows which way it goes; name a faster interface in "
            "NCCL_SOCKET_IFNAME, or plan for it (docs/speed.md)",
        )
    else:
        yield ok(said)


def probe_pairs(context: RankContext) -> dict[str, Any]:
    """Bytes/s each way between this rank and its neighbours. Collective."""
    import torch

    place, kind, device = context.placement, context.hardware.kind, context.session.device
    sent = torch.zeros(_MOVED_BYTES[kind] // 4, device=device)
    received, found = torch.empty_like(sent), {}
    plan = context.known_plan
    planned = reachable_rates(plan.layout, plan.hardware).ring
    for other in neighbours(place.rank, place.world_size, place.local_size):

        def swap(other: int = other) -> None:
            context.session.swap_with(other, sent, received)

        rate = _MOVED_BYTES[kind] / _seconds(swap, device)
        is_near = other // place.local_size == place.rank // place.local_size
        reckoned = None if is_near or kind == "cpu" else planned
        found[str(other)] = {"rate": rate, "is_near": is_near, "reckoned": reckoned}
    return found


def neighbours(rank: int, world_size: int, local_size: int) -> list[int]:
    """Whom a rank is paired with in four rounds, in order: all pairs of a round work at once.

    First in its machine 0-1, 2-3, ...; then 1-2, 3-4, ...; then the machines so, each rank with the
    same one of the other machine: all network cards are used.
    """
    machine, local = divmod(rank, local_size)
    near = [machine * local_size + other for other in _beside(local, local_size)]
    far = [other * local_size + local for other in _beside(machine, world_size // local_size)]
    return near + far


def _beside(number: int, count: int) -> list[int]:
    pairs = (number ^ 1, number - 1 if number % 2 == 0 else number + 1)
    return [other for other in pairs if 0 <= other < count]


def assess_pairs(seen: ProbeResults) -> Iterable[Finding]:
    """No pair is far slower than others of its kind, nor one between machines than planned.

    A rank in two slow pairs is named first.
    """
    pairs = {
        (rank, int(other)): link
        for rank, answer in seen.answers.items()
        for other, link in answer.items()
        if rank < int(other)
    }
    said, slow = [], dict[tuple[int, int], str]()
    for is_near, name in ((True, "in a machine"), (False, "between machines")):
        links = {pair: link for pair, link in pairs.items() if link["is_near"] is is_near}
        rates = {pair: link["rate"] for pair, link in links.items()}
        if not rates:
            continue
        middle = median(rates.values())
        said.append(f"{name} {middle / _GIGA:.3g} GB/s")
        for pair, rate in rates.items():
            should = max(middle, links[pair]["reckoned"] or 0.0)
            if rate < _LEAST_OF_PAIRS * should:
                slow[pair] = f"{pair[0]}-{pair[1]} {rate / _GIGA:.3g} of {should / _GIGA:.3g} GB/s"
    if not slow:
        yield ok(", ".join(said))
        return
    ends = [rank for pair in slow for rank in pair]
    twice = sorted({rank for rank in ends if ends.count(rank) > 1})
    ranks = twice or sorted(set(ends))
    yield warn(
        f"{seen.where(ranks)}: slow links {', '.join(slow.values())}",
        "look at that machine's card, cable or slot (nvidia-smi topo -m, ibstat), or leave it out",
        ranks,
    )


def devices_of(context: RankContext) -> "list[torch.device]":
    """This rank's device; without a launcher every device of the machine."""
    import torch

    if context.hardware.kind == "cpu":
        return [torch.device("cpu")]
    return [torch.device("cuda", i) for i in own_devices(context, torch.cuda.device_count())]


def _seconds(work: Callable[[], None], device: "torch.device") -> float:
    """Median of some rounds, each waited for, after a warm-up."""
    taken = []
    for _ in range(_WARM_UP + _ROUNDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return median(taken[_WARM_UP:])
