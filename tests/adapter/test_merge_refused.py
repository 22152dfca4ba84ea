"""Inputs that cannot be merged are refused, and existing folders are kept."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.adapter import merge_output
from pipeline.errors import RankZeroError
from tests.adapter.merged import (
    contents,
    edit_json,
    make_adapter,
    make_pair,
    merge_adapter,
    tensors,
)
from tests.messages import assert_mentions, refused

pytestmark = pytest.mark.tensor


# Functions that damage an input in the folder of a pair: base/ and adapter/.


def module_of_another_base(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    renamed = {key.replace("layers.1.", "layers.5."): t for key, t in load_file(path).items()}
    save_file(renamed, path)


def shape_of_another_base(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if "down_proj.lora_A" in key)
    save_file(weights | {key: torch.ones(4, 48)}, path)


def wrong_r(pair):
    edit_json(pair / "adapter" / "adapter_config.json", r=8)


def unknown_key(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.ones(4)}, path)


def without_one_matrix(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    kept = {
        k: t
        for k, t in load_file(path).items()
        if not k.endswith("1.self_attn.q_proj.lora_B.weight")
    }
    save_file(kept, path)


def cut_adapter(pair):
    path = pair / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def no_adapter(pair):
    shutil.rmtree(pair / "adapter")


def quantised(pair):
    edit_json(pair / "base" / "config.json", quantization_config={"quant_method": "gptq"})


def no_safetensors(pair):
    for path in (pair / "base").glob("*safetensors*"):
        path.unlink()
    (pair / "base" / "pytorch_model.bin").write_bytes(b"x")


def missing_shard(pair):
    next((pair / "base").glob("*.safetensors")).unlink()


def outside_index(pair):
    path = pair / "base" / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=dict.fromkeys(weight_map, "../outside.safetensors"))


def tied_head(pair):
    shutil.rmtree(pair / "adapter")
    make_adapter(pair / "base", pair / "adapter", ["lm_head"])
    edit_json(pair / "base" / "config.json", tie_word_embeddings=True)


def option(**changes):
    """A function that changes options in the adapter's config."""
    return lambda pair: edit_json(pair / "adapter" / "adapter_config.json", **changes)


def renamed_keys(old, new):
    """A function that replaces a part of each key in the adapter."""

    def rename(pair):
        path = pair / "adapter" / "adapter_model.safetensors"
        save_file({key.replace(old, new): t for key, t in load_file(path).items()}, path)

    return rename


def git_lfs_pointer(pair):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (pair / "adapter" / "adapter_model.safetensors").write_text(pointer)


def magnitude_of_two_axes(pair):
    shutil.rmtree(pair / "adapter")
    make_adapter(pair / "base", pair / "adapter", use_dora=True)
    path = pair / "adapter" / "adapter_model.safetensors"
    save_file({k: t[None] if "magnitude" in k else t for k, t in load_file(path).items()}, path)


def full_disk(pair):
    """Create a file that makes the test report a full disk."""
    (pair / "full").touch()


