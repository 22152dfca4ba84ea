"""Predicted costs of weight decompositions at the start and of answers at evaluations.

PiSSA, OLoRA and LoftQ initialise an adapter from an SVD or QR of each adapted weight. With
`eval_generate: N` each evaluation generates answers to N held-out rows.
"""

import json
from dataclasses import replace

import pytest

from pipeline.config.frequency import Frequency
from pipeline.config.settings import RunSettings
from pipeline.plan.cost.answers import EXTRA_TOKENS, answers, batch_rows
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
    """Function that plans a run of Llama 8B on 1000 documents; default: 8 GPUs of 80 GiB."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(hardware=None, ranks=8, **settings):
        values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o"} | settings
        run = RunSettings.model_validate(values)
        shape, machine = read_shape(str(tmp_path)), hardware or gpu(80)
        new_plan = make_plan(run, shape, machine, nodes=1, ranks_per_node=ranks)
        return new_plan.with_data(sized(1000))

    return make


ANSWERS = {"eval_data": "heldout.jsonl", "eval_generate": 64, "evaluation_strategy": "epoch"}
NUM_ADAPTED = 7 * 32  # linear layers of a block, blocks
LARGE_CPU = replace(CPU, device_bytes=2**40, host_bytes=2**40)


@pytest.mark.parametrize(
    ("method", "kind"), [("pissa", "SVD"), ("olora", "QR"), ("pissa_niter_4", "approximate SVD")]
)
def test_the_plan_has_a_line_and_the_time_of_the_decompositions(plan, method, kind):
    new_plan = plan(init_lora_weights=method)
    assert new_plan.decompositions.kind == kind
    assert new_plan.decompositions.matrices == NUM_ADAPTED
    assert_mentions(plan_text(new_plan), "initial ", kind, f"{NUM_ADAPTED} weights")
    without = plan()
    assert without.decompositions is None
    additional_seconds = new_plan.seconds - without.seconds
    assert additional_seconds == pytest.approx(new_plan.decompositions.seconds, rel=1e-6)


def test_eva_has_a_line_the_time_and_the_memory_of_its_passes_over_the_data(plan):
    new_plan, without = plan(init_lora_weights="eva", zero_stage=2), plan(zero_stage=2)
    assert_mentions(plan_text(new_plan), "initial ", "PCA of the inputs", f"{NUM_ADAPTED} weights")
    directions = new_plan.decompositions
    assert new_plan.seconds - without.seconds == pytest.approx(directions.seconds, rel=1e-6)
    additional_bytes = new_plan.memory.loading_tensor_bytes - without.memory.loading_tensor_bytes
    assert additional_bytes > directions.peak_bytes  # a forward pass, and the inputs that are kept
    sharded = plan(init_lora_weights="eva", zero_stage=3)
    assert sharded.decompositions.seconds > directions.seconds  # each pass gathers the base
    of_base = plan(zero_stage=3).memory.loading_tensor_bytes
    assert sharded.memory.loading_tensor_bytes > of_base
    assert plan(init_lora_weights="eva", init_adapter="folder").decompositions is None


def test_eva_runs_whole_sequences_also_if_ranks_share_a_sequence(plan):
    loading_bytes = {
        plan(init_lora_weights="eva", sequence_parallel_size=size).memory.loading_tensor_bytes
        for size in (1, 4)
    }
    assert len(loading_bytes) == 1


def test_an_adapter_to_start_from_replaces_the_decompositions_of_loftq(plan):
    loftq = {"init_lora_weights": "loftq", "load_in_4bit": True}
    assert plan(**loftq).decompositions.matrices == NUM_ADAPTED
    with_adapter = plan(**loftq, init_adapter="folder")
    assert with_adapter.decompositions is None
    rules = {rule.id: rule.message for rule in with_adapter.rules}
    assert_mentions(rules["without-effect"], "init_lora_weights", "init_adapter")
    assert not [rule for rule in rules if "loftq" in rule]


def test_the_cost_of_a_decomposition_follows_the_shape_of_the_weight(plan):
    only_k_proj = {"lora_target_modules": ["k_proj"]}
    rows, columns = 4096, 1024
    exact = plan(init_lora_weights="pissa", **only_k_proj).decompositions
    of_all_layers = plan(init_lora_weights="pissa").decompositions
    assert exact.seconds < 0.02 * of_all_layers.seconds  # k_proj is the smallest of 7 weights
    # In fp32: three matrices as large as the weight, the factors, and a workspace of their size.
    factors = rows * columns + columns**2
    assert exact.peak_bytes == 4 * (3 * rows * columns + 2 * factors)
    iterations_4, iterations_16 = (
        plan(init_lora_weights=f"pissa_niter_{num}", **only_k_proj).decompositions.seconds
        for num in (4, 16)
    )
    # Matrix products: two in each iteration, and two more.
    assert iterations_16 / iterations_4 == pytest.approx((2 * 16 + 2) / (2 * 4 + 2))
    assert iterations_16 < exact.seconds


def test_with_4_ranks_on_one_cpu_a_decomposition_on_rank_0_has_a_quarter_of_the_cores(plan):
    keys = {"hardware": LARGE_CPU, "zero_stage": 2, "init_lora_weights": "olora"}
    one, four = (plan(ranks=ranks, **keys).decompositions.seconds for ranks in (1, 4))
    assert four == pytest.approx(4 * one)


def test_the_memory_while_loading_includes_the_largest_decomposition(plan):
    random_start = plan(zero_stage=2)
    pissa = plan(zero_stage=2, init_lora_weights="pissa")
    additional_bytes = pissa.memory.loading_tensor_bytes - random_start.memory.loading_tensor_bytes
    assert additional_bytes == pissa.decompositions.peak_bytes


def test_the_time_of_a_run_includes_the_answers_of_all_evaluations(plan):
    new_plan = plan(**ANSWERS, epochs=3)
    seconds_of_steps = new_plan.steps.total_steps * new_plan.speed.seconds_per_step
    assert new_plan.num_evaluations == 3
    assert new_plan.seconds == pytest.approx(seconds_of_steps + 3 * new_plan.answers.seconds)
    assert_mentions(plan_text(new_plan), "answers ", "64 held-out rows", "3 times")
    assert plan_json(new_plan)["answers"]["rows"] == 64
    assert plan(eval_data="heldout.jsonl").answers is None


def test_ranks_generate_different_batches_of_answers_with_one_forward_pass_for_each_token(plan):
    on_8_ranks, on_1_rank = plan(**ANSWERS).answers, plan(**ANSWERS, ranks=1).answers
    assert on_1_rank.passes == 2 * on_1_rank.tokens  # 64 rows are two batches of 32
    assert on_8_ranks.passes == on_8_ranks.tokens
    assert on_1_rank.seconds == pytest.approx(2 * on_8_ranks.seconds)


def test_answers_take_longer_at_zero_3_and_on_a_cpu(plan):
    new_plan = plan(**ANSWERS)
    sharded = with_layout(new_plan, zero_stage=3)  # gathers the base for each token
    assert sharded.answers.seconds > 10 * new_plan.answers.seconds
    on_gpu = plan(**ANSWERS, ranks=1)
    on_cpu = plan(**ANSWERS, ranks=1, hardware=LARGE_CPU, zero_stage=2)
    assert on_cpu.answers.seconds > 10 * on_gpu.answers.seconds


def test_longer_answers_are_in_smaller_batches(plan):
    """The 64 rows are 8 batches of 8 answers, because prompts and answers have 4008 tokens."""
    new_plan = plan(**ANSWERS, ranks=1)
    prompt_tokens, answer_tokens = 3000, 1000
    long_answers = answers(
        new_plan.shape, new_plan.settings, new_plan.layout, new_plan.hardware,
        (prompt_tokens, answer_tokens),
    )  # fmt: skip
    assert batch_rows(prompt_tokens + long_answers.tokens) == 8
    assert long_answers.passes == 8 * long_answers.tokens


def test_on_a_very_fast_gpu_a_forward_pass_takes_the_time_of_its_kernel_launches(plan):
    fast = replace(gpu(80), flops=1e20, memory_bandwidth=1e18)
    new_plan = plan(**ANSWERS, ranks=1, hardware=fast)
    cost = cost_per_token(
        new_plan.shape, new_plan.settings, new_plan.training_dtype, is_sharded=False
    )
    launch_seconds = new_plan.answers.passes * cost.kernels * KERNEL_S
    assert new_plan.answers.seconds == pytest.approx(launch_seconds, rel=0.01)


def test_an_answer_has_the_mean_supervised_tokens_of_a_document_once_they_are_counted(plan):
    """Before, half of the 200 tokens of a document are assumed to be its answer."""
    estimated = plan(**ANSWERS)
    counts = LengthLoss(documents=1000, longer=0, tokens=30_000, lost=0, keeps_99=99, keeps_all=99)
    counted = replace(estimated, data=replace(estimated.data, length_loss=counts))
    assert estimated.answers.tokens == 200 / 2 + EXTRA_TOKENS
    assert counted.answers.tokens == 30_000 / 1000 + EXTRA_TOKENS


@pytest.mark.parametrize(
    ("frequency", "total_steps"),
    [
        (Frequency(times=1, period=7), 30),
        (Frequency(times=1, period=10), 30),
        (Frequency(times=1, period=0.3), 30),
        (Frequency(times=3), 29),
        (Frequency(times=1), 8),
    ],
)
def test_the_predicted_number_of_evaluations_equals_that_of_the_training_loop(
    frequency, total_steps
):
    """The loop evaluates at the steps that are due, and after the last step."""
    steps_per_epoch = 8
    is_evaluated = [
        frequency.is_due(step, steps_per_epoch, total_steps) or step == total_steps
        for step in range(1, total_steps + 1)
    ]
    assert frequency.count(total_steps, steps_per_epoch) == sum(is_evaluated)
