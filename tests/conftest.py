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

os.environ["RANKZERO_CACHE"] = tempfile.mkdtemp(prefix="rankzero-tests-")  # subprocesses too
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Llama with tied embeddings and a tokenizer; nobody may change it."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
