"""Fixtures of all tests: the tiny model, environment variables, Hypothesis profile, test order.

Hypothesis generates the same examples in every run of the suite, so that a rare failure appears
with the change that causes it. `pytest --hypothesis-profile=default` generates random examples.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest

from pipeline.plan.given import torch_process
from tests.tiny import make_model

# Two xdist workers with a thread for every core would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A variable, unlike a fixture, also keeps child processes from the user's cache.
os.environ["RANKZERO_CACHE"] = tempfile.mkdtemp(prefix="rankzero-tests-")
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# The variables by which torchrun and DeepSpeed's launcher tell a process its rank.
_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher_variables():
    """Unset variables that a training run in this process sets: child processes inherit them."""
    for name in _LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    yield
    for name in _LAUNCHER_VARIABLES:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    """Run slow tests first, so that both xdist workers end at about the same time."""
    slowest_first = ["e2e", "engine", "group", "tensor"]

    def position(item):
        has_marker = [item.get_closest_marker(marker) is not None for marker in slowest_first]
        return has_marker.index(True) if any(has_marker) else len(slowest_first)

    items.sort(key=position)


class _SubprocessByFork:
    """Replaces the module `subprocess` in torch_process.py: runs the command in a fork."""

    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def run(command, *, timeout, env, **_):
        from tests.commands import Command

        with Command(*command[1:], variables=[env]) as forked:
            code, _ = forked.wait_for_end(timeout)
            return subprocess.CompletedProcess(command, code, *forked.outputs[0])


@pytest.fixture(scope="session", autouse=True)
def _torch_processes_are_forked():
    """Fork the processes that build a model class: inherited modules save 5 s for each process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_process, "subprocess", _SubprocessByFork)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a tiny fp32 Llama with tied embeddings, and a tokenizer: read only."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
