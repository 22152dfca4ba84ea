"""DeepSpeed accepts every config of ds_configs/ without changing its values, and trains with it.

These files are called goldens: a test compares them with the configs that the plan generates
(ds_configs/generate.py). A name begins with lora or qlora, and has -1x if it is for one rank.
"""

import json
from dataclasses import replace
from functools import cache

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import groups

from pipeline.model.adapter import attach_adapter
from pipeline.model.base import load_base
from pipeline.train.engine import Engine
from tests import ROOT
from tests.model.test_families import make_family
from tests.ranks import run_ranks
from tests.tiny import Documents, make_plan
from tests.train_tiny import batches_of_step

pytestmark = pytest.mark.engine

GOLDENS = sorted((ROOT / "ds_configs").glob("*.json"))


def on_cpu(config):
    """The config without the fused optimizer, which needs a GPU; all else is unchanged."""
    params = {k: v for k, v in config["optimizer"]["params"].items() if k != "fused"}
    return config | {"optimizer": config["optimizer"] | {"params": params}}


def without_defaults(parsed, requested):
    """The parsed value of a key; of a mapping, only the keys that the config has."""
    return {key: parsed[key] for key in requested} if isinstance(requested, dict) else parsed


def train(session, folder, golden, settings):
    """Train two steps with a golden config.

    Returns the losses, the ZeRO values that DeepSpeed parsed, and a set of booleans: whether the
    sharded parameters have a second copy within the node (empty without sharded parameters).
    """
    config = on_cpu(json.loads(golden.read_text(encoding="utf-8")))
    parsed_config = DeepSpeedConfig(dict(config))
    settings = settings | {
        "zero_stage": config["zero_optimization"]["stage"],
        "gradient_accumulation_steps": config["gradient_accumulation_steps"],
        "batch_size": 1,
        "global_batch_size": "auto",
        "bf16": config["bf16"]["enabled"],
    }
    plan = make_plan(folder, session.placement.world_size, 100, **settings)
    plan = replace(plan, deepspeed=config)
    engine = Engine(attach_adapter(load_base(plan, session.device), plan), plan)
    split, losses = Documents(100), []
    for step in range(2):
        batches, supervised = batches_of_step(plan, split, step, session.placement.rank)
        result = engine.optimizer_step(batches, supervised, 1e-2)
        assert result.was_applied
        assert result.grad_norm > 0
        losses.append(session.sum_over_ranks([result.loss_sum])[0] / supervised)
    frozen = [p for p in engine.deepspeed.module.parameters() if not p.requires_grad]
    has_node_copy = {p.ds_secondary_tensor is not None for p in frozen if hasattr(p, "ds_id")}
    return losses, parsed_config.zero_config.model_dump(by_alias=True, mode="json"), has_node_copy


def model_of(golden):
    return "qwen3_moe" if "moe" in golden.stem else "llama"


def world_size_of(golden):
    return 1 if "-1x" in golden.stem else 2


def train_each(session, folder, goldens):
    """Results of `train` by the path of the golden config; the ranks start once for all."""
    results = {}
    for golden in goldens:
        settings = {
            "load_in_4bit": golden.stem.startswith("qlora"), "lora_target_modules": "all-linear",
        }  # fmt: skip
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed expects one engine in a process
        results[golden] = train(session, folder, golden, settings)
    return results


@pytest.fixture(scope="module")
def results_of(tiny_model, tmp_path_factory):
    """Function from model and number of ranks to the results of the golden configs for them."""

    @cache
    def train_goldens(model, world_size):
        goldens = [
            golden
            for golden in GOLDENS
            if model_of(golden) == model and world_size_of(golden) == world_size
        ]
        temporary = tmp_path_factory.mktemp("goldens")
        folder = tiny_model if model == "llama" else make_family(temporary / "model", model)
        results_by_rank = run_ranks(
            train_each, folder, goldens, tmp_path=temporary, world_size=world_size
        )
        return results_by_rank[0]

    return train_goldens


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_a_golden_config_is_parsed_unchanged_and_trains(results_of, golden):
    losses, parsed, has_node_copy = results_of(model_of(golden), world_size_of(golden))[golden]
    requested = json.loads(golden.read_text(encoding="utf-8"))["zero_optimization"]
    parsed_as_requested = {
        key: without_defaults(parsed[key], value) for key, value in requested.items()
    }
    assert parsed_as_requested == requested
    assert all(0 < loss < 20 for loss in losses)
    # Only with hpZ do sharded parameters have a second copy within the node.
    assert has_node_copy == ({"hpz" in golden.stem} if "zero3" in golden.stem else set())
