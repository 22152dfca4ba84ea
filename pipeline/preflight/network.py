"""Checks of the network, without torch: ranks on hosts, rendezvous port, interface, InfiniBand."""

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster.rendezvous import interface_towards
from pipeline.commands import DOCS
from pipeline.errors import UserError
from pipeline.preflight.check import Check, Finding, ProbeResults, fail, ok, warn
from pipeline.preflight.context import RankContext

_INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_INFINIBAND = Path("/sys/class/infiniband")
# On slower networks even the reduction of adapter gradients takes noticeable time (docs/speed.md).
_MIN_MBIT_PER_S = 10_000


def _probe_ranks(context: RankContext) -> dict[str, Any]:
    """Name of the launcher, and index of the node to which it assigned this rank."""
    placement = context.placement
    return {
        "launcher": placement.launcher,
        "node": placement.rank // placement.local_size,
    }


def _assess_ranks(results: ProbeResults) -> Iterable[Finding]:
    """Compare the nodes of the launcher's numbering with the host names of the ranks."""
    hosts_by_node: dict[int, set[str]] = {}
    for rank, result in results.by_rank.items():
        hosts_by_node.setdefault(result["node"], set()).add(results.hosts[rank])
    for node, hosts in hosts_by_node.items():
        if len(hosts) > 1:
            yield fail(
                f"the launcher assigned ranks of one node (number {node}) to several hosts: "
                f"{', '.join(sorted(hosts))}",
                "start the same number of ranks on every node",
            )
            return
    num_hosts = len(set[str]().union(*hosts_by_node.values()))
    if num_hosts < len(hosts_by_node):
        yield warn(
            f"the plan is for {len(hosts_by_node)} nodes, but the ranks run on {num_hosts} hosts",
            "check the hostfile or the node list, unless you started several nodes per host on "
            "purpose",
        )
        return
    num_ranks = len(results.hosts)
    host_names = ", ".join(dict.fromkeys(results.hosts))
    plural = "s" if num_ranks > 1 else ""
    yield ok(f"{num_ranks} rank{plural} on {host_names} ({results.first['launcher']})")


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
    """The interface through which this node reaches rank 0's node, and its InfiniBand ports.

    Also the interfaces that environment variables name and that do not exist. Raises UserError if
    this node cannot resolve MASTER_ADDR.
    """
    address = context.placement.master_addr
    try:
        socket.getaddrinfo(address or None, 9)  # any port; only the address is resolved
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
    """Environment variables that name only interfaces that do not exist, with their values.

    Gloo's variable is a list of interface names, separated by commas. NCCL's variable is a list of
    prefixes, or, if it begins with `=`, of names, or, if it begins with `^`, of interfaces to avoid
    (NCCL documentation, environment variables). `existing`: names of this node's interfaces.
    """
    missing = {}
    for variable in _INTERFACE_VARIABLES:
        value = env.get(variable, "")
        if not value or value.startswith("^"):
            continue
        names = tuple(name.strip() for name in value.lstrip("=").split(",") if name.strip())
        if value.startswith("=") or variable.startswith("GLOO"):
            exists = any(interface in names for interface in existing)
        else:
            exists = any(interface.startswith(names) for interface in existing)
        if not exists:
            missing[variable] = value
    return missing


def infiniband_ports(folder: Path) -> dict[str, str]:
    """State of each port of each InfiniBand adapter, e.g. {"mlx5_0:1": "ACTIVE"}.

    `folder`: /sys/class/infiniband, with files such as mlx5_0/ports/1/state: `4: ACTIVE`.
    """
    states = {}
    for path in sorted(folder.glob("*/ports/*/state")):
        adapter, port = path.parents[2].name, path.parent.name
        states[f"{adapter}:{port}"] = path.read_text().strip().partition(": ")[2]
    return states


def _assess_network(results: ProbeResults) -> Iterable[Finding]:
    findings = [finding for rank in results.by_rank for finding in _assess_node(results, rank)]
    if findings:
        yield from findings
        return
    # Rank 0's node reaches itself through the loopback, so another node's interface is shown.
    other_nodes = [result for result in results.by_rank.values() if result["interface"]]
    network = other_nodes[0] if other_nodes else results.first
    num_active = sum(state == "ACTIVE" for state in network["infiniband"].values())
    infiniband = f", InfiniBand: {num_active} active ports" if num_active else ""
    if not network["master"]:
        yield ok(f"the address of rank 0's node is known after the rendezvous{infiniband}")
        return
    speed = f" ({network['mbit']:,} Mb/s)" if network["mbit"] > 0 else ""
    interface = network["interface"] or "the loopback"
    yield ok(f"{network['master']} is reached through {interface}{speed}{infiniband}")


def _assess_node(results: ProbeResults, rank: int) -> Iterable[Finding]:
    """Problems of the node on which this rank runs."""
    host, network = results.hosts[rank], results.by_rank[rank]
    for variable, value in network["missing"].items():
        yield fail(
            f"{host}: {variable}={value}, but this interface does not exist",
            "name an interface that `ip link` lists, or unset the variable",
            [rank],
        )
    if results.num_nodes == 1:
        return
    address, ports = network["master"], network["infiniband"]
    is_loopback = address.startswith("127.") or address == "localhost"
    if address and host != results.hosts[0] and network["interface"] is None:
        is_loopback = True  # the name resolves to this node, although rank 0 is on another
    is_slow = network["is_cuda"] and 0 < network["mbit"] < _MIN_MBIT_PER_S
    if is_loopback:
        yield fail(
            f"{host}: MASTER_ADDR={address} is this node's own loopback",
            "set it to the name or address of the first node",
            [rank],
        )
    elif is_slow and "ACTIVE" not in ports.values():
        yield warn(
            f"{host}: {network['interface']} has {network['mbit']:,} Mb/s and no InfiniBand port "
            "is active",
            "name a faster interface in NCCL_SOCKET_IFNAME, or plan for this rate "
            f"({DOCS}/speed.md)",
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
