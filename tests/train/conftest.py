"""Fixtures of the tests that train: model folders, each made once for a file of tests."""

import pytest

from tests.model.models import build, cache_shape
from tests.models.kinds import ALL
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The model folder of a kind, with its tokenizer and its shape in the cache."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "model"
            build(kind, kinds=ALL).save_pretrained(folders[kind])
            make_tokenizer().save_pretrained(folders[kind])
            cache_shape(folders[kind])
        return folders[kind]

    return make
