"""A run whose folder is inside the folder of its training data; it trains for 2.5 epochs.

The files of the run must not be read as data, and it must resume bitwise within the last epoch.
"""

import json
import time

import pytest
import yaml

from pipeline.train.metrics import read_metrics
from tests.commands import Command, run
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
STEPS = 38  # 2.5 epochs of 60 rows, with 4 rows in a step


def write_run_file(folder, name, model):
    settings = {
        "model": str(model), "train_data": str(folder), "output_dir": str(folder / "runs" / name),
        "epochs": 2.5, "global_batch_size": 4, "batch_size": 1, "max_length": 64, "lora_r": 4,
        "packing": False, "bf16": False, "lr": 1e-3, "save_steps": 100,
    }  # fmt: skip
    path = folder.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, folder / "runs" / name


def key_and_files(folder):
    """Key of the prepared training data of a run, and {data file: number of rows}."""
    audit = json.loads((folder / "data" / "audit.json").read_text())
    (source,) = audit["train"]["sources"]
    return json.loads((folder / "data" / "index.json").read_text())["train"]["key"], source["files"]


def test_run_files_are_never_data_and_a_fractional_epoch_resumes_bitwise(tiny_model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    make_rows(folder / "rows.jsonl", 60)
    uninterrupted_file, uninterrupted = write_run_file(folder, "uninterrupted", tiny_model)
    code, output = run("launch/train.py", uninterrupted_file)
    assert code == 0, output

    # The folder now has the JSON Lines files of a finished run, and later those of a stopped one.
    stopped_file, stopped = write_run_file(folder, "stopped", tiny_model)
    with Command("launch/train.py", stopped_file) as command:
        while len(read_metrics(stopped / "metrics.jsonl")) < STEPS - 7:
            assert command.is_running(), command.output
            time.sleep(0.005)
        (stopped / "stop").touch()
        code, output = command.wait_for_end()
    assert code == 75, output  # exit code of a stopped run that can be resumed
    step = json.loads((stopped / "status.json").read_text())["step"]
    assert STEPS - 8 < step < STEPS  # within the last half epoch
    code, output = run("launch/train.py", stopped_file)
    assert code == 0, output

    key, files = key_and_files(stopped)
    assert (key, files) == key_and_files(uninterrupted)
    assert files == {str(folder / "rows.jsonl"): 60}
    metrics = read_metrics(uninterrupted / "metrics.jsonl")
    metrics_of_resumed = read_metrics(stopped / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics] == [line["loss"] for line in metrics_of_resumed]
    adapter = "adapter/adapter_model.safetensors"
    assert (uninterrupted / adapter).read_bytes() == (stopped / adapter).read_bytes()
