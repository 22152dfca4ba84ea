"""The probes of tokenizer and rows of preflight."""

from dataclasses import replace
from shutil import copytree

import pytest

from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.model.tensor_files import weight_files
from pipeline.preflight import inputs
from pipeline.preflight.context import RankContext
from tests.messages import refused
from tests.plans import CPU
from tests.tiny import make_plan, make_rows

pytestmark = pytest.mark.tensor


@pytest.fixture
def context(tiny_model, tmp_path):
    """The context of a run on 64 rows."""
    make_rows(tmp_path / "train.jsonl", 64)
    plan = make_plan(tiny_model, train_data=str(tmp_path / "train.jsonl"), max_length=128)
    placement = Placement()
    return RankContext(
        placement=placement, hardware=CPU, session=Session(placement, CPU), settings=plan.settings,
        plan=plan,
    )  # fmt: skip


def test_a_tokenizer_of_another_model_is_refused(context):
    tokens = inputs.TOKENIZER.probe(context)["tokens"]
    shape = replace(context.plan.shape, vocab_size=tokens - 1)
    other = replace(context, plan=replace(context.plan, shape=shape))
    with refused(f"{tokens} tokens", f"{tokens - 1} embeddings"):
        inputs.TOKENIZER.probe(other)


def test_rows_are_parsed_up_to_a_limit_of_bytes(context, monkeypatch):
    result = inputs.ROWS.probe(context)
    assert (result["all_rows_parsed"], result["documents"]) == (True, 32)
    assert result["supervised_tokens"] > 32
    monkeypatch.setattr(inputs, "_MAX_PARSED_BYTES", 100)
    assert not inputs.ROWS.probe(context)["all_rows_parsed"]
    monkeypatch.setattr(inputs, "_MAX_HASHED_BYTES", 100)
    assert inputs.ROWS.probe(context) == {
        "all_rows_parsed": False,
        "documents": 0,
        "supervised_tokens": 0,
    }


def test_bad_rows_at_the_end_of_the_data_are_refused(context, tmp_path):
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write("{\n" * 9)
    with refused("train.jsonl:65"):
        inputs.ROWS.probe(context)


def test_only_the_weight_files_that_transformers_loads_are_read(tiny_model, tmp_path):
    """Hub folders may also have the weights in the format of another program."""
    folder = copytree(tiny_model, tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes(b"not a tensor file")
    settings = make_plan(folder).settings
    context = RankContext(
        placement=Placement(), hardware=CPU, session=Session(Placement(), CPU), settings=settings
    )
    assert inputs.MODEL.probe(context)["files"] == 1


def test_weights_in_pickled_files_are_refused_with_the_conversion(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with refused(tmp_path, "pytorch_model.bin", "save_pretrained"):
        weight_files(tmp_path)
