"""The quickstart also runs while another run on the machine uses DeepSpeed's default port."""

import importlib.util
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.plan.given.catalogue import cpu_of

pytestmark = pytest.mark.unit


@pytest.fixture
def commands():
    """The module launch/quickstart/commands.py, which is not in a package."""
    path = Path(__file__).parents[2] / "launch/quickstart/commands.py"
    spec = importlib.util.spec_from_file_location("quickstart_commands", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_port_is_used_only_if_the_default_port_is_taken(commands, monkeypatch):
    machine = cpu_of(num_cores=2, memory_bytes=2**30)
    with socket.create_server(("", 0)) as other_run:
        taken_port = other_run.getsockname()[1]
        monkeypatch.setattr(commands, "_DEFAULT_PORT", taken_port)
        command_line = commands.launcher_command(machine)
    without_port, _, port = command_line.partition(" --master_port ")
    assert port.isdigit()
    assert int(port) != taken_port
    assert commands.launcher_command(machine) == without_port  # the default port is free again


@pytest.mark.parametrize(("is_slow", "override"), [(True, " bf16=false"), (False, "")])
def test_only_a_cpu_that_is_slow_in_bf16_trains_in_fp32(commands, is_slow, override):
    machine = replace(cpu_of(num_cores=2, memory_bytes=2**30), is_slow_in_bf16=is_slow)
    assert commands.fp32_option(machine) == override


def test_a_command_runs_only_if_its_output_is_missing_or_older_than_its_input(commands, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.touch()
    assert commands.run_if_outdated(f"touch {output}", source, output)
    assert not commands.run_if_outdated("false", source, output)
    os.utime(source, (output.stat().st_mtime + 1,) * 2)
    with pytest.raises(SystemExit, match="exit code 1"):
        commands.run_if_outdated("false", source, output)
