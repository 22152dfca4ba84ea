"""Fixtures of the tests of training: model folders, and a function that starts a run."""

import pytest

from tests.model.models import build, cache_shape
from tests.models.kinds import ALL
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that returns the model folder of a kind; its shape is in the cache."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "model"
            build(kind, kinds=ALL).save_pretrained(folders[kind])
            make_tokenizer().save_pretrained(folders[kind])
            cache_shape(folders[kind])
        return folders[kind]

    return make
