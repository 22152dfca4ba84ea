"""Preflight's looks at tokenizer and rows."""

from dataclasses import replace

import pytest

from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.errors import UserError
from pipeline.preflight import content
from pipeline.preflight.context import RankContext
from tests.planning import CPU
from tests.tiny import make_plan, make_rows

pytestmark = pytest.mark.tensor


@pytest.fixture
def context(tiny_model, tmp_path):
    """A run on 64 rows."""
    make_rows(tmp_path / "train.jsonl", 64)
    plan = make_plan(tiny_model, train_data=str(tmp_path / "train.jsonl"), max_length=128)
    place = Placement()
    return RankContext(
        placement=place, hardware=CPU, session=Session(place, CPU), settings=plan.settings,
        plan=plan, beat=lambda where: None,
    )  # fmt: skip


def test_a_tokenizer_of_another_model_is_refused(context):
    tokens = content.probe_tokenizer(context)["tokens"]
    shape = replace(context.plan.shape, vocab_size=tokens - 1)
    other = replace(context, plan=replace(context.plan, shape=shape))
    with pytest.raises(UserError, match=rf"{tokens} tokens, the model {tokens - 1} embeddings; "):
        content.probe_tokenizer(other)


def test_rows_are_read_whole_or_the_first_of_them_or_none(context, monkeypatch):
    found = content.probe_rows(context)
    assert (found["is_whole"], found["documents"]) == (True, 32)
    assert found["supervised"] > 32
    monkeypatch.setattr(content, "_ALL_ROWS_BYTES", 100)
    assert not content.probe_rows(context)["is_whole"]
    monkeypatch.setattr(content, "_FIRST_ROWS_BYTES", 100)
    assert content.probe_rows(context) == {"is_whole": False, "documents": 0, "supervised": 0}


def test_bad_rows_are_refused_wherever_they_are(context, tmp_path):
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write("{\n" * 9)
    with pytest.raises(UserError, match=r"train\.jsonl:65"):
        content.probe_rows(context)
