"""The published adapter gives, in plain peft, the logits that the trained model gave."""

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
    with torch.no_grad():  # every rank: at ZeRO-3 a forward gathers
        logits = engine.deepspeed.module.model(input_ids=IDS).logits
    return weights, logits


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_peft_gives_the_logits_of_the_trained_engine(tmp_path, dtype, stage):
    folder = make_model(tmp_path / "model", dtype=dtype)
    settings = {"zero_stage": stage, "bf16": dtype == "bfloat16", "batch_size": 2}
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
    default = reloaded()
    assert relative_error(default, logits) <= 0.01
    if dtype == "float32":
        assert torch.equal(default, logits)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])(input_ids=IDS)
    assert relative_error(plain.logits, logits) > 0.02  # it did learn


def relative_error(found: torch.Tensor, logits: torch.Tensor) -> float:
    """Norm of the difference over the norm; a single bf16 logit is mostly rounding."""
    return float((found - logits).float().norm() / logits.float().norm())
