"""Fixtures of several files: a base with several shards, and an adapter for it."""

import shutil
from pathlib import Path

import pytest

from tests.adapter.merged import make_pair


@pytest.fixture(scope="session")
def unchanged_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "untied-shards")


@pytest.fixture
def pair(unchanged_pair, tmp_path):
    """Folder with a base and an adapter, which a test may change."""
    return Path(shutil.copytree(unchanged_pair, tmp_path / "pair"))
