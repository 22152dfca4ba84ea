"""The published adapter has the logits of the trained engine when plain peft loads it."""

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
from tests.train_tiny import build_engine, work

pytestmark = pytest.mark.engine

IDS = torch.arange(3, 35).reshape(2, 16)


def train_and_gather(session, folder, settings):
    plan, engine = build_engine(session, folder, settings)
    split = Documents()
    for step in range(3):
        batches, supervised = work(plan, split, step, session.placement.rank)
        engine.optimizer_step(batches, supervised, 4e-3)
    weights = gather_weights(engine.parameters, keep=session.is_rank_zero)
    engine.deepspeed.eval()
    with torch.no_grad():  # on every rank: at ZeRO-3 a forward pass is collective
        logits = engine.deepspeed.module.model(input_ids=IDS).logits
    return weights, logits


def published_logits(tmp_path, dtype, stage):
    """Logits of the trained engine, and of plain peft with default options.

    Without the fast paths the engine computes as peft does, so that the bits can be compared.
    """
    folder = make_model(tmp_path / "model", dtype=dtype)
    settings = {"zero_stage": stage, "bf16": dtype == "bfloat16", "batch_size": 2,
                "fast_paths": False}  # fmt: skip
    weights, logits = run_ranks(train_and_gather, folder, settings, tmp_path=tmp_path)[0]
    plan = make_plan(folder, 2, 40, **settings)
    out = tmp_path / "adapter"
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
def test_plain_peft_has_the_logits_of_the_engine_in_fp32(tmp_path, stage):
    logits, by_peft = published_logits(tmp_path, "float32", stage)
    assert torch.equal(by_peft, logits)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_peft_has_nearly_the_logits_of_the_engine_in_bf16(tmp_path, stage):
    """They are equal without autocast_adapter_dtype; by default peft computes in fp32."""
    logits, by_peft = published_logits(tmp_path, "bfloat16", stage)
    assert relative_error(by_peft, logits) <= 0.01


def relative_error(other: torch.Tensor, logits: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `logits`.

    Logits in bf16 are not compared one by one, because most of their differences are rounding.
    """
    return float((other - logits).float().norm() / logits.float().norm())
