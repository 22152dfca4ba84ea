"""Fixtures that plan a run for a model of which only a config.json exists."""

import json

import pytest

from pipeline.config.settings import RunSettings
from pipeline.plan.given.catalogue import gpu_named
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import plan_and_candidates
from tests.plans import LLAMA_8B

H100 = gpu_named("h100-80gb")


@pytest.fixture
def plan_and_candidates_of(tmp_path):
    """Function that returns the plan and all candidates of a run; default: 8 H100 of 80 GB."""

    def make(config=LLAMA_8B, hardware=H100, ranks=8, nodes=1, **settings):
        (tmp_path / "config.json").write_text(json.dumps(config))
        values = {"model": str(tmp_path), "train_data": "t", "output_dir": "o", "lora_r": 16}
        run = RunSettings.model_validate(values | settings)
        shape = read_shape(run.model)
        return plan_and_candidates(run, shape, hardware, nodes=nodes, ranks_per_node=ranks)

    return make


@pytest.fixture
def plan_of(plan_and_candidates_of):
    return lambda *arguments, **keywords: plan_and_candidates_of(*arguments, **keywords)[0]


@pytest.fixture
def candidates_of(plan_and_candidates_of):
    return lambda *arguments, **keywords: plan_and_candidates_of(*arguments, **keywords)[1]


@pytest.fixture
def layout_of(plan_of):
    return lambda *arguments, **keywords: plan_of(*arguments, **keywords).layout
