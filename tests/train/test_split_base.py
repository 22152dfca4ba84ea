"""PiSSA and OLoRA runs at each stage, and their published adapters for the unchanged base.

Both initialise the LoRA matrices A0 and B0 from each weight, and subtract their scaled product from
the base, so that the model's output does not change at step 0.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapter.publish import on_unchanged_base, publish_adapter
from pipeline.errors import RankZeroError
from pipeline.files import read_json
from pipeline.model import split_base
from pipeline.model.fingerprint import base_fingerprint
from pipeline.train.assemble import build_model
from pipeline.train.engine import Engine
from tests.adapter.merged import merge_adapter
from tests.messages import refused
from tests.model.models import build, cache_shape
from tests.models.kinds import ALL
from tests.ranks import run_ranks
from tests.tiny import make_model, make_plan
from tests.train_tiny import assert_stages_equal_and_resumes_exact, three_steps

pytestmark = pytest.mark.engine

IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared
OPTIONS = {
    "pissa": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "alpha_pattern": {"v_proj": 1.5}},
}
# Name -> settings, and whether the run resumes from the checkpoint of "zero2" after a step.
RUNS = {
    "zero1": ({"zero_stage": 1}, False),
    "zero2": ({"zero_stage": 2}, False),
    "zero3": ({"zero_stage": 3, "gradient_checkpointing": True}, False),
    "bf16": ({"zero_stage": 3, "bf16": True}, False),
    "zero2 resumed": ({"zero_stage": 2}, True),
    "zero3 resumed": ({"zero_stage": 3}, True),
}


def logits_of(engine):
    engine.deepspeed.eval()
    engine._gather_persistent()  # sharded in a new engine at ZeRO-3
    with torch.no_grad():
        return engine.deepspeed.module.model(input_ids=IDS).logits.float()


def train_at_each_stage(session, folder, options, checkpoint):
    """Train the runs of RUNS; `checkpoint`: a folder for the initial matrices of "zero2"."""
    runs = {}
    for name, (settings, is_resumed) in RUNS.items():
        plan = make_plan(folder, 2, 40, lr=1e-2, batch_size=2, **settings, **options)
        if is_resumed:
            split_base._set_matrices = None  # an SVD would raise an error
        model, initial = build_model(plan, session, checkpoint if is_resumed else None)
        engine = Engine(model, plan)
        result = {"initial": initial, "logits at step 0": logits_of(engine)}
        state = runs["zero2"]["state"] if is_resumed else None
        result |= three_steps(session, plan, engine, state)
        result["logits"] = logits_of(engine)
        runs[name] = result
        if name == "zero2":
            session.rank_zero_first(
                lambda initial=initial: save_file(initial, checkpoint / "initial.safetensors")
            )
    return runs


@pytest.fixture(scope="module", params=OPTIONS)
def split(request, tmp_path_factory):
    """The plan at ZeRO-2, the runs, and the folder with base, adapter and merged model."""
    options, folder = OPTIONS[request.param], tmp_path_factory.mktemp("split")
    base = make_model(folder / "base")
    runs = run_ranks(train_at_each_stage, base, options, folder, tmp_path=folder)[0]
    plan = make_plan(base, 2, 40, zero_stage=2, **options)
    tensors = on_unchanged_base(runs["zero2"]["final"], runs["zero2"]["initial"])
    adapter = folder / "adapter"
    publish_adapter(plan, tensors, adapter, step=3, base=base_fingerprint(base))
    merge_adapter(base, adapter, folder / "merged")
    return plan, runs, folder


def test_the_output_at_step_0_is_that_of_the_base(split):
    _, runs, folder = split
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder / "base")(input_ids=IDS).logits
    for name in RUNS.keys() - {"bf16"}:
        assert (runs[name]["logits at step 0"] - expected).norm() < 1e-5 * expected.norm(), name
    assert (runs["bf16"]["logits at step 0"] - expected).norm() < 0.02 * expected.norm()


def test_stages_have_equal_losses_and_a_resumed_run_needs_no_second_svd(split):
    _, runs, _ = split
    assert_stages_equal_and_resumes_exact(runs)


def test_the_initial_matrices_are_those_of_peft(split):
    plan, runs, folder = split
    settings = plan.settings
    config = LoraConfig(
        r=settings.lora_r, lora_alpha=settings.alpha, use_rslora=settings.use_rslora,
        init_lora_weights=settings.init_lora_weights, target_modules=settings.lora_target_modules,
        rank_pattern=settings.rank_pattern, alpha_pattern=settings.alpha_pattern,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    by_peft = {
        key.replace(".default", ""): value
        for key, value in model.state_dict().items()
        if ".lora_" in key
    }
    initial = runs["zero2"]["initial"]
    assert initial.keys() == by_peft.keys()
    for key, value in initial.items():
        torch.testing.assert_close(value, by_peft[key], rtol=1e-3, atol=1e-4)


def test_plain_peft_has_the_outputs_of_training_on_the_unchanged_base(split):
    plan, runs, folder = split
    config = read_json(folder / "adapter/adapter_config.json")
    assert (config["r"], config["init_lora_weights"]) == (2 * plan.settings.lora_r, True)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, runs["zero2"]["logits"], rtol=1e-4, atol=1e-4)
    by_peft = model.merge_and_unload().state_dict()
    merged = load_file(folder / "merged/model.safetensors")
    assert all(torch.equal(tensor, by_peft[key]) for key, tensor in merged.items())


def test_a_matrix_b_that_training_did_not_change_is_refused_at_publishing(split):
    _, runs, _ = split
    final, initial = runs["zero2"]["final"], runs["zero2"]["initial"]
    key = min(key for key in initial if ".lora_B." in key)
    with refused(key, error=RankZeroError):
        on_unchanged_base(final | {key: initial[key]}, initial)


def test_a_base_with_a_weight_that_several_layers_share_is_refused(tmp_path):
    build("zamba2/shared", kinds=ALL).save_pretrained(tmp_path)
    cache_shape(tmp_path)
    with refused("init_lora_weights", "shared_transformer"):
        make_plan(tmp_path, init_lora_weights="pissa", lora_r=1)
