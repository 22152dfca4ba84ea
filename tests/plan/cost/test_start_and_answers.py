"""Predicted costs of decompositions at the start and of answers at evaluations."""

import json
from dataclasses import replace

import pytest

from pipeline.config.frequency import Frequency
from pipeline.config.settings import RunSettings
from pipeline.plan.cost.answers import answers, batch_rows
from pipeline.plan.cost.per_token import cost_per_token
from pipeline.plan.cost.speed import KERNEL_S
from pipeline.plan.given.data_size import LengthLoss
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.plan.render import plan_json, plan_text
from tests.messages import assert_mentions
from tests.plans import CPU, LLAMA_8B, gpu, sized, with_layout

pytestmark = pytest.mark.unit


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(hardware=None, ranks=8, **settings):
        values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o"} | settings
        run = RunSettings.model_validate(values)
        shape, machine = read_shape(str(tmp_path)), hardware or gpu(80)
        made = make_plan(run, shape, machine, nodes=1, ranks_per_node=ranks)
        return made.with_data(sized(1000))

    return make


ANSWERS = {"eval_data": "heldout.jsonl", "eval_generate": 64, "evaluation_strategy": "epoch"}


def test_only_runs_that_decompose_weights_have_the_line_and_the_time(plan):
    assert plan().decompositions is None
    for method, kind in (("pissa", "SVD"), ("olora", "QR"), ("pissa_niter_4", "approximate SVD")):
        made = plan(init_lora_weights=method)
        assert made.decompositions.kind == kind
        assert made.decompositions.matrices == 7 * 32
        assert_mentions(plan_text(made), "initial ", kind, "224 weights")
        assert made.seconds - plan().seconds == pytest.approx(made.decompositions.seconds, rel=1e-6)
    loftq = {"init_lora_weights": "loftq", "load_in_4bit": True}
    assert plan(**loftq).decompositions.matrices == 7 * 32
    started = plan(**loftq, init_adapter="folder")
    assert started.decompositions is None
    rules = {rule.id: rule.message for rule in started.rules}
    assert_mentions(rules["without-effect"], "init_lora_weights", "init_adapter")
    assert not [rule for rule in rules if "loftq" in rule]


def test_the_cost_follows_the_shapes_of_the_decomposed_weights(plan):
    small = {"lora_target_modules": ["k_proj"]}  # 4096 x 1024
    exact = plan(init_lora_weights="pissa", **small).decompositions
    assert exact.seconds / plan(init_lora_weights="pissa").decompositions.seconds < 0.02
    # In fp32: three matrices as large as the weight; m n + n^2 values for the factors, and as many
    # for the workspace.
    assert exact.peak_bytes == 4 * (3 * 4096 * 1024 + 2 * (4096 * 1024 + 1024**2))
    few, many = (
        plan(init_lora_weights=f"pissa_niter_{n}", **small).decompositions.seconds for n in (4, 16)
    )
    # Matrix products: two in each iteration, and two more.
    assert many / few == pytest.approx((2 * 16 + 2) / (2 * 4 + 2))
    assert many < exact.seconds


def test_ranks_on_one_cpu_share_its_rate_while_rank_0_decomposes(plan):
    cpu = replace(CPU, device_bytes=2**40, host_bytes=2**40)
    keys = {"hardware": cpu, "zero_stage": 2, "init_lora_weights": "olora"}
    one, four = (plan(ranks=ranks, **keys).decompositions.seconds for ranks in (1, 4))
    assert four == pytest.approx(4 * one)


def test_the_memory_while_loading_includes_the_largest_decomposition(plan):
    plain, exact = plan(zero_stage=2), plan(zero_stage=2, init_lora_weights="pissa")
    more = exact.memory.loading_tensors - plain.memory.loading_tensors
    assert more == exact.decompositions.peak_bytes


def test_the_time_of_a_run_includes_the_answers_of_all_evaluations(plan):
    made = plan(**ANSWERS, epochs=3)
    steps = made.steps.total_steps * made.speed.seconds_per_step
    assert made.num_evaluations == 3
    assert made.seconds == pytest.approx(steps + 3 * made.answers.seconds)
    assert_mentions(plan_text(made), "answers ", "64 held-out rows", "3 times")
    assert plan_json(made)["answers"]["rows"] == 64
    assert plan(eval_data="heldout.jsonl").answers is None


def test_ranks_share_batches_of_answers_and_each_token_is_a_pass(plan):
    made = plan(**ANSWERS)
    one = plan(**ANSWERS, ranks=1).answers
    assert one.passes == 2 * one.tokens  # 64 rows are two batches
    assert made.answers.passes == made.answers.tokens
    assert one.seconds == pytest.approx(2 * made.answers.seconds)
    sharded = with_layout(made, zero_stage=3).answers  # gathers the base for each token
    assert sharded.seconds > 10 * made.answers.seconds
    on_cpu = plan(
        **ANSWERS,
        hardware=replace(CPU, device_bytes=2**40, host_bytes=2**40),
        ranks=1,
        zero_stage=2,
    )
    assert on_cpu.answers.seconds > 10 * one.seconds


def test_longer_answers_are_in_smaller_batches(plan):
    made = plan(**ANSWERS, ranks=1)
    lengths = 3000, 1000
    long = answers(made.shape, made.settings, made.layout, made.hardware, lengths)
    assert batch_rows(3000 + long.tokens) == 8
    assert long.passes == 8 * long.tokens  # 64 rows


def test_on_a_fast_gpu_a_pass_takes_the_time_of_its_launches(plan):
    fast = replace(gpu(80), flops=1e20, memory_bandwidth=1e18)
    made = plan(**ANSWERS, ranks=1, hardware=fast)
    dtype = made.training_dtype
    kernels = cost_per_token(made.shape, made.settings, dtype, is_sharded=False).kernels
    launches = made.answers.passes * kernels * KERNEL_S
    assert made.answers.seconds == pytest.approx(launches, rel=0.01)


def test_the_length_of_answers_is_that_of_the_supervised_tokens_once_they_are_counted(plan):
    made = plan(**ANSWERS)
    loss = LengthLoss(documents=1000, longer=0, tokens=30_000, lost=0, keeps_99=99, keeps_all=99)
    counted = replace(made, data=replace(made.data, length_loss=loss))
    assert (made.answers.tokens, counted.answers.tokens) == (100 + 8, 30 + 8)


@pytest.mark.parametrize(
    ("frequency", "total"),
    [(Frequency(1, 7), 30), (Frequency(1, 10), 30), (Frequency(3), 29), (Frequency(1), 8)],
)
def test_the_number_of_evaluations_is_that_of_the_loop(frequency, total):
    due = [frequency.is_due(step, 8) or step == total for step in range(1, total + 1)]
    assert frequency.count(total, 8) == sum(due)
