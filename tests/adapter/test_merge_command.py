"""The command merge: its defaults, and one message with a remedy for each wrong argument."""

import json
import shutil
import sys

import pytest
import torch

from pipeline.adapter.merge_output import MARKER
from pipeline.cli.merge import merge
from pipeline.files import read_json
from tests.adapter.merged import (
    contents,
    edit_json,
    make_adapter,
    make_pair,
    merge_adapter,
    tensors,
)
from tests.messages import refused

pytestmark = pytest.mark.tensor


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("original"), "tied")


@pytest.fixture
def run(original, tmp_path):
    """A finished run in the folder run; its base is in the folder base."""
    shutil.copytree(original / "base", tmp_path / "base")
    shutil.copytree(original / "adapter", tmp_path / "run" / "adapter")
    settings = {
        "model": str(tmp_path / "base"),
        "train_data": "t.jsonl",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run" / "run.yaml").write_text(json.dumps(settings))
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch):
    """Function: run the command merge with arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
        merge()

    return call


def test_a_run_is_merged_into_its_folder_and_undone(run, command):
    command(run)
    record = read_json(run / "merged" / MARKER)
    assert record["base"] == str(run.parent / "base")
    assert [each["weight"] for each in record["adapters"]] == [1.0]
    command(run, "--undo")
    for name, tensor in tensors(run.parent / "base").items():
        assert torch.allclose(tensors(run / "unmerged")[name], tensor, atol=1e-6)


def test_an_adapter_of_any_folder_is_merged_into_any_base_without_a_run(run, command, tmp_path):
    arguments = ("--base", run.parent / "base", "--adapter", f"{run / 'adapter'}:0.5")
    command(*arguments, "--out", tmp_path / "half", "--dtype", "bf16")
    merge_adapter(run.parent / "base", run / "adapter", tmp_path / "whole")
    base = tensors(run.parent / "base")
    whole, half = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert half[name].dtype == torch.bfloat16
    middle = (base[name] + whole[name]) / 2
    assert torch.allclose(half[name].float(), middle, rtol=2e-2, atol=1e-2)


def test_a_hub_model_in_the_cache_can_be_the_base(run, command, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--org--name" / "snapshots" / "main"
    shutil.copytree(run.parent / "base", cached)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    command("--base", "org/name", "--adapter", run / "adapter", "--out", tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(cached).keys()


def remove_adapter(run):
    shutil.rmtree(run / "adapter")


def remove_base(run):
    shutil.rmtree(run.parent / "base")


def remove_settings(run):
    (run / "run.yaml").unlink()


def quantise_base(run):
    edit_json(run.parent / "base" / "config.json", quantization_config={"quant_method": "awq"})


def no_damage(run):
    del run


# Name -> function that damages an input, arguments, and facts of the message. RUN stands for the
# run folder.
WRONG = {
    "nothing": (no_damage, [], ["--adapter", "--base", "--out"]),
    "no-run": (remove_settings, ["RUN"], ["run.yaml"]),
    "no-adapter": (remove_adapter, ["RUN"], ["no adapter"]),
    "no-base": (remove_base, ["RUN"], ["base", "--base"]),
    "quantised-base": (quantise_base, ["RUN"], ["awq", "--base"]),
    "missing-adapter": (no_damage, ["RUN", "--adapter", "RUN/none:2"], ["RUN/none", "folder"]),
    "missing-base": (no_damage, ["RUN", "--base", "org/none"], ["org/none", "hf download"]),
    "not-quantised": (no_damage, ["RUN", "--onto", "dequantized"], ["load_in_4bit", "original"]),
    "onto-without-run": (
        no_damage,
        ["--onto", "dequantized", "--base", "RUN/../base", "--adapter", "RUN/adapter",
         "--out", "RUN/x"],
        ["--onto", "run folder"],
    ),
    "nothing-to-undo": (no_damage, ["RUN", "--undo"], ["merged", "--base"]),
    "undo-check": (no_damage, ["RUN", "--undo", "--check"], ["--undo", "--check"]),
    "weight": (no_damage, ["RUN", "--adapter", "RUN/adapter:inf"], ["weight", "finite"]),
    "dtype": (no_damage, ["RUN", "--dtype", "int4"], ["--dtype", "bf16"]),
    "run-as-adapter": (no_damage, ["RUN", "--adapter", "RUN"], ["subfolder", "RUN/adapter"]),
    "out-too-long": (no_damage, ["RUN", "--out", f"RUN/{300 * 'x'}"], ["too long", "--out"]),
    "out-is-the-base": (no_damage, ["RUN", "--out", "RUN/../base"], ["--out"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_and_nothing_is_written(run, command, name):
    damage, arguments, facts = WRONG[name]
    damage(run)
    before = contents(run.parent)
    with refused(*(fact.replace("RUN", str(run)) for fact in facts)):
        command(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert contents(run.parent) == before


def test_undo_is_refused_if_the_merge_had_another_adapter_or_weight(run, command):
    command(run, "--adapter", f"{run / 'adapter'}:0.5")
    with refused("--undo", "--adapter"):
        command(run, "--undo")
    with refused(run / "none", "folder"):
        command(run, "--undo", "--adapter", run / "none")
    shutil.rmtree(run / "adapter")
    make_adapter(run.parent / "base", run / "adapter", r=2)
    with refused("--undo", "--adapter"):
        command(run, "--undo")


def test_a_missing_cuda_device_is_refused(run, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("--device", "cpu"):
        command(run, "--device", "cuda")


def test_a_check_without_held_out_rows_is_refused_before_the_merge(run, command):
    with refused("--check", "eval_data"):
        command(run, "--check")
    assert not (run / "merged").exists()
