"""What many tests share: models, made once a session, and how examples are drawn.

`make test` draws the same examples each time, so that a rare one fails on the change that brings
it; `pytest --hypothesis-profile=default` draws others.
"""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Llama with tied embeddings and a tokenizer; nobody may change it."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
