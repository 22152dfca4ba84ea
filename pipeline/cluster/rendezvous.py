"""Rendezvous: all ranks connect to the key-value store of rank 0, before the process group."""

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
_PORTS_TO_TRY = 8
_PROBE_S = 1.0
_MAX_ANSWER = 200  # characters to read from a port, on which another program may be listening


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

    By default gloo resolves the host name of this node, which may give the loopback address. On the
    first node MASTER_ADDR may also be the loopback address (127.0.1.1 on Debian). So another node
    sends the address at which it reaches the first node, and the first node uses the interface
    that has this address.
    """
    key = "address-of-the-first-node"
    if placement.rank >= placement.local_size:
        store.set(key, _resolved(placement.master_addr)[1][0])
        return interface_towards(placement.master_addr)
    store.wait([key], _TIMEOUT)
    return _interface_with(store.get(key).decode())


def interface_towards(address: str) -> str | None:
    """The network interface through which this node reaches an address; None for the loopback."""
    try:
        family, socket_address = _resolved(address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(socket_address)  # for a datagram socket this sends nothing
            return _interface_with(probe.getsockname()[0])
    except OSError:
        return None


def _resolved(address: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    family, *_, socket_address = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    return family, socket_address


def _interface_with(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            return None if name == "lo" else name
    return None


def _store_at_port(placement: Placement) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, which torchrun's agent may serve already."""
    import torch.distributed as dist

    try:
        rendezvous = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", placement.rank, placement.world_size, timeout=_TIMEOUT
        )
        return next(iter(rendezvous))[0]
    except dist.DistNetworkError as error:
        if not _is_in_use(error):
            raise
        raise UserError(
            f"MASTER_PORT={placement.master_port} is in use on this node, perhaps by another run; "
            "choose another port for the launcher (--master_port)"
        ) from None


def _store_at_derived_port(placement: Placement) -> tuple[Any, int]:
    """The store of rank 0 at any free port.

    The other ranks learn this port from a listener of rank 0, whose port every rank derives from
    the job. Raises RankZeroError on a rank that gets no answer from rank 0 in time.
    """
    import torch.distributed as dist

    if placement.rank == 0:
        listener = _listener(placement)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            placement.master_addr, 0, placement.world_size, is_master=True,
            timeout=_TIMEOUT, wait_for_workers=False,
        )  # fmt: skip
        answer = f"{placement.rendezvous_id}\n{store.port}\n".encode()
        threading.Thread(
            target=_answer_all, args=(listener, answer), name="rendezvous", daemon=True
        ).start()
        return store, int(store.port)
    port = _ask_for_port(placement)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        placement.master_addr, port, placement.world_size, is_master=False,
        timeout=_TIMEOUT, wait_for_workers=False,
    )  # fmt: skip
    return store, port


def _listener(placement: Placement) -> socket.socket:
    """The listener of rank 0, at the first free port in the list that every rank tries."""
    ports = ports_after(placement.master_port, _PORTS_TO_TRY)
    is_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_both else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=placement.world_size, dualstack_ipv6=is_both
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


def _ask_for_port(placement: Placement) -> int:
    """The store's port, from the first listener that answers with this rendezvous id."""
    ports = ports_after(placement.master_port, _PORTS_TO_TRY)
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        for port in ports:
            with suppress(OSError, ValueError):  # no listener yet, or one of another program
                address = (placement.master_addr, port)
                with socket.create_connection(address, timeout=_PROBE_S) as connection:
                    answer = connection.makefile(encoding="utf-8").read(_MAX_ANSWER)
                    rendezvous_id, store_port, _ = answer.split("\n")
                    if rendezvous_id == placement.rendezvous_id:
                        return int(store_port)
        time.sleep(_PROBE_S)
    raise RankZeroError(
        f"rank {placement.rank} on {socket.gethostname()} got no answer from rank 0 on "
        f"{placement.master_addr}, port {ports[0]}, within {_TIMEOUT}; check that rank 0 has "
        "started and that no firewall separates these nodes"
    )


def _is_in_use(error: BaseException) -> bool:
    return "EADDRINUSE" in str(error)


def _require_resolvable(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: {socket.gethostname()} cannot resolve this name ({error}); "
            "set MASTER_ADDR to the address of the first node"
        ) from None


def address_by_mpi(placement: Placement) -> tuple[str, int]:
    """Name of rank 0's node and a free port of it, broadcast through MPI. Collective.

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
    own = None
    if placement.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = placement.master_port or probe.getsockname()[1]
        address = "127.0.0.1" if placement.nodes == 1 else socket.gethostname()
        own = (placement.master_addr or address, port)
    address, port = world.bcast(own)
    MPI.Finalize()
    return str(address), int(port)
