"""Checks of the network: placement of ranks, rendezvous port, interface, InfiniBand. No torch."""

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster.rendezvous import interface_towards
from pipeline.errors import UserError
from pipeline.preflight.check import Check, Finding, ProbeResults, fail, ok, warn
from pipeline.preflight.context import RankContext

_INTERFACE_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_INFINIBAND = Path("/sys/class/infiniband")
# Mb/s. On slower networks even the reduction of adapter gradients takes noticeable time
# (docs/speed.md).
_SLOW_MBIT = 10_000


def _probe_ranks(context: RankContext) -> dict[str, Any]:
    """Launcher, node and local rank of this rank."""
    place = context.placement
    return {
        "launcher": place.launcher,
        "node": place.rank // place.local_size,
        "nodes": place.nodes,
        "local_rank": place.local_rank,
    }


def _assess_ranks(results: ProbeResults) -> Iterable[Finding]:
    hosts: dict[int, set[str]] = {}
    for rank, result in results.by_rank.items():
        hosts.setdefault(result["node"], set()).add(results.hosts[rank])
    for node, names in hosts.items():
        if len(names) > 1:
            yield fail(
                f"the launcher assigned ranks of one node (number {node}) to several hosts: "
                f"{', '.join(sorted(names))}",
                "start the same number of ranks on every node",
            )
            return
    num_names = len({name for names in hosts.values() for name in names})
    if num_names < len(hosts):
        yield warn(
            f"the plan is for {len(hosts)} nodes, but the ranks run on {num_names} hosts",
            "check the hostfile or the node list, unless you started several per host on purpose",
        )
        return
    count = len(results.hosts)
    listed = ", ".join(dict.fromkeys(results.hosts))
    yield ok(f"{count} rank{'s' * (count > 1)} on {listed} ({results.first['launcher']})")


def _probe_port(context: RankContext) -> str:
    """State of the rendezvous port. Raises UserError if another process uses it.

    Runs on rank 0 before the rendezvous, because afterwards this process itself listens there.
    """
    port = context.placement.master_port
    if context.placement.world_size == 1:
        return "one process, which needs no port"
    if port == 0 or context.placement.rendezvous_id:
        return "a free port is chosen at the rendezvous"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"{port}, in use by torchrun"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"rendezvous port {port} of {socket.gethostname()}: {error.strerror}; choose "
                "another port (deepspeed: --master_port, torchrun: --master-port, other launchers: "
                "MASTER_PORT)"
            ) from None
    return f"{port} is free"


def _assess_port(results: ProbeResults) -> Iterable[Finding]:
    yield ok(results.first)


def _probe_network(context: RankContext) -> dict[str, Any]:
    """The interface that leads to rank 0's node, missing interfaces, and InfiniBand ports.

    Raises UserError if this node cannot resolve MASTER_ADDR.
    """
    address = context.placement.master_addr
    try:
        socket.getaddrinfo(address or None, 9)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: {error.strerror}; set it to a name or an address that "
            f"{socket.gethostname()} can reach"
        ) from None
    # Under mpirun the address is not known before the rendezvous.
    name, stats = interface_towards(address) if address else None, psutil.net_if_stats()
    return {
        "master": address,
        "interface": name,
        "mbit": stats[name].speed if name in stats else 0,
        "missing": missing_interfaces(os.environ, list(stats)),
        "infiniband": infiniband_ports(_INFINIBAND),
        "is_cuda": context.hardware.kind == "cuda",
    }


def missing_interfaces(env: Mapping[str, str], existing: list[str]) -> dict[str, str]:
    """The environment variables, with values, that name only interfaces that do not exist.

    NCCL's variable is a list of prefixes; after `=` it is a list of exact names, after `^` a list
    of exclusions (NCCL documentation, environment variables). Gloo's is a list of exact names.
    """
    missing = {}
    for key in _INTERFACE_NAMES:
        value = env.get(key, "")
        if not value or value.startswith("^"):
            continue
        is_exact = value.startswith("=") or key.startswith("GLOO")
        names = [name.strip() for name in value.lstrip("=").split(",") if name.strip()]
        if not any(e == n if is_exact else e.startswith(n) for n in names for e in existing):
            missing[key] = value
    return missing


def infiniband_ports(folder: Path) -> dict[str, str]:
    """State of each port of each InfiniBand adapter as the kernel reports it, such as `ACTIVE`."""
    return {
        f"{path.parents[2].name}:{path.parent.name}": path.read_text().strip().partition(": ")[2]
        for path in sorted(folder.glob("*/ports/*/state"))
    }


def _assess_network(results: ProbeResults) -> Iterable[Finding]:
    findings = [f for rank in results.by_rank for f in _assess_node(results, rank)]
    if findings:
        yield from findings
        return
    # Rank 0's node reaches itself through the loopback, so another node's interface is shown.
    remote = [result for result in results.by_rank.values() if result["interface"]]
    network = remote[0] if remote else results.first
    active = sum(state == "ACTIVE" for state in network["infiniband"].values())
    fabric = f", InfiniBand: {active} active ports" if active else ""
    if not network["master"]:
        yield ok(f"the address of rank 0's node is known after the rendezvous{fabric}")
        return
    speed = f" ({network['mbit']:,} Mb/s)" if network["mbit"] > 0 else ""
    interface = network["interface"] or "the loopback"
    yield ok(f"{network['master']} is reached through {interface}{speed}{fabric}")


def _assess_node(results: ProbeResults, rank: int) -> Iterable[Finding]:
    host, network = results.hosts[rank], results.by_rank[rank]
    for key, value in network["missing"].items():
        yield fail(
            f"{host}: {key}={value}, but this interface does not exist",
            "name an interface that `ip link` lists, or unset the variable",
            [rank],
        )
    if results.num_nodes == 1:
        return
    address, ports = network["master"], network["infiniband"]
    is_loopback = address.startswith("127.") or address == "localhost"
    is_other_host = address and host != results.hosts[0]
    if is_loopback or (is_other_host and network["interface"] is None):
        yield fail(
            f"{host}: MASTER_ADDR={address} is this node's own loopback",
            "set it to the name or address of the first node",
            [rank],
        )
    elif network["is_cuda"] and 0 < network["mbit"] < _SLOW_MBIT and "ACTIVE" not in ports.values():
        yield warn(
            f"{host}: {network['interface']} has {network['mbit']:,} Mb/s and no InfiniBand port "
            "is active",
            "name a faster interface in NCCL_SOCKET_IFNAME, or plan for this rate (docs/speed.md)",
            [rank],
        )
    down = [port for port, state in ports.items() if state != "ACTIVE"]
    if down and len(down) < len(ports):
        yield warn(
            f"{host}: InfiniBand ports {', '.join(down)} are not active",
            "exclude these ports with NCCL_IB_HCA=^..., or inform the administrator",
            [rank],
        )


RANKS = Check(
    "ranks", _probe_ranks, _assess_ranks,
    "start the ranks with `deepspeed`, torchrun, srun or mpirun",
    needs="nothing",
)  # fmt: skip
PORT = Check(
    "port", _probe_port, _assess_port, "choose another port for the launcher", runs_on="rank 0",
    needs="nothing",
)  # fmt: skip
NETWORK = Check(
    "network", _probe_network, _assess_network, "ask the administrator about the network",
    runs_on="node", needs="nothing",
)  # fmt: skip
