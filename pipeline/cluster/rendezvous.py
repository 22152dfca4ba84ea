"""Where the ranks of a run meet: rank 0's key-value store, found by all before there is a group."""

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

# Machines of a job start at different times, and ranks on slow shared disks import for long.
_MEETING_TIMEOUT = timedelta(minutes=30)
_PORTS_TO_TRY = 8
_KNOCK_S = 1.0
_ANSWER = 200  # no more than that of what a stranger may say


def open_store(placement: Placement) -> tuple[Any, int]:
    """The store of this run's ranks and the port where it is; rank 0 holds it.

    Raises UserError where the port is taken or the first machine's name is not known here.
    """
    _require_resolvable(placement.master_addr)
    if placement.rendezvous_id:
        return _store_of_meeting(placement)
    return _store_at(placement), placement.master_port


def interface_between(store: Any, placement: Placement) -> str | None:
    """The network interface by which this machine and the others reach each other, if known.

    gloo takes the one that the machine's own name stands for, which may be the loopback: on the
    first machine MASTER_ADDR may be that as well (127.0.1.1, as Debian has it), so there it is the
    one with the address at which the others find it. Every rank calls it.
    """
    key = "address-of-the-first-machine"
    if placement.rank >= placement.local_size:
        store.set(key, _resolved(placement.master_addr)[1][0])
        return interface_towards(placement.master_addr)
    store.wait([key], _MEETING_TIMEOUT)
    return _interface_with(store.get(key).decode())


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address, if it leaves the machine."""
    try:
        family, where = _resolved(address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            return _interface_with(probe.getsockname()[0])
    except OSError:
        return None


def _resolved(address: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    family, *_, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    return family, where


def _interface_with(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return None if name == "lo" else name
    return None


def _store_at(placement: Placement) -> Any:
    """The store where the launcher said; torchrun's agent may hold it already."""
    import torch.distributed as dist

    try:
        where = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", placement.rank, placement.world_size, timeout=_MEETING_TIMEOUT
        )
        return next(iter(where))[0]
    except dist.DistNetworkError as error:
        if not _is_taken(error):
            raise
        raise UserError(
            f"MASTER_PORT={placement.master_port} on this machine is taken, perhaps by another "
            "run; give the launcher another one (--master_port)"
        ) from None


def _store_of_meeting(placement: Placement) -> tuple[Any, int]:
    """Rank 0 takes any free port for the store, and says which one at the port of the meeting.

    Raises RankZeroError on a rank that has not heard of rank 0 in time.
    """
    import torch.distributed as dist

    if placement.rank == 0:
        door = _door(placement)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            placement.master_addr, 0, placement.world_size, is_master=True,
            timeout=_MEETING_TIMEOUT, wait_for_workers=False,
        )  # fmt: skip
        answer = f"{placement.rendezvous_id}\n{store.port}\n".encode()
        threading.Thread(target=_answer_all, args=(door, answer), name="door", daemon=True).start()
        return store, int(store.port)
    port = _ask_for_port(placement)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        placement.master_addr, port, placement.world_size, is_master=False,
        timeout=_MEETING_TIMEOUT, wait_for_workers=False,
    )  # fmt: skip
    return store, port


def _door(placement: Placement) -> socket.socket:
    """Rank 0's ear at the first free port of those that all ranks know."""
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
        f"ports {', '.join(map(str, ports))} of {socket.gethostname()} are all taken; set "
        "MASTER_PORT to a free one"
    )


def _answer_all(door: socket.socket, answer: bytes) -> None:
    """To whoever asks, as long as this process lives: ranks may come late."""
    while True:
        caller, _ = door.accept()
        with caller, suppress(OSError):
            caller.sendall(answer)


def _ask_for_port(placement: Placement) -> int:
    """Go round the ports until one answers with the name of this meeting."""
    ports = ports_after(placement.master_port, _PORTS_TO_TRY)
    deadline = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        for port in ports:
            with suppress(OSError, ValueError):  # nobody there yet, or somebody else
                address = (placement.master_addr, port)
                with socket.create_connection(address, timeout=_KNOCK_S) as call:
                    name, found, _ = call.makefile(encoding="utf-8").read(_ANSWER).split("\n")
                    if name == placement.rendezvous_id:
                        return int(found)
        time.sleep(_KNOCK_S)
    raise RankZeroError(
        f"rank {placement.rank} on {socket.gethostname()} has not met rank 0 on "
        f"{placement.master_addr}, port {ports[0]}, in {_MEETING_TIMEOUT}; has rank 0 started, and "
        "may these machines reach each other's ports?"
    )


def _is_taken(error: BaseException) -> bool:
    return "EADDRINUSE" in str(error)


def _require_resolvable(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: {socket.gethostname()} does not know this name ({error}); set "
            "MASTER_ADDR to the address of the first machine"
        ) from None


def address_by_mpi(placement: Placement) -> tuple[str, int]:
    """Name of rank 0's machine and a port that is free there, from rank 0 to all.

    MPI is up for that alone and comes down again, or mpirun would take an exit for a crash.
    """
    try:
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py does not load: {str(error).splitlines()[0]}; "
            "`pip install 'rankzero[mpi]'`, and use the mpirun it brings or load the module that "
            "this one came from"
        ) from None
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (placement.rank, placement.world_size):
        raise UserError(
            f"mpirun says rank {placement.rank} of {placement.world_size}, mpi4py rank "
            f"{world.rank} of {world.size}: mpi4py has loaded another MPI than mpirun's "
            f"({MPI.Get_library_version().splitlines()[0]})"
        )
    is_one_machine = placement.nodes == 1
    mine = None
    if placement.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = placement.master_port or probe.getsockname()[1]
        address = "127.0.0.1" if is_one_machine else socket.gethostname()
        mine = (placement.master_addr or address, port)
    address, port = world.bcast(mine)
    MPI.Finalize()
    return str(address), int(port)
