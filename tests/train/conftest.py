"""Fixtures of the tests of training: model folders, and a run folder to start runs in."""

import pytest

from pipeline.train.folder import open_run
from pipeline.train.start import decide_start
from tests.model.models import build, cache_shape
from tests.models.kinds import ALL
from tests.tiny import make_plan, make_tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Function: name of a small model in tests/models/kinds.py -> its model folder.

    The parameter counts of the model are in the cache of class_shape.py, so that making a plan
    starts no subprocess.
    """
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "model"
            build(kind, kinds=ALL).save_pretrained(folders[kind])
            make_tokenizer().save_pretrained(folders[kind])
            cache_shape(folders[kind])
        return folders[kind]

    return make


@pytest.fixture
def begin(tmp_path, tiny_model):
    """A run folder, and the function `start(**settings)`, which opens it as for a training run.

    `start` returns the decision (new, resume or done) and trains nothing.
    """
    folder = tmp_path / "run"

    def start(is_debug: bool = False, **settings) -> str:
        plan = make_plan(tiny_model, **settings)
        decision = decide_start(folder, plan, is_debug=is_debug)
        open_run(folder, plan, decision, is_debug=is_debug)
        return decision

    return folder, start
