"""The published adapter has the logits of the trained engine when plain peft loads it."""

from functools import cache

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.publish import publish_adapter
from pipeline.model.base import DTYPES
from pipeline.model.fingerprint import base_fingerprint
from tests.ranks import run_ranks
from tests.tiny import Documents, make_model, make_plan
from tests.train_tiny import batches_of_step, build_engine

pytestmark = pytest.mark.engine

IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared


def train_and_gather(session, folder, settings):
    """The adapter after three steps, and the engine's logits of IDS."""
    plan, engine = build_engine(session, folder, settings)
    split = Documents()
    for step in range(3):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        engine.optimizer_step(batches, supervised, 4e-3)
    weights = gather_weights(engine.parameters, keep=session.is_rank_zero)
    engine.deepspeed.eval()
    with torch.no_grad():  # on every rank: at ZeRO-3 a forward pass is collective
        logits = engine.deepspeed.module.model(input_ids=IDS).logits
    return weights, logits


def settings_of(stage, dtype):
    """Without the fast paths the engine computes as peft does, so that bits can be compared."""
    return {"zero_stage": stage, "bf16": dtype == "bfloat16", "batch_size": 2, "fast_paths": False}


def train_at_each_stage(session, folder, dtype):
    return {s: train_and_gather(session, folder, settings_of(s, dtype)) for s in (1, 2, 3)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Function: dtype -> model folder, and adapter and logits by stage; the ranks start once."""

    @cache
    def train(dtype):
        folder = tmp_path_factory.mktemp("trained")
        model = make_model(folder / "model", dtype=dtype)
        return model, run_ranks(train_at_each_stage, model, dtype, tmp_path=folder)[0]

    return train


def published_logits(trained, out, dtype, stage):
    """Logits of the trained engine, and of plain peft with default options."""
    folder, by_stage = trained(dtype)
    weights, logits = by_stage[stage]
    plan = make_plan(folder, 2, 40, **settings_of(stage, dtype))
    publish_adapter(plan, weights, out, step=3, base=base_fingerprint(folder))

    def reloaded(**options) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        model = PeftModel.from_pretrained(base, out, **options).eval()
        with torch.no_grad():
            return model(input_ids=IDS).logits

    assert torch.equal(reloaded(autocast_adapter_dtype=False), logits)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])(input_ids=IDS)
    assert relative_error(base.logits, logits) > 0.02  # the adapter has learned
    return logits, reloaded()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_peft_has_the_logits_of_the_engine_in_fp32(trained, tmp_path, stage):
    logits, by_peft = published_logits(trained, tmp_path / "adapter", "float32", stage)
    assert torch.equal(by_peft, logits)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_peft_has_nearly_the_logits_of_the_engine_in_bf16(trained, tmp_path, stage):
    """They are equal without autocast_adapter_dtype; by default peft computes in fp32."""
    logits, by_peft = published_logits(trained, tmp_path / "adapter", "bfloat16", stage)
    assert relative_error(by_peft, logits) <= 0.01


def relative_error(other: torch.Tensor, logits: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `logits`.

    Logits in bf16 are not compared one by one, because most of their differences are rounding.
    """
    return float((other - logits).float().norm() / logits.float().norm())
