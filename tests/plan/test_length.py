"""The longest `max_length` that fits, and the memory at a `max_length` that loses fewer tokens."""

from dataclasses import replace

import pytest

from pipeline.config.load import load_settings
from pipeline.config.settings import RunSettings
from pipeline.plan.choose import Cluster, candidates
from pipeline.plan.given.catalogue import gpu_named
from pipeline.plan.given.data_size import DataSize, LengthLoss
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.published import published_shape
from pipeline.plan.given.shape import shape_of
from pipeline.plan.length import length_texts, longest_length, longest_text
from pipeline.plan.plan import make_plan
from tests import ROOT
from tests.messages import assert_mentions
from tests.plans import CPU, LLAMA_8B, SMOLLM2, gpu

pytestmark = pytest.mark.unit

RUNS = [  # config.json, hardware, ranks, settings
    (LLAMA_8B, gpu(80, count=8), 8, {}),
    (LLAMA_8B, gpu(24, count=1), 1, {"load_in_4bit": True}),
    (LLAMA_8B, replace(gpu(80, count=1), host_bytes=64 * GIB), 1, {}),
    (SMOLLM2, CPU, 2, {"offload_activations": False}),
]


def settings(**changes):
    values = {"model": "m", "train_data": "t", "output_dir": "o", "lora_r": 16}
    return RunSettings.model_validate(values | changes)


@pytest.mark.parametrize(("config", "hardware", "ranks", "changes"), RUNS)
def test_the_longest_length_fits_and_5_percent_more_does_not(config, hardware, ranks, changes):
    shape = shape_of(config, "m")
    cluster = Cluster(hardware=hardware, nodes=1, ranks_per_node=ranks)
    longest = longest_length(settings(**changes), shape, cluster).max_length
    for length, fits in ((longest, True), (int(1.05 * longest), False)):
        best = candidates(settings(**changes, max_length=length), shape, cluster)[0]
        assert (best.refusal is None) == fits


def test_the_text_has_the_longest_length_on_all_devices_and_on_one_device():
    shape = replace(shape_of(LLAMA_8B, "m"), max_positions=131_072)
    cluster = Cluster(hardware=gpu(80), nodes=1, ranks_per_node=8)
    text = longest_text(settings(), shape, cluster)
    assert_mentions(text, "tokens on 8 x", "1 of them", "host memory", "131,072 positions")
    tiny = Cluster(hardware=gpu(1, count=1), nodes=1, ranks_per_node=1)
    assert_mentions(longest_text(settings(), shape, tiny), "fewer than 1,024 tokens fit on 1 x")


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_parallel_size": 4},
        {"zero_stage": 3, "hpz_partition_size": 8},
        {"batch_size": 1, "gradient_accumulation_steps": 2, "global_batch_size": 16},
    ],
)
def test_settings_that_depend_on_the_number_of_ranks_are_ignored_for_one_device(changes):
    shape = shape_of(LLAMA_8B, "m")
    cluster = Cluster(hardware=gpu(80), nodes=1, ranks_per_node=8)

    def text_on_one_device(changed_settings):
        text = longest_text(settings(**changed_settings), shape, cluster)
        _text_on_all_devices, text_on_one = text.split("; ")
        return text_on_one.split(" (")[0]  # without the layout, which is in parentheses

    text = text_on_one_device(changes)
    assert_mentions(text, "1 of them")
    assert text == text_on_one_device({})


def test_the_run_file_for_long_trajectories_fits_on_its_machine_and_on_one_gpu():
    run = load_settings(ROOT / "launch/runs/agents-long.yaml")
    shape = published_shape(run.model)
    assert run.max_length == shape.max_positions == 131_072
    hardware = gpu_named("h100-80gb")
    for ranks in (8, 1):
        plan = make_plan(run, shape, hardware, nodes=1, ranks_per_node=ranks)
        assert plan.layout.micro_batch_size == 1
        assert plan.layout.mlp_tiles > 1
        assert plan.layout.global_batch_size == 8


@pytest.mark.parametrize(
    ("over_length", "lost", "facts"),
    [
        ("truncate", 400, ["truncated", "loses 400 of 10,000 supervised tokens (4 %)"]),
        ("drop", 900, ["dropped", "loses 900 of 10,000 supervised tokens (9 %)"]),
        (
            "split",
            0,
            [
                "split",
                "no supervised token is lost",
                "99 % of the tokens in documents that are not split",
            ],
        ),
        ("fail", 400, ["over_length: fail ends the run"]),
    ],
)
def test_the_lost_tokens_are_stated_for_every_over_length(over_length, lost, facts):
    length_loss = LengthLoss(
        documents=100, longer=7, tokens=10_000, lost=lost,
        keeps_99=4096, keeps_all=9_000_000,  # the second is too long for 8 GPUs
    )  # fmt: skip
    data = DataSize(documents=100, tokens=9000, longest=9, is_exact=True, length_loss=length_loss)
    shape, run = shape_of(LLAMA_8B, "m"), settings(over_length=over_length)
    cluster = Cluster(hardware=gpu(80), nodes=1, ranks_per_node=8)
    texts = length_texts(data, run, shape, cluster)
    assert_mentions(
        " ".join(texts), "7 of 100 documents", "more than 1,024 tokens", *facts,
        "max_length 4,096 keeps 99 %", "max_length 9,000,000 keeps 100 %", ", but needs",
    )  # fmt: skip
    assert len(length_texts(data, run, shape, cluster=None)) == 1  # only the lost tokens
    no_longer_documents = replace(data, length_loss=replace(length_loss, longer=0))
    assert length_texts(no_longer_documents, run, shape, cluster) == []


def test_the_text_says_if_a_length_exceeds_the_positions_of_the_model():
    length_loss = LengthLoss(
        documents=9, longer=2, tokens=900, lost=90, keeps_99=4096, keeps_all=140_000
    )
    data = DataSize(documents=9, tokens=900, longest=9, is_exact=True, length_loss=length_loss)
    shape = replace(shape_of(LLAMA_8B, "m"), max_positions=131_072)
    cluster = Cluster(hardware=gpu(80), nodes=1, ranks_per_node=8)
    _, within, beyond = length_texts(data, settings(), shape, cluster)
    assert "positions" not in within
    assert_mentions(beyond, "max_length 140,000", "131,072 positions")
