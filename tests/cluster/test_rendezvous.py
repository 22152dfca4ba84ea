"""Rendezvous of ranks where no launcher has reserved a port."""

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
    """Ranks whose first ports can be bound here."""
    for port in range(15_000, 30_000, 97):
        try:
            for tried in ports_after(port, count):
                socket.create_server(("", tried)).close()
        except OSError:
            continue
        return replace(RANK_0, master_port=port)
    raise AssertionError("no free ports")


def meet(first: Placement) -> set[int]:
    """Open the store on all ranks, the last one first; the ports of their stores."""

    kept = []  # the store lives as long as rank 0 holds it

    def rank(number: int) -> int:
        store, port = open_store(replace(first, rank=number, local_rank=number))
        kept.append(store)
        store.set(f"here/{number}", "")
        store.wait([f"here/{other}" for other in range(first.world_size)])
        return port

    with ThreadPoolExecutor(first.world_size) as threads:
        return set(threads.map(rank, reversed(range(first.world_size))))


def test_late_ranks_reach_the_store_too():
    assert len(meet(placement_with_free_ports(1))) == 1


def test_two_runs_with_the_same_ports_have_a_store_each():
    first = placement_with_free_ports(2)
    second = replace(first, rendezvous_id="Slurm step 8.0")
    assert len(meet(first) | meet(second)) == 2


def test_ports_of_other_processes_are_skipped():
    """One is another run's store; one sends nothing, one closes, one sends without end."""
    first = placement_with_free_ports(5)
    ports = ports_after(first.master_port, 5)
    store = dist.TCPStore("127.0.0.1", ports[0], is_master=True, wait_for_workers=False)
    store.set("rendezvous_id", first.rendezvous_id)
    with ThreadPoolExecutor(2) as threads, ExitStack() as others:
        others.enter_context(socket.create_server(("", ports[1])))
        for port, words in ((ports[2], b""), (ports[3], b"x" * 10_000)):
            server = others.enter_context(socket.create_server(("", port)))
            threads.submit(talk, server, words)
            others.callback(server.shutdown, socket.SHUT_RDWR)
        assert len(meet(first)) == 1


def talk(server: socket.socket, words: bytes) -> None:
    while True:
        try:
            with server.accept()[0] as caller:
                caller.sendall(words)
        except OSError:
            return


def test_a_taken_port_of_the_launchers_is_refused(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = replace(RANK_0, launcher="deepspeed", master_port=port, rendezvous_id="")
        for name, value in place.variables().items():
            monkeypatch.setenv(name, value)
        with refused(f"MASTER_PORT={port}", "--master_port"):
            open_store(place)


def test_a_name_that_is_not_known_here_is_refused():
    with refused("MASTER_ADDR=node1.invalid", socket.gethostname()):
        open_store(replace(RANK_0, master_addr="node1.invalid"))


def test_mpirun_without_mpi4py_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    with refused("mpi4py", "pip install 'rankzero[mpi]'"):
        address_by_mpi(replace(RANK_0, launcher="mpirun", master_addr="", master_port=0))


def test_an_interface_is_named_where_a_route_leads_out():
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("node1.invalid") is None
    out = {name for name in psutil.net_if_addrs() if name != "lo"}
    way = interface_towards("192.0.2.1")  # RFC 5737: no host has it, and nothing is sent
    assert way is None or way in out


def test_the_first_node_takes_the_interface_that_the_others_reach_it_by(monkeypatch):
    """Its own name may be the loopback there, as on Debian."""
    there = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["10.0.1.1"]}
    known = {name: [SimpleNamespace(address=a) for a in found] for name, found in there.items()}
    monkeypatch.setattr("pipeline.cluster.rendezvous.psutil.net_if_addrs", lambda: known)
    store = dist.HashStore()
    two = replace(RANK_0, world_size=2, local_size=1, master_addr="10.0.1.1")
    interface_between(store, replace(two, rank=1))
    assert interface_between(store, replace(two, master_addr="127.0.0.1")) == "eth1"
