"""Bad input ends with exit code 2 and one message, before torch is imported or a file changes.

Each case runs `launch/train.py` in a process that prints at its end whether torch was imported.
"""

import json
import shutil

import pytest
import yaml

from tests.commands import run_without_torch
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit

# Runs launch/train.py. run_main ends the process with os._exit, which is replaced for the report.
TRAIN_AND_REPORT_TORCH = """
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


Result = tuple[int, str, str]  # exit code, standard output, standard error


@pytest.fixture
def case(tmp_path, tiny_model):
    """A pair: a folder with a valid model and four valid rows, and a function.

    The function starts a run on this model and data, with changed settings; it returns a Result.
    """
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(ROW * 4)
    values = {
        "model": str(tmp_path / "model"),
        "train_data": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "lora_r": 4,
    }

    def start(**change) -> Result:
        path = tmp_path / "RUN.yaml"
        path.write_text(yaml.safe_dump(values | change))
        result = run_without_torch("-c", TRAIN_AND_REPORT_TORCH, path)
        return result.returncode, result.stdout, result.stderr

    return tmp_path, start


def assert_refused(result: Result, *facts: object) -> None:
    """Assert exit code 2, and one message with these facts, before torch was imported."""
    code, out, err = result
    assert code == 2, out + err
    assert out == "NO-TORCH\n"
    assert "Traceback" not in err
    assert_mentions(err, *facts)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"lora_rnk": 8}, ["RUN.yaml:2", "lora_rnk", "lora_r"]),
        ({"lora_r": "many"}, ["lora_r", "whole number", "many"]),
        ({"model": "no/such/folder"}, ["model", "no/such/folder"]),
        ({"train_data": "no/such.jsonl"}, ["train_data", "no/such.jsonl"]),
        ({"eval_data": "no/such.jsonl"}, ["eval_data", "no/such.jsonl"]),
        # 7 is not a multiple of batch_size; 6 and 8 are the nearest.
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
    "bad_row",
    [
        "{",
        "[1]",
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": ""}',
        '{"messages": []}',
    ],
)
def test_a_bad_row_is_named_with_file_and_line(case, bad_row):
    folder, start = case
    (folder / "train.jsonl").write_text(ROW * 4 + bad_row + "\n")  # the fifth line
    rejects = folder / "run/data/rejects.jsonl"
    assert_refused(start(), "train.jsonl:5", "max_rejected", rejects)
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert files == [rejects]
    (reject,) = map(json.loads, rejects.read_text().splitlines())
    assert (reject["file"], reject["line"]) == (str(folder / "train.jsonl"), 5)


def test_an_empty_data_file_is_refused(case):
    folder, start = case
    (folder / "train.jsonl").write_text("")
    assert_refused(start(), "train.jsonl")


@pytest.mark.parametrize(
    ("missing", "fact"),
    [
        (["model.safetensors"], "weights"),
        (["config.json"], "config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
    ],
)
def test_a_model_folder_with_a_missing_file_is_refused(case, missing, fact):
    folder, start = case
    for name in missing:
        (folder / "model" / name).unlink()
    assert_refused(start(), fact)


def test_a_config_with_a_byte_order_mark_is_refused_with_the_remedy(case):
    folder, start = case
    path = folder / "model/config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_refused(start(), path, "byte order mark", "sed -i")


def test_a_model_folder_with_a_missing_shard_is_refused(case):
    folder, start = case
    # Beside model.safetensors the index would be ignored, as in transformers.
    (folder / "model/model.safetensors").rename(folder / "model/model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(start(), 1, 2, "model-2.safetensors")  # 1 of 2 shards is missing


def test_a_folder_that_is_not_a_run_folder_is_not_changed(case):
    folder, start = case
    (folder / "run").mkdir()
    (folder / "run/thesis.txt").write_text("years of work")
    # `overwrite` only allows replacing the folder of a run.
    assert_refused(start(overwrite=True), folder / "run", "thesis.txt")
    assert (folder / "run/thesis.txt").read_text() == "years of work"
