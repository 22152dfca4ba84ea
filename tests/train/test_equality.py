"""Losses, gradients and weights are equal for every ZeRO stage, micro-batch size and world size.

The global batch has 8 documents in every run. A "split" is one division of them: the number of
ranks, the ZeRO stage and the micro-batch size.
"""

from functools import partial

import pytest

from pipeline.model import loss as loss_module
from tests.ranks import run_groups_once, run_ranks
from tests.train_tiny import build_engine, distance, train_each, train_tiny

pytestmark = pytest.mark.engine

# Relative errors of the gradients of the first step, the losses, and the weights after 5 steps, in
# fp32 without dropout (docs/architecture.md).
MAX_GRADIENT_ERROR = MAX_LOSS_ERROR = 1e-6
MAX_WEIGHT_ERROR = 1e-5

CHECKPOINTED = {"gradient_checkpointing": True}
NF4 = {"load_in_4bit": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
INT8 = {"load_in_8bit": True}
# Name of a group -> quantisation of its base, number of ranks, and settings of the runs that these
# ranks train one after the other.
GROUPS = {
    "1 rank": (
        {}, 1,
        [{"zero_stage": 2, "batch_size": 8}, {"zero_stage": 2, "batch_size": 2} | CHECKPOINTED],
    ),
    "2 ranks": (
        {}, 2,
        [
            {"zero_stage": 1, "batch_size": 2},
            {"zero_stage": 1, "batch_size": 4} | CHECKPOINTED,
            {"zero_stage": 2, "batch_size": 1},
            {"zero_stage": 2, "batch_size": 4} | CHECKPOINTED,
            {"zero_stage": 3, "batch_size": 2},
            {"zero_stage": 3, "batch_size": 4} | CHECKPOINTED,
        ],
    ),
    "4 ranks": ({}, 4, [{"zero_stage": 2, "batch_size": 2}, {"zero_stage": 3, "batch_size": 1}]),
    "nf4": (
        NF4, 2,
        [
            {"zero_stage": 1} | CHECKPOINTED,
            {"zero_stage": 2, "batch_size": 4},
            {"zero_stage": 2} | CHECKPOINTED,
            {"zero_stage": 3, "batch_size": 2},
        ],
    ),
    "fp4": (FP4, 2, [{"zero_stage": 1, "batch_size": 2}, {"zero_stage": 2} | CHECKPOINTED]),
    "int8": (
        INT8, 2,
        [{"zero_stage": 1, "batch_size": 1}, {"zero_stage": 2, "batch_size": 1} | CHECKPOINTED],
    ),
}  # fmt: skip
SPLITS = [(name, index) for name, (*_, splits) in GROUPS.items() for index in range(len(splits))]
_references: dict[str, dict] = {}  # quantisation -> results of `train_tiny`


def reference(tiny_model, tmp_path, quantisation: dict) -> dict:
    """Results of one rank with eight micro-batches of one document: no padding, no sharding."""
    key = str(quantisation)
    if key not in _references:
        settings = quantisation | {"zero_stage": 2, "batch_size": 1}
        [_references[key]] = run_ranks(
            train_tiny, tiny_model, settings, tmp_path=tmp_path, world_size=1
        )
    return _references[key]


def assert_same(result: dict, expected: dict) -> None:
    assert result["losses"] == pytest.approx(expected["losses"], rel=MAX_LOSS_ERROR)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert distance(result["gradients"], expected["gradients"]) < MAX_GRADIENT_ERROR
    assert distance(result["weights"], expected["weights"]) < MAX_WEIGHT_ERROR


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its splits; the ranks start once."""
    groups = {
        name: (world_size, [quantisation | split for split in splits])
        for name, (quantisation, world_size, splits) in GROUPS.items()
    }
    return run_groups_once(groups, train_each, tiny_model, tmp_path_factory)


@pytest.mark.parametrize(("group", "index"), SPLITS)
def test_training_is_the_same_for_every_split_and_stage(
    tiny_model, tmp_path, results_of, group, index
):
    quantisation, *_ = GROUPS[group]
    assert_same(results_of(group)[index], reference(tiny_model, tmp_path, quantisation))


def train_over_a_short_step(session, folder, runs):
    """Two epochs of 13 documents, in four steps of 8, 5, 8 and 5."""
    return train_each(session, folder, runs, 4, 13)


def test_a_short_last_step_is_the_same_for_every_split_and_so_are_epochs_after_it(
    tiny_model, tmp_path
):
    on_one_rank = [{"zero_stage": 2, "batch_size": 8}]
    on_two_ranks = [
        {"zero_stage": 2, "batch_size": 1},
        {"zero_stage": 3, "batch_size": 1},
        {"zero_stage": 3, "batch_size": 2} | CHECKPOINTED,
    ]
    train = partial(run_ranks, train_over_a_short_step, tiny_model, tmp_path=tmp_path)
    [expected] = train(on_one_rank, world_size=1)[0]
    assert len(expected["losses"]) == 4
    for result in train(on_two_ranks, world_size=2)[0]:
        assert_same(result, expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_storage_dtype_of_4_bit_weights_does_not_change_the_numbers(
    tiny_model, tmp_path, stage
):
    bf16 = NF4 | {"bf16": True, "batch_size": 2, "zero_stage": stage}
    runs = [bf16 | {"bnb_4bit_quant_storage": dtype} for dtype in ("uint8", "bfloat16")]
    as_bytes, as_bf16 = run_ranks(train_each, tiny_model, runs, 2, tmp_path=tmp_path)[0]
    assert as_bf16["losses"] == as_bytes["losses"]
    assert distance(as_bf16["gradients"], as_bytes["gradients"]) == 0
    assert distance(as_bf16["weights"], as_bytes["weights"]) == 0


def test_the_reference_learns_and_quantisation_changes_its_losses(tiny_model, tmp_path):
    plain, nf4, int8 = (
        reference(tiny_model, tmp_path, quantisation) for quantisation in ({}, NF4, INT8)
    )
    trained = [key for key, value in plain["weights"].items() if "lora_B" in key and value.any()]
    assert len(trained) == 2 * 7  # seven linear layers in each of two decoder layers
    assert abs(nf4["losses"][0] / plain["losses"][0] - 1) > 1e-4
    assert abs(int8["losses"][0] / plain["losses"][0] - 1) > 1e-7


def train_and_name_the_optimizer(session, folder, settings):
    names = [
        type(build_engine(session, folder, each)[1].deepspeed.optimizer).__name__
        for each in settings
    ]
    return names, train_each(session, folder, settings)


def test_zero1_in_bf16_uses_the_optimizer_class_of_zero2(tiny_model, tmp_path):
    settings = {"bf16": True, "batch_size": 2, "gradient_accumulation_steps": 2}
    runs = [settings | {"zero_stage": stage} for stage in (1, 2)]
    classes, (stage1, stage2) = run_ranks(
        train_and_name_the_optimizer, tiny_model, runs, tmp_path=tmp_path
    )[0]
    assert classes == ["DeepSpeedZeroOptimizer"] * 2
    # Stage 1 accumulates gradients in bf16 (rule zero1-bf16-accumulation).
    assert distance(stage1["gradients"], stage2["gradients"]) < 1e-2
    assert stage1["losses"] == pytest.approx(stage2["losses"], rel=2e-3)


def train_in_chunks(session, folder, runs):
    # A chunk has the logits of five tokens: 4 bytes for each of the 259 tokens in the vocabulary.
    loss_module.LOGITS_CHUNK_BYTES = 4 * 259 * 5
    return train_each(session, folder, runs)


def test_logits_in_chunks_give_the_same_numbers_at_every_stage(tiny_model, tmp_path):
    expected = reference(tiny_model, tmp_path, {})
    runs = [{"zero_stage": stage, "batch_size": 2, "max_length": 24} for stage in (2, 3)]
    for result in run_ranks(train_in_chunks, tiny_model, runs, tmp_path=tmp_path)[0]:
        assert_same(result, expected)
