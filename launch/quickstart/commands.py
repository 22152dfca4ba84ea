"""Commands of the quickstart: the DeepSpeed launcher for this machine, and running a command."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from pipeline.plan.given.hardware import Hardware

_DEFAULT_PORT = 29500  # of DeepSpeed's launcher


def launcher_command(hardware: Hardware) -> str:
    """`deepspeed` with options for two ranks, or for one rank on a machine with a single GPU."""
    ranks = 2 if hardware.kind == "cpu" else min(2, hardware.devices_per_node)
    return f"deepspeed --quiet --num_accelerators {ranks}{_port_option()}"


def fp32_option(hardware: Hardware) -> str:
    """The option for fp32 on CPUs that multiply bf16 matrices slowly; otherwise empty."""
    return " bf16=false" if hardware.is_slow_in_bf16 else ""


def _port_option() -> str:
    """The option --master_port with a free port if the default port is in use; else empty."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", _DEFAULT_PORT))
        except OSError:
            probe.bind(("", 0))
            return f" --master_port {probe.getsockname()[1]}"
    return ""


def run_if_outdated(command: str, source: Path, output: Path) -> bool:
    """Run a command unless the file `output` is newer than `source`; returns whether it ran."""
    print(f"\n$ {command}", flush=True)
    if output.exists() and output.stat().st_mtime >= source.stat().st_mtime:
        print(f"  already done: {output}", flush=True)
        return False
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if code := subprocess.run(command.split(), env=environment, check=False).returncode:
        sys.exit(f"the command ended with exit code {code}")
    return True
