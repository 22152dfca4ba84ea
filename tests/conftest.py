"""What many tests share: models, made once a session, and how examples are drawn.

`make test` draws the same examples each time, so that a rare one fails on the change that brings
it; `pytest --hypothesis-profile=default` draws others.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest

from pipeline.plan.given import torch_process
from tests.tiny import make_model

# Two workers, each with a thread for every core, would wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RANKZERO_CACHE"] = tempfile.mkdtemp(prefix="rankzero-tests-")  # subprocesses too
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher_variables():
    """A run in this process sets them for torch; processes of later tests must not inherit them."""
    for name in _LAUNCHER:
        os.environ.pop(name, None)
    yield
    for name in _LAUNCHER:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    """Slow tiers first: short files at the end keep both workers busy."""
    tiers = ("e2e", "engine", "group", "tensor")
    items.sort(key=lambda item: [item.get_closest_marker(tier) is None for tier in tiers])


class _Forks:
    """Stands in for the module `subprocess` where a plan runs a module with torch."""

    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def run(command, *, timeout, env, **_):
        from tests.commands import Command

        with Command(*command[1:], variables=[env]) as forked:
            code, _ = forked.end(timeout)
            return subprocess.CompletedProcess(command, code, *forked.outputs[0])


@pytest.fixture(scope="session", autouse=True)
def _classes_are_built_in_forks():
    """Counting or checking a model class takes its imports from the forkserver, not 5 s each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_process, "subprocess", _Forks)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Llama with tied embeddings and a tokenizer; nobody may change it."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
