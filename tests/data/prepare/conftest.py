"""A fixture with a model folder, rows and settings to prepare."""

import pytest

from tests.data.prepare.preparation import Run
from tests.tiny import make_rows, make_tokenizer, tiny_config


@pytest.fixture
def run(tmp_path):
    """A folder with model/, train.jsonl and eval.jsonl, and settings for them."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_config(tokenizer).save_pretrained(tmp_path / "model")
    make_rows(tmp_path / "train.jsonl", 24)
    make_rows(tmp_path / "eval.jsonl", 6)
    return Run(tmp_path)
