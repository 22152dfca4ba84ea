"""The quickstart also runs while another run on the machine uses DeepSpeed's default port."""

import importlib.util
import socket
from pathlib import Path

import pytest

from pipeline.plan.given.catalogue import cpu_of

pytestmark = pytest.mark.unit


@pytest.fixture
def launcher():
    """The module launch/quickstart/launcher.py, which is not in a package."""
    path = Path(__file__).parents[2] / "launch/quickstart/launcher.py"
    spec = importlib.util.spec_from_file_location("launcher", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_port_is_used_only_if_the_default_port_is_taken(launcher, monkeypatch):
    machine = cpu_of(num_cores=2, memory_bytes=2**30)
    with socket.create_server(("", 0)) as other_run:
        taken_port = other_run.getsockname()[1]
        monkeypatch.setattr(launcher, "_DEFAULT_PORT", taken_port)
        command_line = launcher.launcher(machine)
    without_port, _, port = command_line.partition(" --master_port ")
    assert port.isdigit()
    assert int(port) != taken_port
    assert launcher.launcher(machine) == without_port  # the default port is free again
