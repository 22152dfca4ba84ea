"""Starts in the folder of a finished run, on one rank."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.adapter.trained_on import adapter_sha256
from pipeline.files import read_json
from pipeline.train.metrics import read_metrics
from tests.commands import run
from tests.messages import assert_mentions
from tests.tiny import CHATML, make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("restart")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 5)
    settings = {
        "model": str(tiny_model), "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "heldout.jsonl"), "output_dir": str(folder / "done"),
        "lora_r": 4, "lr": 5e-3, "max_steps": 4, "global_batch_size": 4, "max_length": 128,
        "packing": False, "save_steps": 2, "eval_steps": 2, "evaluation_strategy": "steps",
        "logging_steps": 1, "bf16": False, "keep_best": True,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    code, output = start(folder, folder / "done")
    assert code == 0, output
    return folder


@pytest.fixture
def done(workspace, tmp_path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(workspace / "done", tmp_path / "run")
    return tmp_path / "run"


def start(workspace: Path, run_folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of launch/train.py with the settings of the workspace."""
    return run("launch/train.py", workspace / "run.yaml", f"output_dir={run_folder}", *overrides)


def logged_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def test_a_missing_adapter_is_published_again_from_the_checkpoint(workspace, done):
    shutil.rmtree(done / "adapter")
    code, output = start(workspace, done)
    assert code == 0, output
    assert "step 1/4" not in output
    assert adapter_bytes(done) == adapter_bytes(workspace / "done")


def test_a_run_that_replaces_another_does_not_resume_its_linked_checkpoints(
    workspace, done, tmp_path
):
    (done / "checkpoints").rename(tmp_path / "other_disk")
    (done / "checkpoints").symlink_to(tmp_path / "other_disk")
    code, output = start(workspace, done, "lr=1e-4", "overwrite=true")
    assert code == 0, output
    assert "resuming" not in output
    assert logged_steps(done) == [1, 2, 3, 4]
    assert adapter_bytes(done) != adapter_bytes(workspace / "done")
    assert (done / "checkpoints").is_symlink()


