"""Adapters of fused experts train, load in plain peft, and resume.

Fused experts are one 3-D weight for all experts of a layer, to which peft attaches LoRA matrices.
"""

import json
from functools import cache

import pytest
import torch
from peft import PeftModel

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from pipeline.adapter.initial import read_initial_adapter
from pipeline.adapter.publish import publish_adapter
from pipeline.model.adapter import expected_shapes
from pipeline.model.base import load_plain
from pipeline.model.fingerprint import base_fingerprint
from pipeline.train.assemble import load_initial_adapter
from tests.messages import refused
from tests.ranks import run_ranks
from tests.tiny import Documents, make_plan
from tests.train_tiny import batches_of_step, build_engine, distance, train_tiny

pytestmark = pytest.mark.engine

KINDS = [  # small models of tests/models/kinds.py
    "qwen3_moe",  # its sizes are in a table, without building the model class
    "gpt_oss",  # transposed weights with biases
    "deepseek_v3",  # a dense first layer, and multi-head latent attention
    "llama4_text",  # experts that process every token
    "qwen3_next",  # hybrid layers
]
EXPERTS = {"lora_target_modules": ["auto", "experts"], "batch_size": 2}
IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared
STEPS = 2  # LoRA's B is zero before the first step, so A has a gradient only in the second


def train_and_gather(session, folder, settings, saved=None):
    """Adapter, moments, logits and losses after STEPS steps, resumed from `saved` if given."""
    plan, engine = build_engine(session, folder, settings)
    first = 0
    if saved is not None:
        first = STEPS
        state = OptimizerState(moments=saved["moments"], step=STEPS)
        restore(engine.deepspeed, engine.parameters, saved["weights"], state)
    losses = []
    for step in range(first, first + STEPS):
        batches, supervised = batches_of_step(plan, Documents(), step, session.placement.rank)
        losses.append(engine.optimizer_step(batches, supervised, 4e-3).loss_sum)
    engine.deepspeed.eval()
    with torch.no_grad():  # on every rank: at ZeRO-3 a forward pass is collective
        logits = engine.deepspeed.module.model(input_ids=IDS, use_cache=False).logits
    return {
        "weights": gather_weights(engine.parameters, keep=True),
        "moments": gather_moments(engine.parameters, keep=True),
        "logits": logits,
        "losses": losses,
    }


CHECKPOINTED = {"zero_stage": 3, "gradient_checkpointing": True}
# Settings of the runs of two ranks whose gradients of the first step are compared.
GRADIENT_RUNS = {kind: [CHECKPOINTED] for kind in KINDS}
GRADIENT_RUNS["qwen3_moe"] += [{"zero_stage": 2}, {"zero_stage": 3}]
GRADIENT_RUNS["gpt_oss"] += [{"zero_stage": 3}]
# Stages of the runs of two ranks whose adapter is published.
PUBLISHED = {kind: (3,) for kind in KINDS if kind != "qwen3_next"} | {"qwen3_moe": (2, 3)}


def published_settings(stage):
    return EXPERTS | {"zero_stage": stage, "batch_size": 4, "lora_dropout": 0.1}


def train_all(session, folder, kind):
    """The GRADIENT_RUNS of a kind: first gradients of each. Its PUBLISHED runs, by stage.

    The latter are results of `train_and_gather`.
    """
    gradients = [
        train_tiny(session, folder, EXPERTS | settings, 1)["gradients"]
        for settings in GRADIENT_RUNS[kind]
    ]
    published = {
        stage: train_and_gather(session, folder, published_settings(stage))
        for stage in PUBLISHED.get(kind, ())
    }
    return gradients, published


@pytest.fixture(scope="module")
def two_ranks(folder_of, tmp_path_factory):
    """Function: kind -> `train_all` on two ranks; the ranks start once for each kind."""

    @cache
    def train(kind):
        folder = tmp_path_factory.mktemp("two")
        return run_ranks(train_all, folder_of(kind), kind, tmp_path=folder)[0]

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_first_gradients_of_two_ranks_equal_those_of_one(folder_of, two_ranks, tmp_path, kind):
    settings = EXPERTS | {"zero_stage": 2}
    [result] = run_ranks(train_tiny, folder_of(kind), settings, 1, tmp_path=tmp_path, world_size=1)
    expected = result["gradients"]
    nonzero = [key for key, gradient in expected.items() if gradient.any()]
    # The two weights of the experts: peft wraps one adapter around the other.
    assert [key for key in nonzero if ".experts.base_layer.lora_B" in key]
    assert [key for key in nonzero if ".experts.lora_B" in key]
    gradients_of_two_ranks, _ = two_ranks(kind)
    for run, gradients in zip(GRADIENT_RUNS[kind], gradients_of_two_ranks, strict=True):
        assert distance(gradients, expected) < 1e-6, run


