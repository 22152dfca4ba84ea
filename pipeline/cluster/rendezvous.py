"""Rendezvous: all ranks connect to torch's key-value store (TCPStore), which rank 0 serves.

It comes before the process group, which uses the store. If the launcher gives no port, each rank
computes the same list of ports from the number of the Slurm job. Rank 0 listens on the first free
port of this list, and answers with the port of its store.
"""

import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil

from pipeline.cluster.placement import Placement
from pipeline.cluster.tasks import ports_after
from pipeline.errors import RankZeroError, UserError

# Nodes of a job start at different times, and imports from slow shared disks take minutes.
_TIMEOUT = timedelta(minutes=30)
_NUM_PORTS_TO_TRY = 8
_PROBE_S = 1.0  # time limit of one connection to a port, and pause between two searches
_MAX_ANSWER_CHARACTERS = 200  # limit, because another program may listen on the port


def open_store(placement: Placement) -> tuple[Any, int]:
    """Connect to the key-value store of rank 0, and return the store and its port.

    Raises UserError if the port is in use or this node cannot resolve the name of rank 0's node.
    """
    _require_resolvable(placement.master_addr)
    if placement.rendezvous_id:
        return _store_at_derived_port(placement)
    return _store_at_port(placement), placement.master_port


def interface_between(store: Any, placement: Placement) -> str | None:
    """The network interface that leads from this node to the others; None if unknown. Collective.

    gloo needs it: by default gloo resolves the host name of this node, which may give the loopback
    address. On the first node MASTER_ADDR may also resolve to the loopback address (127.0.1.1 on
    Debian). So another node sends the address at which it reaches the first node, and the first
    node uses the interface that has this address.
    """
    key = "address-of-the-first-node"
    if placement.rank >= placement.local_size:
        _, (address, *_) = _resolve(placement.master_addr)
        store.set(key, address)
        return interface_towards(placement.master_addr)
    store.wait([key], _TIMEOUT)
    return _interface_with_address(store.get(key).decode())


def interface_towards(address: str) -> str | None:
    """The network interface through which this node reaches an address; None for the loopback."""
    try:
        family, socket_address = _resolve(address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # For a datagram socket this only chooses the interface; nothing is sent.
            probe.connect(socket_address)
            return _interface_with_address(probe.getsockname()[0])
    except OSError:
        return None


def _resolve(name: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Address family, and (address, port, ...), of a host name or address; the port is any."""
    family, *_, socket_address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
    return family, socket_address


def _interface_with_address(address: str) -> str | None:
    """The interface of this node that has the address; None for the loopback, or if none has."""
    for name, interface_addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in interface_addresses):
            return None if name == "lo" else name
    return None


def _store_at_port(placement: Placement) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT; under torchrun, its agent may serve this store."""
    import torch.distributed as dist

    try:
        rendezvous = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", placement.rank, placement.world_size, timeout=_TIMEOUT
        )
        return next(iter(rendezvous))[0]
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={placement.master_port} is in use on this node, perhaps by another run; "
            "choose another port for the launcher (--master_port)"
        ) from None


def _store_at_derived_port(placement: Placement) -> tuple[Any, int]:
    """The store of rank 0 at any free port, and this port.

    The other ranks get this port from a listener of rank 0, whose port every rank computes from the
    number of the job. Raises RankZeroError on a rank that gets no answer from rank 0 in time.
    """
    import torch.distributed as dist

    if placement.rank == 0:
        listener = _open_listener(placement)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            placement.master_addr, 0, placement.world_size, is_master=True,
            timeout=_TIMEOUT, wait_for_workers=False,
        )  # fmt: skip
        answer = f"{placement.rendezvous_id}\n{store.port}\n".encode()
        threading.Thread(
            target=_answer_all, args=(listener, answer), name="rendezvous", daemon=True
        ).start()
        return store, int(store.port)
    port = _request_store_port(placement)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        placement.master_addr, port, placement.world_size, is_master=False,
        timeout=_TIMEOUT, wait_for_workers=False,
    )  # fmt: skip
    return store, port


def _open_listener(placement: Placement) -> socket.socket:
    """Listen on rank 0, at the first free port in the list that every rank tries."""
    ports = ports_after(placement.master_port, _NUM_PORTS_TO_TRY)
    dual_stack = socket.has_dualstack_ipv6()  # one socket for IPv4 and IPv6
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=placement.world_size, dualstack_ipv6=dual_stack
            )
        except OSError:
            continue
    raise UserError(
        f"ports {', '.join(map(str, ports))} of {socket.gethostname()} are all in use; set "
        "MASTER_PORT to a free port"
    )


def _answer_all(listener: socket.socket, answer: bytes) -> None:
    """Answer every connection until this process ends, because ranks may connect late."""
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(answer)


def _request_store_port(placement: Placement) -> int:
    """The store's port, from the first listener that answers with this rendezvous id."""
    ports = ports_after(placement.master_port, _NUM_PORTS_TO_TRY)
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        for port in ports:
            with suppress(OSError, ValueError):  # no listener yet, or one of another program
                address = (placement.master_addr, port)
                with socket.create_connection(address, timeout=_PROBE_S) as connection:
                    answer = connection.makefile(encoding="utf-8").read(_MAX_ANSWER_CHARACTERS)
                    rendezvous_id, store_port, _ = answer.split("\n")
                    if rendezvous_id == placement.rendezvous_id:
                        return int(store_port)
        time.sleep(_PROBE_S)
    raise RankZeroError(
        f"rank {placement.rank} on {socket.gethostname()} got no answer from rank 0 on "
        f"{placement.master_addr}, port {ports[0]}, within {_TIMEOUT}; check that rank 0 has "
        "started and that no firewall separates these nodes"
    )


def _require_resolvable(address: str) -> None:
    """Raise UserError if this node cannot resolve a host name."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: {socket.gethostname()} cannot resolve this name ({error}); "
            "set MASTER_ADDR to the address of the first node"
        ) from None


def address_by_mpi(placement: Placement) -> tuple[str, int]:
    """Name of rank 0's node, and a free port there, broadcast through MPI. Collective.

    MPI is finalised afterwards, because mpirun reports an exit without MPI_Finalize as a crash.
    """
    try:
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py cannot be loaded: {str(error).splitlines()[0]}; run "
            "`pip install 'rankzero[mpi]'` and use the mpirun that it installs, or load the module "
            "of the mpirun that started this process"
        ) from None
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (placement.rank, placement.world_size):
        raise UserError(
            f"mpirun: rank {placement.rank} of {placement.world_size}, mpi4py: rank "
            f"{world.rank} of {world.size}: mpi4py loaded another MPI library "
            f"({MPI.Get_library_version().splitlines()[0]}) than mpirun; load the module of this "
            "mpirun"
        )
    chosen = None
    if placement.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = placement.master_port or probe.getsockname()[1]
        address = "127.0.0.1" if placement.nodes == 1 else socket.gethostname()
        chosen = (placement.master_addr or address, port)
    address, port = world.bcast(chosen)
    MPI.Finalize()
    return str(address), int(port)
