"""EVA: A starts as the principal directions of its layer's inputs, at each ZeRO stage."""

import pytest
import torch

from pipeline.adapter.gather import gather_weights
from pipeline.data.order.batches import build_batch
from pipeline.errors import UserError
from pipeline.model.base import load_plain
from pipeline.model.loss import SummedLoss
from pipeline.train import assemble
from pipeline.train.engine import Engine
from tests.messages import assert_mentions
from tests.model.models import build
from tests.models.kinds import ALL
from tests.ranks import run_ranks
from tests.tiny import Documents, make_model, make_plan, make_tokenizer
from tests.train_tiny import assert_stages_equal_and_resumes_exact, three_steps

pytestmark = pytest.mark.engine

EVA = {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 2}, "lr": 1e-2, "batch_size": 2}
# Name -> settings, and whether the run resumes from the checkpoint of "zero2" after a step.
RUNS = {
    "zero1": ({"zero_stage": 1}, False),
    "zero2": ({"zero_stage": 2}, False),
    "zero3": ({"zero_stage": 3, "gradient_checkpointing": True}, False),
    "zero3 tokens": ({"zero_stage": 3, "new_tokens": ["<a>"]}, False),
    "zero3 4 bits": ({"zero_stage": 3, "load_in_4bit": True}, False),
    "zero2 resumed": ({"zero_stage": 2}, True),
    "zero3 resumed": ({"zero_stage": 3}, True),
}


def sequences(documents):
    return (build_batch(documents, [i]) for i in range(len(documents)))


def train_at_each_stage(session, folder):
    """Train the runs of RUNS; the initial weights and results by name."""
    runs = {}
    for name, (settings, is_resumed) in RUNS.items():
        plan = make_plan(folder, session.placement.world_size, 40, **EVA, **settings)
        if is_resumed:
            assemble.set_input_directions = None  # a forward pass over data would raise an error
        checkpoint = folder if is_resumed else None
        model, _ = assemble.build_model(plan, session, checkpoint, sequences(Documents()))
        engine = Engine(model, plan)
        state = runs["zero2"]["state"] if is_resumed else None
        runs[name] = {"initial": gather_weights(engine.parameters, keep=True)}
        runs[name] |= three_steps(session, plan, engine, state)
    return runs


def initial_weights(session, folder, documents, zero_stage=2):
    plan = make_plan(folder, session.placement.world_size, 40, **EVA, zero_stage=zero_stage)
    model, _ = assemble.build_model(plan, session, None, sequences(documents))
    return gather_weights(Engine(model, plan).parameters, keep=True)


def message_of_refusal(session, folder, documents):
    with pytest.raises(UserError) as caught:
        initial_weights(session, folder, documents)
    return str(caught.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("eva") / "base")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    return run_ranks(train_at_each_stage, base, tmp_path=tmp_path_factory.mktemp("runs"))[0]


def test_stages_are_equal_and_a_resumed_run_needs_no_second_pass_over_the_data(runs):
    assert_stages_equal_and_resumes_exact(runs)


def test_the_initial_values_depend_neither_on_the_stage_nor_on_the_number_of_ranks(
    base, runs, tmp_path
):
    on_one_rank = run_ranks(initial_weights, base, Documents(), tmp_path=tmp_path, world_size=1)[0]
    for name in ("zero1", "zero2", "zero3"):
        for key, weight in on_one_rank.items():
            torch.testing.assert_close(runs[name]["initial"][key], weight, rtol=1e-4, atol=1e-5)


def test_zero_3_gathers_modules_of_lists_outside_the_blocks(tmp_path):
    """Gemma 3n calls the elements of such lists, not the lists."""
    folder = tmp_path / "base"
    build("gemma3n_text/shared", kinds=ALL).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    make_plan(folder, 2, 40, **EVA)  # caches the shape of the class for the ranks
    expected, sharded = (
        run_ranks(initial_weights, folder, Documents(), stage, tmp_path=tmp_path)[0]
        for stage in (2, 3)
    )
    for key, weight in expected.items():
        torch.testing.assert_close(sharded[key], weight, rtol=1e-3, atol=1e-4)


def test_rows_of_a_are_orthonormal_and_b_is_zero(runs):
    for name in ("zero2", "zero3 tokens", "zero3 4 bits"):
        for key, weight in runs[name]["initial"].items():
            if ".lora_B." in key:
                assert not weight.any(), (name, key)
            elif ".lora_A." in key:
                gram = weight @ weight.T
                torch.testing.assert_close(gram, torch.eye(len(weight)), rtol=0, atol=1e-4)


def test_a_has_nearly_as_much_variance_of_the_inputs_as_the_best_directions(base, runs):
    model = load_plain(base, dtype=torch.float32).eval()
    name, recorded = "model.layers.1.self_attn.v_proj", []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda module, inputs: recorded.append(inputs[0][0]))
    summed_loss, supervised = SummedLoss(model), []
    with torch.no_grad():
        for batch in sequences(Documents()):
            summed_loss(batch.input_ids, batch.labels, batch.documents)
            supervised.append(recorded[-1][batch.labels[0] != -100])
    inputs = torch.cat(supervised)
    inputs = inputs - inputs.mean(0)
    directions = runs["zero2"]["initial"][f"base_model.model.{name}.lora_A.weight"]
    _, values, _ = torch.linalg.svd(inputs, full_matrices=False)
    best = (values[: len(directions)] ** 2).sum()
    assert (inputs @ directions.T).square().sum() > 0.9 * best


def test_too_few_tokens_are_refused_on_all_ranks(base, tmp_path):
    documents = Documents(1, longest=4)
    for message in run_ranks(message_of_refusal, base, documents, tmp_path=tmp_path):
        assert_mentions(message, "eva", "8 supervised tokens", "lora_r")
