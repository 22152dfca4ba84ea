"""A refused start (exit code 2) changes no byte of the run folder and does not import torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests import ROOT
from tests.cli.test_bad_input import TRAIN_AND_REPORT_TORCH
from tests.commands import run
from tests.messages import assert_mentions
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TRAIN = str(ROOT / "launch/train.py")


@pytest.fixture(scope="module")
def unfinished(tiny_model, tmp_path_factory) -> Path:
    """A folder with the model, the rows, and a run with checkpoints of steps 2 and 4 of 6.

    The run was finished; its status and files are then changed to those of a stop at step 4.
    """
    workspace = tmp_path_factory.mktemp("refused")
    shutil.copytree(tiny_model, workspace / "model")
    make_rows(workspace / "train.jsonl")
    code, output = train(workspace, save_steps=2)
    assert code == 0, output
    shutil.rmtree(workspace / "run/checkpoints/step-00000006")
    shutil.rmtree(workspace / "run/adapter")
    status = json.loads((workspace / "run/status.json").read_text())
    (workspace / "run/status.json").write_text(json.dumps(status | {"state": "stopped", "step": 4}))
    return workspace


@pytest.fixture
def workspace(unfinished, tmp_path) -> Path:
    """A copy of the unfinished run, with its model and rows, that a test may change."""
    return Path(shutil.copytree(unfinished, tmp_path / "copy"))


def write_run_file(workspace: Path, **change) -> None:
    settings = {
        "model": "model", "train_data": "train.jsonl", "output_dir": "run", "max_steps": 6,
        "global_batch_size": 4, "batch_size": 1, "max_length": 64, "lora_r": 4, "packing": False,
        "bf16": False, "lr": 1e-3,
    }  # fmt: skip
    (workspace / "RUN.yaml").write_text(yaml.safe_dump(settings | change))


def train(workspace: Path, **change) -> tuple[int, str]:
    write_run_file(workspace, **change)
    return run(TRAIN, "RUN.yaml", cwd=workspace)


def train_in_a_new_interpreter(workspace: Path, **change) -> tuple[int, str]:
    """Run launch/train.py in a new interpreter; its output says whether torch was imported."""
    write_run_file(workspace, **change)
    script = TRAIN_AND_REPORT_TORCH.replace("launch/train.py", TRAIN)
    result = subprocess.run(
        [sys.executable, "-c", script, "RUN.yaml"], cwd=workspace, check=False, text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return result.returncode, result.stdout


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_refused(workspace: Path, *facts: object, **change) -> None:
    """Assert that a start with changed settings is refused, with these facts in its message."""
    before = content(workspace / "run")
    code, output = train_in_a_new_interpreter(workspace, **change)
    assert code == 2, output
    assert_mentions(output, *facts)
    assert "Traceback" not in output
    assert "NO-TORCH" in output
    assert content(workspace / "run") == before


def test_a_base_with_a_changed_tensor_is_refused(workspace):
    weights = load_file(workspace / "model/model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name][3, 5] += 0.25
    save_file(weights, workspace / "model/model.safetensors", metadata={"format": "pt"})
    assert_refused(workspace, "base", name, "accept_changes: [base]")


def test_a_base_other_than_that_of_the_checkpoint_is_refused(workspace):
    """base.json is missing, so the identity in the checkpoint is compared."""
    (workspace / "run/base.json").unlink()
    config = json.loads((workspace / "model/config.json").read_text())
    (workspace / "model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert_refused(workspace, "step-00000004", "base:", "accept_changes: [base]")


def test_a_checkpoint_beyond_the_last_step_is_refused(workspace):
    change = {"max_steps": 3, "accept_changes": ["total_steps"]}
    assert_refused(workspace, "step-00000004", "step 4", "step 3", "max_steps", **change)


def test_a_checkpoint_of_another_run_with_other_targets_is_refused(workspace):
    change = {
        "output_dir": "other", "resume": "run/checkpoints/step-00000004",
        "lora_target_modules": ["k_proj", "q_proj"],
    }  # fmt: skip
    assert_refused(workspace, "resume", "step-00000004", **change)
    assert not content(workspace / "other")


def test_a_refused_run_resumes_after_the_cause_is_removed(workspace):
    assert train(workspace, max_steps=3, accept_changes=["total_steps"])[0] == 2
    code, output = train(workspace)
    assert code == 0, output
    assert_mentions(output, "resuming from step 4")
    assert (workspace / "run/adapter").is_dir()
