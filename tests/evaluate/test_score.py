"""Scoring refuses a base other than the one that the adapter was trained on."""

import json

import pytest

from pipeline.adapter.trained_on import TRAINED_ON
from pipeline.evaluate import score
from pipeline.model.fingerprint import base_fingerprint
from tests.messages import refused
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor


def test_a_base_that_differs_in_one_byte_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base")
    (tmp_path / "run/adapter").mkdir(parents=True)
    record = {"base": "org/name", "fingerprint": base_fingerprint(base).as_json()}
    (tmp_path / "run/adapter" / TRAINED_ON).write_text(json.dumps(record))
    settings = make_plan(base, eval_data=0.5).settings
    (shard,) = base.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(score, "load_base", None)
    with refused(base, "1 of", "model."):
        score.score_run(tmp_path / "run", settings, 1)