# Name -> function that damages an input, and facts of the message.
REFUSED = {
    "module": (module_of_another_base, ["7 of 14", "model.layers.5", "model.layers.1"]),
    "shape": (shape_of_another_base, ["down_proj.weight", (32, 64), (32, 48)]),
    "r": (wrong_r, ["adapter_config.json", "r", "8"]),
    "key": (unknown_key, ["lm_head.weight", (259, 32), (4,)]),
    "half": (without_one_matrix, ["q_proj", "A, B"]),
    "cut": (cut_adapter, ["adapter_model.safetensors", "bytes", "header"]),
    "absent": (no_adapter, ["adapter_config.json"]),
    "quantised": (quantised, ["gptq", "--base"]),
    "pickle": (no_safetensors, ["model.safetensors", "model.safetensors.index.json"]),
    "shard": (missing_shard, ["model-00003-of-00004.safetensors"]),
    "outside": (outside_index, ["../outside.safetensors", "model.safetensors.index.json"]),
    "tied": (tied_head, ["lm_head.weight"]),
    "dora": (option(use_dora=True), ["magnitude"]),
    "ranks": (option(rank_pattern={"q_proj": 8}), ["q_proj", "r is 8"]),
    "pattern": (option(alpha_pattern={"q_(proj": 8}), ["q_(proj"]),
    "no-mapping": (option(rank_pattern=["q_proj"]), ["adapter_config.json", "type"]),
    "no-number": (option(rank_pattern={"q_proj": "x"}), ["adapter_config.json", "x"]),
    "nan": (option(lora_alpha=float("nan")), ["adapter_config.json", "lora_alpha", "finite"]),
    "overflow": (option(lora_alpha=10**400), ["adapter_config.json", "lora_alpha", "finite"]),
    "text": (option(alpha_pattern={"q_proj": "8"}), ["adapter_config.json", "alpha_pattern"]),
    "zero": (option(rank_pattern={"q_proj": 0}), ["adapter_config.json", "rank_pattern", "0"]),
    "prefix": (renamed_keys("base_model.model.", ""), ["base_model.model.", "save_pretrained"]),
    "compiled": (renamed_keys("model.layers", "_orig_mod.model.layers"), ["_orig_mod", "peft"]),
    "named": (renamed_keys("lora_A", "lora_A.default"), ["lora_A.default", "save_pretrained"]),
    "pointer": (git_lfs_pointer, ["adapter_model.safetensors", "git lfs pull"]),
    "magnitude": (magnitude_of_two_axes, ["down_proj", "magnitude", (1, 32)]),
    "pissa": (option(init_lora_weights="pissa"), ["init_lora_weights", "merge_and_unload"]),
    "kind": (option(peft_type="LOHA"), ["peft_type", "LOHA", "merge_and_unload"]),
    "unknown": (option(new_option_of_peft=1), ["new_option_of_peft", "merge_and_unload"]),
    "disk": (full_disk, ["0.0", "--out"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_that_cannot_be_merged_is_refused_and_nothing_is_written(pair, monkeypatch, name):
    damage, facts = REFUSED[name]
    damage(pair)
    if (pair / "full").exists():
        monkeypatch.setattr(
            merge_output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
        )
    before = contents(pair)
    with refused(*facts):
        merge_adapter(pair / "base", pair / "adapter", pair / "merged")
    assert contents(pair) == before


def test_an_fp16_overflow_is_refused_and_the_previous_merge_is_kept(tmp_path):
    make_pair(tmp_path, "untied-fp16")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before = contents(tmp_path / "merged")
    edit_json(tmp_path / "adapter" / "adapter_config.json", lora_alpha=4e7)
    with refused("float16", "bf16", error=RankZeroError):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert contents(tmp_path / "merged") == before


def test_a_folder_that_no_merge_wrote_is_not_replaced(pair):
    base, adapter = pair / "base", pair / "adapter"
    mine = pair / "mine"
    mine.mkdir()
    merge_adapter(base, adapter, mine)  # empty: nothing to lose
    merge_adapter(base, adapter, mine)
    (mine / "notes.txt").write_text("keep me")
    for out, fact in {mine: "notes.txt", base: base, pair: base, adapter: adapter}.items():
        before = contents(pair)
        with refused(fact, "--out"):
            merge_adapter(base, adapter, out)
        assert contents(pair) == before
    with refused(mine / "notes.txt", "--out"):
        merge_adapter(base, adapter, mine / "notes.txt" / "below")
    other = pair / "other"
    other.mkdir()
    (other / "file").touch()
    with refused(other, "--out"):
        merge_adapter(base, adapter, other)


def test_the_script_merges_and_refuses_wrong_input_without_torch(pair):
    run = pair / "run"
    run.mkdir()
    settings = {"model": str(pair / "base"), "train_data": "t.jsonl", "output_dir": str(run)}
    (run / "run.yaml").write_text(json.dumps(settings))

    def script(*options):
        command = [sys.executable, "-X", "importtime", "launch/merge.py", str(run), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    without_adapter = script()
    assert without_adapter.returncode == 2
    assert_mentions(without_adapter.stderr, run, "no adapter")
    shutil.copytree(pair / "adapter", run / "adapter")
    shape_of_another_base(pair)
    shutil.copytree(pair / "adapter", run / "adapter", dirs_exist_ok=True)
    wrong_shape = script()
    assert wrong_shape.returncode == 2
    assert_mentions(wrong_shape.stderr, "down_proj.weight")
    errors = without_adapter.stderr + wrong_shape.stderr
    assert "| torch\n" not in errors  # a line of -X importtime
    assert "Traceback" not in errors
    shutil.rmtree(run / "adapter")
    make_adapter(pair / "base", run / "adapter")
    done = script("--out", str(run / "here"))
    assert done.returncode == 0, done.stderr
    assert_mentions(done.stdout, run / "here", "14 weights")
    assert tensors(run / "here").keys() == tensors(pair / "base").keys()
