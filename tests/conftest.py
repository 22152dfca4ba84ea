"""Model folders that many tests share, made once a session."""

from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Llama with tied embeddings and a tokenizer; nobody may change it."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
