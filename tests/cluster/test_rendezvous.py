"""Ranks find each other where nobody has promised that a port is free."""

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
from pipeline.errors import UserError

pytestmark = pytest.mark.group

RANK_0 = Placement(
    launcher="srun", world_size=3, local_size=3, master_port=15_000, rendezvous_id="Slurm step 7.0"
)


def a_free_place(count: int) -> Placement:
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
    """Open the store on all ranks, the last one first; the ports that they found."""

    kept = []  # the store lives as long as rank 0 holds it

    def rank(number: int) -> int:
        store, port = open_store(replace(first, rank=number, local_rank=number))
        kept.append(store)
        store.set(f"here/{number}", "")
        store.wait([f"here/{other}" for other in range(first.world_size)])
        return port

    with ThreadPoolExecutor(first.world_size) as threads:
        return set(threads.map(rank, reversed(range(first.world_size))))


def test_ranks_meet_and_late_ones_too():
    assert len(meet(a_free_place(1))) == 1


def test_two_runs_of_the_same_ports_part():
    first = a_free_place(2)
    second = replace(first, rendezvous_id="Slurm step 8.0")
    assert len(meet(first) | meet(second)) == 2


def test_ports_that_others_hold_are_passed_over():
    """One is another run's store, one says nothing, one hangs up, one talks and talks."""
    first = a_free_place(5)
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


def test_a_taken_port_that_the_launcher_gave_is_said(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = replace(RANK_0, launcher="deepspeed", master_port=port, rendezvous_id="")
        for name, value in place.variables().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} on this machine is taken"):
            open_store(place)


def test_a_name_that_is_not_known_here_is_said():
    with pytest.raises(UserError, match=r"MASTER_ADDR=node1\.invalid: .* does not know this name"):
        open_store(replace(RANK_0, master_addr="node1.invalid"))


def test_mpirun_without_mpi4py_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"mpi4py.*pip install 'rankzero\[mpi\]'"):
        address_by_mpi(replace(RANK_0, launcher="mpirun", master_addr="", master_port=0))


def test_an_interface_is_named_where_a_way_leads_out():
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("node1.invalid") is None
    out = {name for name in psutil.net_if_addrs() if name != "lo"}
    way = interface_towards("192.0.2.1")  # RFC 5737: nobody is there, and nothing is sent
    assert way is None or way in out


def test_the_first_machine_takes_the_interface_that_the_others_reach_it_by(monkeypatch):
    """Its own name may be the loopback there, as on Debian."""
    there = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["10.0.1.1"]}
    known = {name: [SimpleNamespace(address=a) for a in found] for name, found in there.items()}
    monkeypatch.setattr("pipeline.cluster.rendezvous.psutil.net_if_addrs", lambda: known)
    store = dist.HashStore()
    two = replace(RANK_0, world_size=2, local_size=1, master_addr="10.0.1.1")
    interface_between(store, replace(two, rank=1))
    assert interface_between(store, replace(two, master_addr="127.0.0.1")) == "eth1"
