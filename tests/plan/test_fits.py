"""The table of models that fit on given hardware, with the longest sequence for each.

A row has two cells, `lora` and `qlora`: the longest length that fits and its predicted speed, or
None if no length fits.
"""

from dataclasses import replace

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Cluster
from pipeline.plan.fits import fit_rows
from pipeline.plan.given.published import published_models
from tests.plans import gpu

pytestmark = pytest.mark.unit

NAMES = ("meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-8B", "openai/gpt-oss-20b",
         "Qwen/Qwen3-32B", "HuggingFaceTB/SmolLM2-135M")  # fmt: skip
MODELS = [model for model in published_models() if model.name in NAMES]
QWEN = next(model for model in MODELS if model.name == "Qwen/Qwen3-32B")
AWQ = replace(  # a checkpoint that is already quantised, which a rule refuses as a base
    QWEN, name="awq", config=QWEN.config | {"quantization_config": {"quant_method": "awq"}}
)


def settings(**run_settings):
    return RunSettings(model="MODEL", train_data="train.jsonl", output_dir="run", **run_settings)


SETTINGS = settings(max_length=1024)


def cluster(gib, count=1):
    return Cluster(hardware=gpu(gib, count), nodes=1, ranks_per_node=count)


def rows_by_model(gib, count=1, run_settings=SETTINGS):
    return {row.name: row for row in fit_rows(MODELS, run_settings, cluster(gib, count))}


def test_rows_are_sorted_by_size_and_have_the_rules_that_refuse_the_model():
    table = {row.name: row for row in fit_rows([*MODELS, AWQ], SETTINGS, cluster(80))}
    assert len(table) == len(NAMES) + 1
    sizes = [row.parameters for row in table.values()]
    assert sizes == sorted(sizes)
    assert "prequantised-base" in table["awq"].rules
    assert table["Qwen/Qwen3-8B"].rules == ()


def test_more_memory_and_fewer_bits_fit_longer_sequences():
    small, large, eight_large = rows_by_model(24), rows_by_model(80), rows_by_model(80, 8)

    def lengths(table):
        return [fit.length if fit else 0 for row in table.values() for fit in (row.lora, row.qlora)]

    by_memory = zip(lengths(small), lengths(large), lengths(eight_large), strict=True)
    assert all(list(of_cell) == sorted(of_cell) for of_cell in by_memory)
    assert large["meta-llama/Llama-3.3-70B-Instruct"].lora is None
    assert large["meta-llama/Llama-3.3-70B-Instruct"].qlora is not None
    assert eight_large["meta-llama/Llama-3.3-70B-Instruct"].lora is not None
    assert large["Qwen/Qwen3-32B"].lora.length < large["Qwen/Qwen3-32B"].qlora.length


def test_speed_is_predicted_for_sequences_of_max_length():
    short, long = (
        rows_by_model(80, run_settings=settings(max_length=length))["Qwen/Qwen3-8B"]
        for length in (1024, 16384)
    )
    assert short.lora.length == long.lora.length
    assert short.lora.tokens_per_second > long.lora.tokens_per_second
