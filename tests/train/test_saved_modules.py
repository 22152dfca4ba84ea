"""Embeddings and heads that are trained in full have plain peft's gradients, at every stage."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.adapter.gather import gather_moments, gather_weights
from pipeline.adapter.verify import verify_gradients
from pipeline.errors import RankZeroError
from pipeline.model import loss
from pipeline.model.adapter import attach_adapter, trainable
from pipeline.model.base import load_base
from pipeline.model.loss import IGNORED
from tests.messages import refused
from tests.ranks import run_ranks
from tests.tiny import Documents, make_model, make_plan
from tests.train_tiny import batches_of_step, build_engine, full_gradients

pytestmark = pytest.mark.engine

RUNS = {
    "zero2": {"zero_stage": 2, "batch_size": 2},
    "zero3 checkpointed": {"zero_stage": 3, "batch_size": 2, "gradient_checkpointing": True},
}
# Whether embeddings and head are tied in the base, and the setting `modules_to_save`.
MODULES = {
    "tied": (True, ["embed_tokens"]),
    "head": (False, ["lm_head"]),
    "embeddings": (False, ["embed_tokens"]),
}


def first_gradients(session, folder, modules, chunk_bytes):
    """Gradients of the first step in each of RUNS; fp32 masters and moments of a step in bf16.

    "masters" has those before and after the step. "moments" has those of the modules that are
    trained in full.
    """
    loss.LOGITS_CHUNK_BYTES = chunk_bytes
    gradients = {}
    for name, settings in RUNS.items():
        values = {"modules_to_save": modules} | settings
        plan, engine = build_engine(session, folder, values)
        batches, supervised = batches_of_step(plan, Documents(), 0, session.placement.rank)
        engine.deepspeed.train()
        engine.backward_passes(batches, supervised)
        gradients[name] = full_gradients(engine)
    plan, engine = build_engine(
        session, folder, {"zero_stage": 3, "bf16": True, "lr": 1e-6, "modules_to_save": modules}
    )
    before = gather_weights(engine.parameters, keep=True)
    batches, supervised = batches_of_step(plan, Documents(), 0, session.placement.rank)
    engine.optimizer_step(batches, supervised, 1e-6)
    after = gather_weights(engine.parameters, keep=True)
    fully_trained = {key: p for key, p in engine.parameters.items() if ".lora_" not in key}
    moments = gather_moments(fully_trained, keep=True)
    return {"gradients": gradients, "masters": (before, after), "moments": moments}


@pytest.fixture(scope="module", params=MODULES)
def run(request, tmp_path_factory):
    """The plan at ZeRO-2, and the results of `first_gradients` on two ranks."""
    tied, modules = MODULES[request.param]
    folder = tmp_path_factory.mktemp("saved")
    base = make_model(folder / "base", tied=tied)
    plan = make_plan(base, 2, 40, zero_stage=2, modules_to_save=modules)
    # Chunks of 12 tokens' fp32 logits: several in each micro-batch.
    chunk_bytes = 12 * 4 * plan.shape.vocab_size
    results = run_ranks(first_gradients, base, modules, chunk_bytes, tmp_path=folder)
    return plan, results[0]


def gradients_of_peft(plan):
    """Gradients of the mean loss of step 0, computed in one process from the model's logits."""
    model = attach_adapter(load_base(plan, torch.device("cpu")), plan)
    for batches, supervised in (batches_of_step(plan, Documents(), 0, rank) for rank in range(2)):
        for seeded in batches:
            batch = seeded.batch
            logits = model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1)
            targets = batch.labels[:, 1:].flatten()
            total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
            (total / supervised).backward()
    return {key: parameter.grad for key, parameter in trainable(model).items()}


def test_every_stage_has_the_gradients_of_plain_peft(run):
    plan, results = run
    expected = gradients_of_peft(plan)
    fully_trained = [key for key in expected if ".lora_" not in key]
    assert fully_trained
    assert all(expected[key].any() for key in fully_trained)
    for gradients in results["gradients"].values():
        assert gradients.keys() == expected.keys()
        for key in (*fully_trained, next(key for key in expected if "lora_B" in key)):
            torch.testing.assert_close(gradients[key], expected[key], rtol=1e-4, atol=1e-6)


def test_fully_trained_modules_have_fp32_masters_in_a_bf16_run(run):
    _, results = run
    before, after = results["masters"]
    for key in {name.rpartition("/")[0] for name in results["moments"]}:
        changed = (before[key] != after[key]).float().mean()
        is_rounded = torch.equal(after[key], after[key].bfloat16().float())
        assert changed > 0.05, key  # of embeddings, only the rows of tokens in the step change
        assert not is_rounded, key


def test_a_module_without_a_gradient_is_reported(run):
    _, results = run
    verify_gradients(results["moments"])
    untrained = {key: torch.zeros_like(moment) for key, moment in results["moments"].items()}
    with refused(min(untrained), error=RankZeroError):
        verify_gradients(untrained)


@pytest.mark.parametrize(
    ("is_tied", "modules", "is_on"),
    [
        (False, ["embed_tokens"], True),
        (False, ["lm_head"], False),
        (True, ["embed_tokens"], False),
    ],
)
def test_the_gradient_of_the_loss_is_computed_in_the_forward_pass_unless_the_head_is_trained(
    tmp_path, is_tied, modules, is_on
):
    """plan.fast_paths has the reason why a fast path is off, or an empty string."""
    base = make_model(tmp_path / "base", tied=is_tied)
    plan = make_plan(base, zero_stage=2, modules_to_save=modules)
    assert (plan.fast_paths["loss_gradient_in_forward"] == "") is is_on
