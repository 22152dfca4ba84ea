"""The fast paths give the gradients of the plain computation, at every stage and for every base.

`fast_paths` are faster computations of the same numbers; `fast_paths: false` computes as PyTorch
and DeepSpeed do.
"""

from dataclasses import replace
from functools import cache

import pytest
from torch import nn

from pipeline.model.fp32_kernels import multiply_in_fp32
from pipeline.plan.given.catalogue import cpu_of
from pipeline.train import engine
from tests.ranks import run_ranks
from tests.train.test_packed import PACKS
from tests.train.test_packed import train as train_packed
from tests.train_tiny import distance, train_tiny

pytestmark = pytest.mark.engine

NF4, INT8, CHECKPOINTED = (
    {"load_in_4bit": True},
    {"load_in_8bit": True},
    {"gradient_checkpointing": True},
)
STEPS = 3
# Name of a group -> name -> settings of the runs that its ranks train one after the other.
GROUPS = {
    "lora": {
        "zero1": {"zero_stage": 1},
        "zero2": {"zero_stage": 2},
        "zero2 checkpointed": {"zero_stage": 2} | CHECKPOINTED,
        "zero3": {"zero_stage": 3},
        "zero3 checkpointed": {"zero_stage": 3} | CHECKPOINTED,
    },
    "quantised": {
        "nf4 zero1": {"zero_stage": 1} | NF4,
        "nf4 zero2 checkpointed": {"zero_stage": 2} | NF4 | CHECKPOINTED,
        "nf4 zero3": {"zero_stage": 3} | NF4,
        "int8": {"zero_stage": 2, "batch_size": 1} | INT8,
    },
}


def train_with_and_without(session, train, folder, runs, *arguments):
    """Name of each run -> its results with the fast paths, and without."""
    return {
        name: [
            train(session, folder, settings | {"fast_paths": is_fast}, *arguments)
            for is_fast in (True, False)
        ]
        for name, settings in runs.items()
    }


def assert_same(fast, plain):
    assert fast["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert distance(fast["gradients"], plain["gradients"]) < 1e-6
    assert distance(fast["weights"], plain["weights"]) < 1e-5


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function: name of a group -> the results of its runs; the ranks start once."""

    @cache
    def train(name):
        runs = {key: {"batch_size": 2} | settings for key, settings in GROUPS[name].items()}
        folder = tmp_path_factory.mktemp("group")
        arguments = (train_tiny, tiny_model, runs, STEPS)
        return run_ranks(train_with_and_without, *arguments, tmp_path=folder)[0]

    return train


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, runs in GROUPS.items() for name in runs]
)
def test_gradients_equal_those_of_the_plain_computation(results_of, group, name):
    assert_same(*results_of(group)[name])


def test_gradients_of_packs_equal_those_of_the_plain_computation(tiny_model, tmp_path):
    runs = {stage: {"zero_stage": stage, "batch_size": 1} for stage in (1, 2, 3)}
    arguments = (train_packed, tiny_model, runs, PACKS)
    results = run_ranks(train_with_and_without, *arguments, tmp_path=tmp_path)[0]
    for fast, plain in results.values():
        assert_same(fast, plain)


def in_fp32_and_bf16(session, folder, settings):
    """First gradients of three runs, and the number of linear layers with fp32 kernels.

    The runs: in fp32; in bf16 with fp32 kernels; in bf16 without.
    """
    num_fp32_layers = 0

    def multiply_in_fp32_and_count(model):
        nonlocal num_fp32_layers
        multiply_in_fp32(model)
        layers = [module for module in model.modules() if type(module) is nn.Linear]
        num_fp32_layers = sum("forward" in vars(layer) for layer in layers)

    def first_gradients(**change):
        return train_tiny(session, folder, settings | change, 1)["gradients"]

    engine.multiply_in_fp32 = multiply_in_fp32_and_count
    bf16_is_slow = replace(cpu_of(2, 2**34), is_slow_in_bf16=True)
    exact = first_gradients()
    fast = first_gradients(bf16=True, hardware=bf16_is_slow)
    return exact, fast, first_gradients(bf16=True), num_fp32_layers


@pytest.mark.parametrize("stage", [2, 3])
def test_fp32_kernels_on_a_cpu_that_is_slow_in_bf16_are_as_exact_as_bf16(
    tiny_model, tmp_path, stage
):
    settings = {"zero_stage": stage, "batch_size": 4, "gradient_checkpointing": stage == 3}
    results = run_ranks(in_fp32_and_bf16, tiny_model, settings, tmp_path=tmp_path)
    exact, fast, plain, num_fp32_layers = results[0]
    assert distance(fast, exact) < 1.1 * distance(plain, exact) < 0.1
    assert num_fp32_layers >= 2 * 7  # linear layers; their fp32 products may equal those in bf16
    assert distance(fast, plain) > 0  # the fp32 kernels of attention were used
