"""The quickstart also runs while another run on the machine uses DeepSpeed's default port."""

import importlib.util
import socket
from pathlib import Path

import pytest

from pipeline.plan.given.catalogue import cpu_of

pytestmark = pytest.mark.unit


@pytest.fixture
def launcher():
    path = Path(__file__).parents[2] / "launch/quickstart/launcher.py"
    spec = importlib.util.spec_from_file_location("launcher", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_port_is_used_only_if_the_default_port_is_taken(launcher, monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(launcher, "_DEFAULT_PORT", port)
        command, _, free_port = launcher.launcher(cpu_of(2, 2**30)).partition(" --master_port ")
        assert free_port.isdigit()
        assert int(free_port) != port
    assert launcher.launcher(cpu_of(2, 2**30)) == command
