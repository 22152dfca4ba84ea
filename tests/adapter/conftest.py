"""Fixtures of several files: a base with several shards, and an adapter for it."""

import shutil
from pathlib import Path

import pytest

from tests.adapter.merged import make_pair


@pytest.fixture(scope="session")
def unchanged_pair(tmp_path_factory):
    """Folder with the folders base and adapter, which no test may change."""
    return make_pair(tmp_path_factory.mktemp("pair"), "untied-shards")


@pytest.fixture
def pair(unchanged_pair, tmp_path):
    """Folder with the folders base and adapter, which a test may change."""
    return Path(shutil.copytree(unchanged_pair, tmp_path / "pair"))
