"""Every adapter option trains equally at each ZeRO stage, resumes, is published, and merges."""

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.adapter.gather import OptimizerState, gather_moments, gather_weights, restore
from pipeline.adapter.publish import publish_adapter
from pipeline.config.adapter_keys import AdapterKeys
from pipeline.model.adapter import expected_shapes
from pipeline.model.fingerprint import base_fingerprint
from pipeline.plan.given.adapter_counts import adapter_shapes
from pipeline.train.assemble import load_initial_adapter
from pipeline.train.resume import checkpoints_of
from tests.adapter.merged import merge_adapter
from tests.ranks import run_ranks
from tests.tiny import Documents, make_model, make_plan
from tests.train_tiny import batches_of_step, build_engine, distance, train_tiny

pytestmark = pytest.mark.engine

STEPS, MORE = 2, 2  # before and after the state is saved that resumed runs start from
IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared
# Name of the parameter -> adapter options that are set together.
OPTIONS = {
    "all but dora": {
        "layers_to_transform": [1],
        "exclude_modules": ["k_proj"],
        "rank_pattern": {"q_proj": 2, r"mlp\.\w+": 6},
        "alpha_pattern": {"v_proj": 1.5},
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "lora_plus_ratio": 16.0,
        "neftune_noise_alpha": 5.0,
    },
    "dora": {"use_dora": True, "rank_pattern": {"q_proj": 2}},
    "tied embeddings and head": {"modules_to_save": ["lm_head"], "neftune_noise_alpha": 5.0},
    "embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"], "lora_plus_ratio": 4.0},
    "new tokens, tied": {"new_tokens": ["<a>", "</a>"], "neftune_noise_alpha": 5.0},
    "new tokens": {"new_tokens": ["<a>"], "lora_plus_ratio": 4.0, "use_rslora": True},
}  # fmt: skip
UNTIED = {"embeddings and head", "new tokens"}  # their base has a head of its own
# Run -> its settings, and the run from whose state it resumes.
RUNS = {
    "zero1": ({"zero_stage": 1}, None),
    "zero2": ({"zero_stage": 2}, None),
    "zero2 resumed": ({"zero_stage": 2}, "zero2"),
    "zero1 resumed": ({"zero_stage": 1}, "zero2"),
    "zero3": ({"zero_stage": 3}, None),
    "zero3 resumed": ({"zero_stage": 3}, "zero2"),
}
RUNS_IN_4_BITS = {
    "zero2": ({"zero_stage": 2, "load_in_4bit": True}, None),
    "zero3": ({"zero_stage": 3, "load_in_4bit": True}, None),
}


def train_at_each_stage(session, folder, options, runs_by_name):
    """Train runs such as RUNS with the adapter options; results by name of the run.

    Each has its losses, the weights and moments after STEPS, and the final weights and learning
    rates; "zero2" has final logits too.
    """
    runs = {}
    for name, (settings, origin) in runs_by_name.items():
        if options.get("use_dora") and "zero3" in name:  # refused: rule dora-zero3
            continue
        plan, engine = build_engine(
            session, folder, settings | options | {"lr": 1e-2, "batch_size": 2}
        )
        if origin is None:
            losses = train_steps(session, plan, engine, 0, STEPS)
            state = {"weights": gather_weights(engine.parameters, keep=True)}
            state["moments"] = gather_moments(engine.parameters, keep=True)
        else:
            state = runs[origin]
            optimizer_state = OptimizerState(moments=state["moments"], step=STEPS)
            restore(engine.deepspeed, engine.parameters, state["weights"], optimizer_state)
            losses = state["losses"][:STEPS]
        losses = losses + train_steps(session, plan, engine, STEPS, MORE)
        final = gather_weights(engine.parameters, keep=True)
        runs[name] = state | {"losses": losses, "final": final}
        runs[name]["rates"] = engine.learning_rates()
        if name == "zero2":
            engine.deepspeed.eval()
            with torch.no_grad():
                ids = input_ids(plan.shape.vocab_size)
                runs[name]["logits"] = engine.deepspeed.module.model(input_ids=ids).logits
    return runs


def input_ids(vocab_size):
    """IDS with the last token of the vocabulary first, which is new in runs with `new_tokens`."""
    ids = IDS.clone()
    ids[:, 0] = vocab_size - 1
    return ids


def train_steps(session, plan, engine, first, count):
    """Train steps `first` to `first + count - 1`; the mean loss of each."""
    losses = []
    for step in range(first, first + count):
        split = Documents(vocab_size=plan.shape.vocab_size)
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        result = engine.optimizer_step(batches, supervised, plan.learning_rate(step))
        losses.append(session.sum_over_ranks([result.loss_sum])[0] / supervised)
    return losses


