"""How the ranks reach each other: machines, port, interface, InfiniBand. No torch."""

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster.rendezvous import interface_towards
from pipeline.errors import UserError
from pipeline.preflight.check import Finding, ProbeResults, fail, ok, warn
from pipeline.preflight.context import RankContext

_ASKED = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_INFINIBAND = Path("/sys/class/infiniband")
_SLOW_MBIT = 10_000  # below it even an adapter's gradients are felt (docs/speed.md)


def probe_ranks(context: RankContext) -> dict[str, Any]:
    """Who this rank takes itself to be."""
    place = context.placement
    return {
        "launcher": place.launcher,
        "machine": place.rank // place.local_size,
        "machines": place.nodes,
        "local_rank": place.local_rank,
    }


def assess_ranks(seen: ProbeResults) -> Iterable[Finding]:
    """Ranks of one machine are on one machine, and those of two on two."""
    hosts: dict[int, set[str]] = {}
    for rank, answer in seen.answers.items():
        hosts.setdefault(answer["machine"], set()).add(seen.hosts[rank])
    for machine, names in hosts.items():
        if len(names) > 1:
            yield fail(
                f"ranks that count as machine {machine} run on {', '.join(sorted(names))}",
                "start the same number of ranks on every machine",
            )
            return
    first = next(iter(seen.answers.values()))
    num_names = len({name for names in hosts.values() for name in names})
    if num_names < len(hosts):
        yield warn(
            f"{len(hosts)} machines are planned and their ranks run on {num_names}",
            "look at the hostfile or the node list; on purpose it is fine",
        )
        return
    listed = ", ".join(dict.fromkeys(seen.hosts))
    count = len(seen.hosts)
    ranks = "1 rank" if count == 1 else f"{count} ranks"
    yield ok(f"{ranks} on {listed} ({first['launcher']})")


def probe_port(context: RankContext) -> str:
    """Who listens on the port where the ranks meet. Raises UserError where it is taken.

    On rank 0 and before the ranks meet: then it is this process that listens.
    """
    port = context.placement.master_port
    if context.placement.world_size == 1:
        return "one process: none is needed"
    if port == 0 or context.placement.rendezvous_id:
        return "a free one is taken when the ranks meet"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"{port}, held by torchrun"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of {socket.gethostname()}, where the ranks are to meet: "
                f"{error.strerror}; give another (deepspeed: --master_port, torchrun: "
                "--master-port, else MASTER_PORT)"
            ) from None
    return f"{port} is free"


def assess_port(seen: ProbeResults) -> Iterable[Finding]:
    """It is, or probe_port has raised."""
    (said,) = seen.answers.values()
    yield ok(said)


def probe_network(context: RankContext) -> dict[str, Any]:
    """The interface towards rank 0's machine, what the environment asks for, and InfiniBand.

    Raises UserError for a name that is not known here.
    """
    first = context.placement.master_addr
    try:
        socket.getaddrinfo(first or None, 9)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={first}: {error.strerror}; set it to a name or an address that "
            f"{socket.gethostname()} can reach"
        ) from None
    # Under mpirun it is known when the ranks have met.
    name, stats = interface_towards(first) if first else None, psutil.net_if_stats()
    return {
        "master": first,
        "interface": name,
        "mbit": stats[name].speed if name in stats else 0,
        "missing": missing_interfaces(os.environ, list(stats)),
        "infiniband": infiniband_ports(_INFINIBAND),
        "is_cuda": context.hardware.kind == "cuda",
    }


def missing_interfaces(env: Mapping[str, str], there: Iterable[str]) -> dict[str, str]:
    """Interfaces that the environment names and that are not there.

    NCCL: a list of prefixes, of exact names after `=`, of what to leave out after `^` (NCCL,
    environment variables); gloo: exact names.
    """
    found = {}
    there = list(there)
    for key in _ASKED:
        asked = env.get(key, "")
        if not asked or asked.startswith("^"):
            continue
        is_exact = asked.startswith("=") or key.startswith("GLOO")
        names = [name.strip() for name in asked.lstrip("=").split(",") if name.strip()]
        if not any(t == n if is_exact else t.startswith(n) for n in names for t in there):
            found[key] = asked
    return found


def infiniband_ports(folder: Path) -> dict[str, str]:
    """State of each port of each adapter, as the kernel says: `ACTIVE` or `DOWN`."""
    return {
        f"{path.parents[2].name}:{path.parent.name}": path.read_text().strip().partition(": ")[2]
        for path in sorted(folder.glob("*/ports/*/state"))
    }


def assess_network(seen: ProbeResults) -> Iterable[Finding]:
    """Interfaces that are named exist; across machines none is a loopback, and one is fast."""
    findings = [
        finding
        for rank, answer in seen.answers.items()
        for finding in _of_machine(seen, rank, answer)
    ]
    if findings:
        yield from findings
        return
    # On its own machine that may be the loopback; then training takes what the others reach it by.
    reached = [answer for answer in seen.answers.values() if answer["interface"]]
    first = next(iter([*reached, *seen.answers.values()]))
    active = sum(state == "ACTIVE" for state in first["infiniband"].values())
    fabric = f", InfiniBand: {active} active ports" if active else ""
    speed = f" ({first['mbit']:,} Mb/s)" if first["mbit"] > 0 else ""
    if not first["master"]:
        yield ok(f"rank 0's machine is known when the ranks have met{fabric}")
        return
    yield ok(
        f"{first['master']} is reached by {first['interface'] or 'the loopback'}{speed}{fabric}"
    )


def _of_machine(seen: ProbeResults, rank: int, answer: Mapping[str, Any]) -> Iterable[Finding]:
    host = seen.hosts[rank]
    for key, asked in answer["missing"].items():
        yield fail(
            f"{host}: {key}={asked}, and there is no such interface",
            "name one of `ip link`, or unset it",
            [rank],
        )
    if seen.num_machines > 1:
        yield from _between(rank, host, answer, is_first=host == seen.hosts[0])
        yield from _infiniband(rank, host, answer["infiniband"])


def _between(
    rank: int, host: str, answer: Mapping[str, Any], *, is_first: bool
) -> Iterable[Finding]:
    """What matters where ranks of other machines must be reached."""
    ports = answer["infiniband"].values()
    is_own = answer["master"].startswith("127.") or answer["master"] == "localhost"
    if is_own or (answer["master"] and not is_first and answer["interface"] is None):
        yield fail(
            f"{host}: MASTER_ADDR={answer['master']} is this machine's own loopback",
            "set it to the first machine's name or address",
            [rank],
        )
    elif answer["is_cuda"] and 0 < answer["mbit"] < _SLOW_MBIT and "ACTIVE" not in ports:
        yield warn(
            f"{host}: {answer['interface']} has {answer['mbit']:,} Mb/s and no InfiniBand port is "
            "active",
            "name a faster interface in NCCL_SOCKET_IFNAME, or plan for it (docs/speed.md)",
            [rank],
        )


def _infiniband(rank: int, host: str, ports: Mapping[str, str]) -> Iterable[Finding]:
    down = [port for port, state in ports.items() if state != "ACTIVE"]
    if down and len(down) < len(ports):
        yield warn(
            f"{host}: InfiniBand ports {', '.join(down)} are not active",
            "leave them out with NCCL_IB_HCA=^..., or tell the administrator",
            [rank],
        )
