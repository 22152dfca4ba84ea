"""Predicted bytes of live tensors are within a tenth of what CPU runs have, in every kind of run.

Some of the cases of tests/bench/memory.py, which measures and prints them all.
"""

import pytest

from tests.bench.memory import error_of, run

pytestmark = pytest.mark.engine

CASES = [
    "fp32 zero1 ckpt-off 64",
    "fp32 zero3 ckpt-on 256",
    "bf16 zero2 ckpt-off 64",
    "bf16 zero3 ckpt-off 256",
    "nf4 zero1 ckpt-on 64",
    "nf4 zero3 ckpt-on 64",
    "int8",
    "dropout",
    "dora nf4 dropout",
    "gemma2",
    "gpt_neox",
    "mixtral zero3",
    "experts zero3",
    "experts mixed ckpt-3-of-8",
    "zero2 ckpt-3-of-8",
    "qwen3_moe mixed ckpt-3-of-8",
    "packed bf16 zero2 ckpt-off",
    "packed gemma2",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where models that several cases share are kept."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_predicted(models, name):
    found = run(name, models)
    assert abs(error_of(found)) < 0.1, found["terms"]