def test_a_longer_run_with_other_held_out_rows_restarts_the_best_adapter(workspace, done):
    """Losses on different rows are not comparable. Damaged lines of metrics.jsonl are dropped."""
    make_rows(workspace / "other.jsonl", 7)
    with (done / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n")
    changes = (f"eval_data={workspace / 'other.jsonl'}", "max_steps=6")
    code, output = start(workspace, done, *changes, "accept_changes=[data, total_steps]")
    assert code == 0, output
    assert_mentions(output, "resuming from step 4", "eval_data changed")
    assert logged_steps(done) == [1, 2, 3, 4, 5, 6]


def test_lost_data_that_is_prepared_again_with_other_tokens_is_refused(workspace, tmp_path):
    """The chat template writes the time into each row, as that of Llama 3.2 writes the date."""
    template = tmp_path / "dated.jinja"
    template.write_text(CHATML.replace("{% for m", "{{ strftime_now('%f') }}{% for m"))
    folder, changes = tmp_path / "run", (f"chat_template={template}", "max_steps=2")
    code, output = start(workspace, folder, *changes)
    assert code == 0, output
    changes += ("resume=must", "accept_changes=[total_steps]", "max_steps=3")
    shutil.copytree(folder / "data", tmp_path / "saved")
    for folder_pattern, name in (("train-*", "training data"), ("eval-*", "held-out data")):
        shutil.rmtree(next((folder / "data").glob(folder_pattern)))
        code, output = start(workspace, folder, *changes)
        assert code == 2, output
        assert_mentions(output, name, "tokens", "chat_template_kwargs", "accept_changes: [data]")
        shutil.rmtree(folder / "data")
        shutil.copytree(tmp_path / "saved", folder / "data")
    shutil.rmtree(folder / "data")
    shutil.copytree(tmp_path / "saved", folder / "data")
    code, output = start(workspace, folder, *changes)
    assert code == 0, output
    assert_mentions(output, "resuming from step 2")


def test_other_target_modules_are_refused_before_the_model_is_loaded(workspace, tmp_path):
    checkpoint = workspace / "done/checkpoints/step-00000002"
    changes = ("lora_target_modules=[q_proj]", f"resume={checkpoint}")
    code, output = start(workspace, tmp_path / "new", *changes)
    assert code == 2, output
    assert_mentions(output, "resume", checkpoint, "another output_dir")
    assert "Traceback" not in output


def test_a_checkpoint_of_another_run_with_more_steps_needs_a_new_run(workspace, tmp_path):
    checkpoint = workspace / "done/checkpoints/step-00000004"
    changes = ("max_steps=8", f"resume={checkpoint}", "accept_changes=[total_steps, data]")
    code, output = start(workspace, tmp_path / "new", *changes)
    assert code == 2, output
    assert_mentions(output, "resume", checkpoint, "total_steps: 4 -> 8", "new run")
    assert "Traceback" not in output


def test_a_new_run_starts_from_the_adapter_of_another_and_records_it(workspace, tmp_path):
    make_rows(tmp_path / "other.jsonl", 9)
    folder, origin = tmp_path / "second", workspace / "done" / "adapter"
    changes = [f"train_data={tmp_path / 'other.jsonl'}", f"init_adapter={origin}", "eval_data=null"]
    changes += ["keep_best=false", "lora_plus_ratio=4"]
    code, output = start(workspace, folder, *changes, "lora_r=2")
    assert code == 2, output
    assert_mentions(output, "init_adapter", "r 4", "r 2")
    assert not (folder / "run.yaml").exists()
    code, output = start(workspace, folder, *changes, "lora_r=8", "init_adapter_resize=true")
    assert code == 0, output
    assert_mentions(output, f"starting from the adapter {origin}")
    record = read_json(folder / "adapter" / "trained_on.json")["started_from"]
    assert record == read_json(folder / "init_adapter.json")
    assert record["sha256"] == adapter_sha256(origin)
    assert_mentions((folder / "adapter" / "README.md").read_text(), "started from", origin)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert [line["lr_lora_b"] / line["lr"] for line in lines] == [4.0] * 4
    first = read_metrics(workspace / "done" / "metrics.jsonl")[0]["loss"]
    assert lines[0]["loss"] < first  # the first run had similar rows


def test_a_checkpoint_of_another_run_with_other_data_points_to_init_adapter(workspace, tmp_path):
    make_rows(tmp_path / "other.jsonl", 9)
    checkpoint = workspace / "done" / "checkpoints" / "step-00000004"
    code, output = start(
        workspace, tmp_path / "run", f"train_data={tmp_path / 'other.jsonl'}",
        f"resume={checkpoint}", "eval_data=null", "keep_best=false",
    )  # fmt: skip
    assert code == 2, output
    assert_mentions(output, "init_adapter", "data")


def test_a_run_folder_with_another_scratch_path_is_the_same_run(workspace, tiny_model, tmp_path):
    """The same model, data and run folder under another $SCRATCH need no accept_changes."""
    settings = yaml.safe_load((workspace / "run.yaml").read_text())
    settings |= {
        "model": "$SCRATCH/model", "train_data": "$SCRATCH/train.jsonl",
        "eval_data": "$SCRATCH/heldout.jsonl", "output_dir": "$SCRATCH/run",
    }  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_model, first / "model")
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(workspace / name, first)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code, output = run("launch/train.py", tmp_path / "run.yaml", SCRATCH=str(first))
    assert code == 0, output
    first.rename(second)
    # the files after a stop at step 2
    shutil.rmtree(second / "run/checkpoints/step-00000004")
    shutil.rmtree(second / "run/adapter")
    status = json.loads((second / "run/status.json").read_text())
    (second / "run/status.json").write_text(json.dumps(status | {"state": "stopped"}))
    code, output = run("launch/train.py", tmp_path / "run.yaml", SCRATCH=str(second))
    assert code == 0, output
    assert_mentions(output, "resuming from step 2")
    assert logged_steps(second / "run") == [1, 2, 3, 4]
    assert adapter_bytes(second / "run") == adapter_bytes(workspace / "done")
