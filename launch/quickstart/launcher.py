"""Command line of DeepSpeed's launcher on this machine."""

import socket

from pipeline.plan.given.hardware import Hardware

_DEFAULT_PORT = 29500  # of DeepSpeed's launcher


def launcher(hardware: Hardware) -> str:
    """`deepspeed` with options for two ranks, or for one rank on a machine with a single GPU."""
    ranks = 2 if hardware.kind == "cpu" else min(2, hardware.devices_per_node)
    return f"deepspeed --quiet --num_accelerators {ranks}{_port_option()}"


def _port_option() -> str:
    """The option --master_port with a free port, if the default port is used; otherwise empty."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", _DEFAULT_PORT))
        except OSError:
            probe.bind(("", 0))
            return f" --master_port {probe.getsockname()[1]}"
    return ""