@pytest.fixture(scope="module", params=OPTIONS)
def option(request, tmp_path_factory):
    """The plan at ZeRO-2, the runs on two ranks, the base, and the folder of all files.

    The adapter of the run "zero2" is in adapter/, and its merged model in merged/.
    """
    options, folder = OPTIONS[request.param], tmp_path_factory.mktemp("option")
    base = make_model(folder / "base", tied=request.param not in UNTIED)
    runs = run_ranks(train_at_each_stage, base, options, RUNS, tmp_path=folder)[0]
    plan = make_plan(base, 2, 40, zero_stage=2, lr=1e-2, **options)
    adapter = folder / "adapter"
    publish_adapter(plan, runs["zero2"]["final"], adapter, step=4, base=base_fingerprint(base))
    merge_adapter(base, adapter, folder / "merged")
    return plan, runs, base, folder


def test_every_stage_has_the_same_losses_and_weights(option):
    _, runs, *_ = option
    for name in runs.keys() & {"zero1", "zero3"}:
        assert runs[name]["losses"] == pytest.approx(runs["zero2"]["losses"], rel=1e-6)
        assert distance(runs[name]["final"], runs["zero2"]["final"]) < 1e-5
    # Training changes the weights, so that equal weights mean something.
    assert distance(runs["zero2"]["final"], runs["zero2"]["weights"]) > 1e-3


def train_in_4_bits(name, folder):
    """Train the runs of RUNS_IN_4_BITS with an option of OPTIONS."""
    base = make_model(folder / "base", tied=name not in UNTIED)
    arguments = (train_at_each_stage, base, OPTIONS[name], RUNS_IN_4_BITS)
    return run_ranks(*arguments, tmp_path=folder)[0]


# Only linear layers of blocks are quantised, and not the modules of `modules_to_save`.
@pytest.mark.parametrize("name", ["all but dora", "new tokens"])
def test_zero2_and_zero3_have_the_same_losses_in_4_bits(name, tmp_path):
    runs = train_in_4_bits(name, tmp_path)
    assert runs["zero3"]["losses"] == pytest.approx(runs["zero2"]["losses"], rel=1e-6)


def test_dora_trains_in_4_bits(tmp_path):
    run = train_in_4_bits("dora", tmp_path)["zero2"]
    assert all(map(math.isfinite, run["losses"]))
    assert distance(run["final"], run["weights"]) > 1e-3


def test_a_resumed_run_is_bitwise_equal_at_the_same_stage_and_close_at_another(option):
    _, runs, *_ = option
    assert runs["zero2 resumed"]["losses"] == runs["zero2"]["losses"]
    final = runs["zero2"]["final"]
    assert all(torch.equal(t, final[key]) for key, t in runs["zero2 resumed"]["final"].items())
    for name in runs.keys() & {"zero1 resumed", "zero3 resumed"}:
        assert runs[name]["losses"] == pytest.approx(runs["zero2"]["losses"], rel=1e-6)


def test_every_parameter_group_keeps_its_learning_rate_after_a_resume(option):
    plan, runs, *_ = option
    lr = plan.learning_rate(STEPS + MORE - 1)
    rates = {"lr": lr}
    if plan.settings.lora_plus_ratio != 1:
        rates["lr_lora_b"] = plan.settings.lora_plus_ratio * lr
    assert all(run["rates"] == rates for run in runs.values())
    assert "zero1 resumed" in runs


def test_the_plan_has_the_shapes_and_count_of_the_trained_parameters(option):
    plan, runs, *_ = option
    trained = {key: tuple(tensor.shape) for key, tensor in runs["zero2"]["final"].items()}
    assert trained == adapter_shapes(plan.shape, plan.settings)
    assert sum(math.prod(shape) for shape in trained.values()) == plan.trainable


def test_plain_peft_gives_the_logits_of_the_engine_and_merges_to_the_same_weights(option):
    plan, runs, base, folder = option
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(plan.shape.vocab_size, mean_resizing=False)
    loaded = PeftModel.from_pretrained(model, folder / "adapter").eval()
    with torch.no_grad():
        logits = loaded(input_ids=input_ids(plan.shape.vocab_size)).logits
    torch.testing.assert_close(logits, runs["zero2"]["logits"], rtol=1e-5, atol=1e-5)
    by_peft = loaded.merge_and_unload().state_dict()
    merged = load_file(folder / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, by_peft[key]) for key, tensor in merged.items())


# Parts of the base that are trained too: rows of new tokens, or a module.
TRAINED_PARTS = {
    "token rows": {"new_tokens": ["<a>"]},
    "module": {"modules_to_save": ["embed_tokens"]},
}


