"""Model classes of many architectures train, publish and merge as peft computes.

Most have no entry in the plan's table of known families: their sizes are derived from the class.
"""

from functools import cache

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
from tests.train_tiny import batches_of_step, build_engine, distance, train_tiny

pytestmark = pytest.mark.engine

KINDS = [  # small models of tests/models/kinds.py
    "olmo2",
    "granite",  # scaled embeddings, residuals and logits
    "cohere",  # attention and MLP in parallel
    "glm4",  # norms before and after attention and MLP
    "gpt_oss",  # attention sinks
    "deepseek_v3",  # multi-head latent attention
    "qwen3_next",  # hybrid layers
    "gemma3",  # with a vision tower
    "lfm2",  # short convolutions
    "granitemoehybrid",  # Mamba layers
    "llama4_text",  # chunked attention, and one expert for each token
    "qwen3_vl_moe",  # experts stored transposed
]
# All kinds train at ZeRO-3. At ZeRO-2, which keeps a whole base on each rank, a few suffice: only
# the loading of the base depends on the class there.
ZERO2_KINDS = ("olmo2", "gpt_oss", "qwen3_next", "gemma3")
STAGES = {kind: (2, 3) if kind in ZERO2_KINDS else (3,) for kind in KINDS}
RUNS = [(kind, stage) for kind, stages in STAGES.items() for stage in stages]
# Kinds whose gradients on two ranks are compared with those on one.
WITH_GRADIENTS = ("olmo2", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma3")
IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared
STEPS = 2  # LoRA's B is zero before the first step, so A has a gradient only in the second


def train_and_gather(session, folder, settings):
    """The adapter after STEPS steps, the logits of IDS, and the loss sum of two documents."""
    plan, engine = build_engine(session, folder, settings)
    split = Documents()
    for step in range(STEPS):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        engine.optimizer_step(batches, supervised, 4e-3)
    weights = gather_weights(engine.parameters, keep=session.is_rank_zero)
    loss = engine.evaluate(build_batch(split, [0, 1]))
    with torch.no_grad():  # on every rank: at ZeRO-3 a forward pass is collective
        logits = engine.deepspeed.module.model(input_ids=IDS, use_cache=False).logits
    return weights, logits, loss


def settings_of(stage):
    # Each rank has one micro-batch a step here; in `first_gradients` it accumulates two.
    return {"zero_stage": stage, "batch_size": 4, "gradient_checkpointing": stage == 3}


def first_gradients(session, folder, stage):
    """The gradients of the first step."""
    return train_tiny(session, folder, {"zero_stage": stage, "batch_size": 2}, 1)["gradients"]


def train_at_stages(session, folder, stages, has_gradients):
    """Stage -> result of `train_and_gather`; and, if `has_gradients`, those at ZeRO-3, or None."""
    results = {stage: train_and_gather(session, folder, settings_of(stage)) for stage in stages}
    return results, first_gradients(session, folder, 3) if has_gradients else None


@pytest.fixture(scope="module")
def trained(folder_of, tmp_path_factory):
    """Function: kind -> `train_at_stages` on two ranks, which start once for each kind."""

    @cache
    def train(kind):
        arguments = (train_at_stages, folder_of(kind), STAGES[kind], kind in WITH_GRADIENTS)
        return run_ranks(*arguments, tmp_path=tmp_path_factory.mktemp("trained"))[0]

    return train


@pytest.fixture(scope="module")
def published(folder_of, trained, tmp_path_factory):
    """Function: kind and stage -> the folder of its published adapter."""

    @cache
    def publish(kind, stage):
        results_by_stage, _ = trained(kind)
        weights, *_ = results_by_stage[stage]
        base, adapter = folder_of(kind), tmp_path_factory.mktemp("published") / "adapter"
        plan = make_plan(base, 2, 40, **settings_of(stage))
        publish_adapter(plan, weights, adapter, step=STEPS, base=base_fingerprint(base))
        return adapter

    return publish


def load_in_peft(base, adapter):
    plain = load_plain(base, dtype=torch.float32, attention="eager")
    return PeftModel.from_pretrained(plain, adapter).eval()


@pytest.mark.parametrize(("kind", "stage"), RUNS)
def test_the_adapter_has_the_same_logits_and_loss_in_plain_peft(
    folder_of, trained, published, kind, stage
):
    results_by_stage, _ = trained(kind)
    weights, logits, loss_sum = results_by_stage[stage]
    assert all(tensor.any() for tensor in weights.values())
    model = load_in_peft(folder_of(kind), published(kind, stage))
    batch = build_batch(Documents(), [0, 1])
    with torch.no_grad():
        assert relative_error(model(input_ids=IDS, use_cache=False).logits, logits) < 1e-5
        peft_loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
    num_supervised = int((batch.labels[:, 1:] != -100).sum())
    assert loss_sum / num_supervised == pytest.approx(float(peft_loss), rel=1e-4)


@pytest.mark.parametrize("kind", STAGES)
def test_the_adapter_merges_like_peft(folder_of, published, tmp_path, kind):
    base, adapter = folder_of(kind), published(kind, 3)
    merge_adapter(base, adapter, tmp_path / "merged")
    load_in_peft(base, adapter).merge_and_unload().save_pretrained(tmp_path / "by_peft")
    by_peft, merged = tensors(tmp_path / "by_peft"), tensors(tmp_path / "merged")
    assert all(torch.equal(merged[key], by_peft[key]) for key in by_peft)


@pytest.mark.parametrize("kind", WITH_GRADIENTS)
def test_first_gradients_of_two_sharded_ranks_equal_those_of_one(
    folder_of, trained, tmp_path, kind
):
    [expected] = run_ranks(first_gradients, folder_of(kind), 2, tmp_path=tmp_path, world_size=1)
    _, gradients_at_zero3 = trained(kind)
    assert distance(gradients_at_zero3, expected) < 1e-6


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())
