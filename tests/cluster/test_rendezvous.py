"""Rendezvous of ranks on a derived port, which another process may use.

srun and mpirun reserve no port; the ranks try several, and recognise their store by its id.
"""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from pipeline.cluster.placement import Placement
from pipeline.cluster.rendezvous import (
    address_by_mpi,
    interface_between,
    interface_towards,
    open_store,
)
from pipeline.cluster.tasks import ports_after
from tests.messages import refused

pytestmark = pytest.mark.group

RANK_0 = Placement(
    launcher="srun", world_size=3, local_size=3, master_port=15_000, rendezvous_id="Slurm step 7.0"
)


def placement_with_free_ports(count: int) -> Placement:
    """A placement of rank 0 whose first `count` ports are free on this machine."""
    for port in range(15_000, 30_000, 97):
        try:
            for tried in ports_after(port, count):
                socket.create_server(("", tried)).close()
        except OSError:
            continue
        return replace(RANK_0, master_port=port)
    raise AssertionError("no free ports")


def open_stores(first: Placement) -> set[int]:
    """Open the store on all ranks, the last rank first; returns the ports of their stores."""

    stores = []  # the store exists as long as rank 0 has a reference to it

    def open_on_rank(rank: int) -> int:
        store, port = open_store(replace(first, rank=rank, local_rank=rank))
        stores.append(store)
        store.set(f"opened/{rank}", "")
        store.wait([f"opened/{other}" for other in range(first.world_size)])
        return port

    with ThreadPoolExecutor(first.world_size) as threads:
        return set(threads.map(open_on_rank, reversed(range(first.world_size))))


def test_ranks_that_start_before_rank_0_reach_its_store():
    assert len(open_stores(placement_with_free_ports(1))) == 1


def test_two_runs_with_the_same_ports_have_separate_stores():
    first = placement_with_free_ports(2)
    second = replace(first, rendezvous_id="Slurm step 8.0")
    assert len(open_stores(first) | open_stores(second)) == 2


def test_ports_of_other_processes_are_skipped():
    """The ports have another run's store, and servers that send nothing, close, or send much."""
    first = placement_with_free_ports(5)
    ports = ports_after(first.master_port, 5)
    store = dist.TCPStore("127.0.0.1", ports[0], is_master=True, wait_for_workers=False)
    store.set("rendezvous_id", first.rendezvous_id)
    with ThreadPoolExecutor(2) as threads, ExitStack() as others:
        others.enter_context(socket.create_server(("", ports[1])))
        for port, data in ((ports[2], b""), (ports[3], b"x" * 10_000)):
            server = others.enter_context(socket.create_server(("", port)))
            threads.submit(answer_callers, server, data)
            others.callback(server.shutdown, socket.SHUT_RDWR)
        assert len(open_stores(first)) == 1


def answer_callers(server: socket.socket, data: bytes) -> None:
    """Send the data to each caller and close the connection, until the server is shut down."""
    while True:
        try:
            with server.accept()[0] as caller:
                caller.sendall(data)
        except OSError:
            return


def test_a_port_of_the_launcher_that_is_in_use_is_refused(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        placement = replace(RANK_0, launcher="deepspeed", master_port=port, rendezvous_id="")
        for name, value in placement.variables().items():
            monkeypatch.setenv(name, value)
        with refused(f"MASTER_PORT={port}", "--master_port"):
            open_store(placement)


def test_an_address_that_cannot_be_resolved_is_refused():
    with refused("MASTER_ADDR=node1.invalid", socket.gethostname()):
        open_store(replace(RANK_0, master_addr="node1.invalid"))


def test_mpirun_without_mpi4py_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    with refused("mpi4py", "pip install 'rankzero[mpi]'"):
        address_by_mpi(replace(RANK_0, launcher="mpirun", master_addr="", master_port=0))


def test_the_interface_on_the_route_to_the_address_is_used():
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("node1.invalid") is None
    interfaces = {name for name in psutil.net_if_addrs() if name != "lo"}
    interface = interface_towards("192.0.2.1")  # RFC 5737: no host has it, and nothing is sent
    assert interface is None or interface in interfaces


def test_the_first_node_uses_the_interface_by_which_others_reach_it(monkeypatch):
    """On Debian a host resolves its own name to the loopback address."""
    addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["10.0.1.1"]}
    by_interface = {
        name: [SimpleNamespace(address=address) for address in of_interface]
        for name, of_interface in addresses.items()
    }
    monkeypatch.setattr("pipeline.cluster.rendezvous.psutil.net_if_addrs", lambda: by_interface)
    store = dist.HashStore()
    on_two_nodes = replace(RANK_0, world_size=2, local_size=1, master_addr="10.0.1.1")
    interface_between(store, replace(on_two_nodes, rank=1))  # rank 1 records the address it uses
    on_first_node = replace(on_two_nodes, master_addr="127.0.0.1")
    assert interface_between(store, on_first_node) == "eth1"