@pytest.mark.parametrize(
    ("kind", "stage"), [(kind, stage) for kind, stages in PUBLISHED.items() for stage in stages]
)
def test_the_published_adapter_has_its_logits_in_plain_peft(
    folder_of, two_ranks, tmp_path, kind, stage
):
    _, published_runs = two_ranks(kind)
    folder, result = folder_of(kind), published_runs[stage]
    plan = make_plan(folder, 2, 40, **published_settings(stage))
    publish_adapter(
        plan, result["weights"], tmp_path / "adapter", step=STEPS, base=base_fingerprint(folder)
    )
    plain = load_plain(folder, dtype=torch.float32, attention="eager")
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    assert float((logits - result["logits"]).norm() / logits.norm()) < 1e-5


def resume_at_stages(session, folder, saved):
    return [
        train_and_gather(session, folder, EXPERTS | {"zero_stage": stage}, saved)
        for stage in (2, 3)
    ]


def test_a_run_with_experts_is_resumed_at_another_stage(folder_of, tmp_path):
    """At ZeRO-3 the adapters of experts are sharded, unlike those of linear layers."""
    folder = folder_of("qwen3_moe")
    before = run_ranks(train_and_gather, folder, EXPERTS | {"zero_stage": 2}, tmp_path=tmp_path)[0]
    resumed = run_ranks(resume_at_stages, folder, before, tmp_path=tmp_path)[0]
    at_same_stage, at_other_stage = resumed
    assert distance(at_same_stage["weights"], before["weights"]) > 1e-3
    assert distance(at_other_stage["weights"], at_same_stage["weights"]) < 1e-5
    assert at_other_stage["losses"] == pytest.approx(at_same_stage["losses"], rel=1e-6)


def start_at_stages(session, folder, settings):
    """Logits at step 0 of runs that start from an adapter, at ZeRO-2 and ZeRO-3."""
    logits = []
    for stage in (2, 3):
        plan, engine = build_engine(session, folder, settings | {"zero_stage": stage})
        load_initial_adapter(engine, plan)
        engine.deepspeed.eval()
        with torch.no_grad():
            logits.append(engine.deepspeed.module.model(input_ids=IDS, use_cache=False).logits)
    return logits


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_run_starts_from_a_smaller_adapter_of_experts_with_its_outputs(folder_of, tmp_path, kind):
    folder, adapter = folder_of(kind), tmp_path / "adapter"
    plan = make_plan(folder, **EXPERTS)
    torch.manual_seed(1)
    tensors = {key: 0.1 * torch.randn(shape) for key, shape in expected_shapes(plan).items()}
    publish_adapter(plan, tensors, adapter, step=4, base=base_fingerprint(folder))
    settings = EXPERTS | {
        "lora_r": 6, "lora_alpha": 3.0, "init_adapter": str(adapter), "init_adapter_resize": True,
    }  # fmt: skip
    plain = load_plain(folder, dtype=torch.float32, attention="eager")
    with torch.no_grad():
        untrained = plain(input_ids=IDS, use_cache=False).logits
        model = PeftModel.from_pretrained(plain, adapter).eval()
        expected = model(input_ids=IDS, use_cache=False).logits
    assert (untrained - expected).norm() > 0.1 * expected.norm()
    for logits in run_ranks(start_at_stages, folder, settings, tmp_path=tmp_path)[0]:
        assert (logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind_of_r", ["another r", "rows of all experts"])
def test_an_adapter_whose_config_has_another_r_is_refused(folder_of, tmp_path, kind_of_r):
    folder, adapter = folder_of("qwen3_moe"), tmp_path / "adapter"
    plan = make_plan(folder, **EXPERTS)
    r = plan.settings.lora_r * (plan.shape.num_experts if kind_of_r == "rows of all experts" else 3)
    tensors = {key: torch.ones(shape) for key, shape in expected_shapes(plan).items()}
    publish_adapter(plan, tensors, adapter, step=4, base=base_fingerprint(folder))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": r}))
    with refused("init_adapter", f"but r is {r} in adapter_config.json"):
        read_initial_adapter(make_plan(folder, **EXPERTS, init_adapter=str(adapter)))
