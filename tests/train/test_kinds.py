"""Model classes outside the table of families train, publish and merge like known families."""

import pytest
import torch
from peft import PeftModel

from pipeline.adapter.gather import gather_weights
from pipeline.adapter.publish import publish_adapter
from pipeline.data.order.batches import build_batch
from pipeline.model.base import load_plain
from pipeline.model.fingerprint import base_fingerprint
from tests.adapter.merged import merge_adapter, tensors
from tests.ranks import run_ranks
from tests.tiny import Documents, make_plan
from tests.train_tiny import build_engine, distance, train_tiny, work

pytestmark = pytest.mark.engine

KINDS = [
    "olmo2",
    "granite",  # scaled embeddings, residuals and logits
    "cohere",  # attention and MLP in parallel
    "glm4",  # norms before and after attention and MLP
    "gpt_oss",  # attention sinks
    "deepseek_v3",  # multi-head latent attention
    "qwen3_next",  # hybrid layers
    "gemma3",  # with a vision tower
]
SHARDED_KINDS = [
    "lfm2",  # short convolutions
    "granitemoehybrid",  # Mamba layers
    "llama4_text",  # chunked attention, and one expert for each token
    "qwen3_vl_moe",  # experts stored transposed
]
RUNS = [(kind, stage) for stage in (2, 3) for kind in KINDS] + [(k, 3) for k in SHARDED_KINDS]
IDS = torch.arange(3, 35).reshape(2, 16)
STEPS = 2  # B is zero before the first step, so A moves in the second


def train_and_gather(session, folder, settings):
    """The adapter, and the logits and held-out loss of the engine."""
    plan, engine = build_engine(session, folder, settings)
    split = Documents()
    for step in range(STEPS):
        batches, supervised = work(plan, split, step, session.placement.rank)
        engine.optimizer_step(batches, supervised, 4e-3)
    weights = gather_weights(engine.parameters, keep=session.is_rank_zero)
    loss = engine.evaluate(build_batch(split, [0, 1]))
    with torch.no_grad():  # on every rank: at ZeRO-3 a forward pass is collective
        logits = engine.deepspeed.module.model(input_ids=IDS, use_cache=False).logits
    return weights, logits, loss


@pytest.mark.parametrize(("kind", "stage"), RUNS)
def test_the_adapter_has_the_same_logits_in_plain_peft_and_merges_like_peft(
    folder_of, tmp_path, kind, stage
):
    folder = folder_of(kind)
    # One forward a step and rank; the test of the first gradients accumulates.
    settings = {"zero_stage": stage, "batch_size": 4, "gradient_checkpointing": stage == 3}
    weights, logits, loss = run_ranks(train_and_gather, folder, settings, tmp_path=tmp_path)[0]
    plan = make_plan(folder, 2, 40, **settings)
    publish_adapter(plan, weights, tmp_path / "adapter", step=STEPS, base=base_fingerprint(folder))
    assert all(tensor.any() for tensor in weights.values())
    plain = load_plain(folder, dtype=torch.float32, attention="eager")
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    batch = build_batch(Documents(), [0, 1])
    with torch.no_grad():
        assert relative_error(model(input_ids=IDS, use_cache=False).logits, logits) < 1e-5
        theirs = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
    assert loss / int((batch.labels[:, 1:] != -100).sum()) == pytest.approx(float(theirs), rel=1e-4)
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "merged")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["olmo2", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma3"])
def test_first_gradients_of_two_sharded_ranks_equal_those_of_one(folder_of, tmp_path, kind):
    one, two = (
        run_ranks(
            train_tiny, folder_of(kind), {"zero_stage": stage, "batch_size": 2}, 1,
            tmp_path=tmp_path, world_size=world_size,
        )[0]
        for stage, world_size in ((2, 1), (3, 2))
    )  # fmt: skip
    assert distance(two["gradients"], one["gradients"]) < 1e-6


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())