def train_with_whole_and_split_sequences(session, folder):
    """(Part, is the base in 8 bits, ranks that share a sequence) -> losses and weights."""
    runs = {}
    for part, options in TRAINED_PARTS.items():
        for is_8_bit in (False, True):
            for num_sharing in (1, 2):
                settings = options | {
                    "load_in_8bit": is_8_bit, "sequence_parallel_size": num_sharing,
                    "zero_stage": 2, "lr": 1e-2,
                }  # fmt: skip
                result = train_tiny(session, folder, settings, steps=2)
                runs[part, is_8_bit, num_sharing] = result["losses"], result["weights"]
    return runs


def test_token_rows_and_modules_train_on_an_8_bit_base_and_with_split_sequences(
    tiny_model, tmp_path
):
    runs = run_ranks(train_with_whole_and_split_sequences, tiny_model, tmp_path=tmp_path)[0]
    for part in TRAINED_PARTS:
        for is_8_bit in (False, True):
            losses, weights = runs[part, is_8_bit, 1]
            split_losses, split_weights = runs[part, is_8_bit, 2]
            assert split_losses == pytest.approx(losses, rel=1e-6)
            assert distance(split_weights, weights) < 1e-5
        (losses, _), (losses_8_bit, _) = runs[part, False, 1], runs[part, True, 1]
        assert losses_8_bit == pytest.approx(losses, rel=0.01)
        assert losses_8_bit != losses  # the base was quantised


def start_at_each_stage(session, folder, settings):
    """Logits at step 0 and losses of runs that start from an adapter, at each stage."""
    runs = {}
    for name, change in (
        ("zero1", {"zero_stage": 1}),
        ("zero2", {"zero_stage": 2}),
        ("zero3", {"zero_stage": 3}),
        ("bf16", {"zero_stage": 3, "bf16": True}),
    ):
        plan, engine = build_engine(session, folder, settings | change)
        load_initial_adapter(engine, plan)
        engine.deepspeed.eval()
        with torch.no_grad():
            logits = engine.deepspeed.module.model(input_ids=IDS).logits
        masters = gather_weights(engine.parameters, keep=True)
        losses = train_steps(session, plan, engine, 0, 2)
        runs[name] = {"logits": logits, "losses": losses, "masters": masters}
    return runs


def test_a_run_starts_from_a_smaller_adapter_with_its_outputs_at_every_stage(tiny_model, tmp_path):
    plan = make_plan(tiny_model, new_tokens=["<a>", "<b>"])
    torch.manual_seed(1)
    tensors = {key: 0.1 * torch.randn(shape) for key, shape in expected_shapes(plan).items()}
    adapter = tmp_path / "adapter"
    publish_adapter(plan, tensors, adapter, step=4, base=base_fingerprint(tiny_model))
    settings = {
        "lora_r": 6, "lora_alpha": 3.0, "init_adapter": str(adapter), "init_adapter_resize": True,
        "batch_size": 2, "new_tokens": ["<a>", "<b>"], "seed": 5,
    }  # fmt: skip
    runs = run_ranks(start_at_each_stage, tiny_model, settings, tmp_path=tmp_path)[0]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(plan.shape.vocab_size)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, adapter).eval()(input_ids=IDS).logits
    for stage in ("zero1", "zero2", "zero3"):
        assert (runs[stage]["logits"] - expected).norm() < 1e-6 * expected.norm()
        assert runs[stage]["losses"] == pytest.approx(runs["zero2"]["losses"], rel=1e-6)
    assert (runs["bf16"]["logits"].float() - expected).norm() < 0.02 * expected.norm()
    for key, tensor in tensors.items():  # the fp32 masters are not rounded to bf16
        if "lora_A" in key:  # its first 4 of 6 rows are those of the smaller adapter
            assert torch.equal(runs["bf16"]["masters"][key][:4], tensor)


# A value of each adapter option that is not its default.
CHANGED_VALUES = {
    "use_rslora": True,
    "use_dora": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 3.0},
    "layers_to_transform": [0, 1],
    "exclude_modules": ["k_proj"],
    "init_lora_weights": "gaussian",
    "modules_to_save": ["embed_tokens"],
    "new_tokens": ["<a>"],
    "lora_plus_ratio": 2.0,
    "neftune_noise_alpha": 5.0,
}


def test_every_option_is_in_the_identity_of_a_checkpoint(tiny_model, tmp_path):
    def identity(**settings):
        plan = make_plan(tiny_model, zero_stage=2, **settings)
        return checkpoints_of(tmp_path, plan, "new", "data").identity

    assert CHANGED_VALUES.keys() == AdapterKeys.model_fields.keys()
    plain = identity()
    for option, value in CHANGED_VALUES.items():
        assert identity(**{option: value}) != plain, option
    assert identity(load_in_4bit=True) != identity(load_in_4bit=True, init_lora_weights="loftq")
