"""Bad input ends with exit code 2 and one message, before torch is imported or a file changes.

Each case starts `launch/train.py` in a separate process, which prints at its end whether torch was
imported.
"""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import ROOT
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit

SCRIPT = """
import os, runpy, sys
os_exit = os._exit
def report_and_exit(code):
    print("TORCH" if "torch" in sys.modules else "NO-TORCH")
    sys.stdout.flush()
    os_exit(code)
os._exit = report_and_exit
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("launch/train.py", run_name="__main__")
"""
ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


@pytest.fixture
def case(tmp_path, tiny_model):
    """The folder of a valid run, and a function that starts it with changed settings."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(ROW * 4)
    values = {
        "model": str(tmp_path / "model"),
        "train_data": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "lora_r": 4,
    }

    def start(**change) -> tuple[int, str, str]:
        path = tmp_path / "RUN.yaml"
        path.write_text(yaml.safe_dump(values | change))
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path)],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        return result.returncode, result.stdout, result.stderr

    return tmp_path, start


def assert_refused(result: tuple[int, str, str], *facts: object) -> None:
    code, out, err = result
    assert code == 2, out + err
    assert out == "NO-TORCH\n"
    assert "Traceback" not in err
    assert_mentions(err, *facts)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"lora_rnk": 8}, ["RUN.yaml:2", "lora_rnk", "lora_r"]),
        ({"lora_r": "many"}, ["lora_r", "integer", "many"]),
        ({"model": "no/such/folder"}, ["model", "no/such/folder"]),
        ({"train_data": "no/such.jsonl"}, ["train_data", "no/such.jsonl"]),
        ({"eval_data": "no/such.jsonl"}, ["eval_data", "no/such.jsonl"]),
        ({"global_batch_size": 7, "batch_size": 2}, ["global_batch_size", 7, 6, 8]),
        ({"lora_target_modules": ["nothing"]}, ["lora_target_modules", "nothing", "q_proj"]),
        ({"fp16": True, "bf16": True}, ["fp16", "bf16"]),
        ({"fp16": True, "bf16": False}, ["CPU", "fp16-cpu"]),
    ],
)
def test_wrong_settings_are_refused_before_the_run_folder_exists(case, change, facts):
    folder, start = case
    assert_refused(start(**change), *facts)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "train.jsonl:5"),
        ("[1]", "train.jsonl:5"),
        ('{"prompt": "a"}', "train.jsonl:5"),
        ('{"prompt": "a", "completion": ""}', "train.jsonl:5"),
        ('{"messages": []}', "train.jsonl:5"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(case, line, part):
    folder, start = case
    (folder / "train.jsonl").write_text(ROW * 4 + line + "\n")
    assert_refused(start(), part, "max_rejected", folder / "run/data/rejects.jsonl")
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert files == [folder / "run" / "data" / "rejects.jsonl"]
    (reject,) = map(json.loads, files[0].read_text().splitlines())
    assert (reject["file"], reject["line"]) == (str(folder / "train.jsonl"), 5)


def test_an_empty_data_file_is_refused(case):
    folder, start = case
    (folder / "train.jsonl").write_text("")
    assert_refused(start(), "train.jsonl")


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        (["model.safetensors"], "weights"),
        (["config.json"], "config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
    ],
)
def test_a_model_folder_with_a_missing_file_is_refused(case, missing, part):
    folder, start = case
    for name in missing:
        (folder / "model" / name).unlink()
    assert_refused(start(), part)


def test_a_model_folder_with_a_missing_shard_is_refused(case):
    folder, start = case
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(start(), 1, 2, "model-2.safetensors")


def test_a_folder_that_is_not_a_run_folder_is_not_changed(case):
    folder, start = case
    (folder / "run").mkdir()
    (folder / "run/thesis.txt").write_text("years of work")
    assert_refused(start(overwrite=True), folder / "run", "thesis.txt")
    assert (folder / "run/thesis.txt").read_text() == "years of work"
