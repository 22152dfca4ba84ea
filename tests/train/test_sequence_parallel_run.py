"""Whole runs whose two ranks share each sequence, resumed and compared with a run on one rank."""

import os
import signal
import time

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.files import read_json
from pipeline.train.metrics import read_metrics
from tests.commands import Command, run
from tests.messages import assert_mentions
from tests.tiny import make_rows
from tests.train_tiny import distance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COUNTED = ("step", "tokens", "supervised_tokens", "epoch")


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_model):
    """Function: name of the run folder, ranks and settings -> the folder of the finished run."""
    folder = tmp_path_factory.mktemp("split")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 5)
    settings = {
        "model": str(tiny_model), "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "heldout.jsonl"), "lora_r": 4, "lora_dropout": 0.0, "lr": 5e-3,
        "max_steps": 4, "global_batch_size": 4, "batch_size": 1, "max_length": 128, "save_steps": 2,
        "eval_steps": 2, "evaluation_strategy": "steps", "logging_steps": 1, "bf16": False,
        "output_dir": str(folder / "unnamed"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))

    def run_to_end(name, ranks, *overrides):
        arguments = ("launch/train.py", folder / "run.yaml", f"output_dir={folder / name}")
        code, output = run(*arguments, *overrides, ranks=ranks)
        assert code == 0, output
        return folder / name

    run_to_end.folder = folder
    return run_to_end


@pytest.fixture(scope="module")
def alone(start):
    return start("alone", 1)


@pytest.fixture(scope="module")
def shared(start):
    return start("shared", 2, "sequence_parallel_size=2")


def weights(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def values(folder, key, first_step=1):
    lines = read_metrics(folder / "metrics.jsonl")
    return [line[key] for line in lines if key in line and line["step"] >= first_step]


def test_a_run_of_two_ranks_that_share_sequences_equals_a_run_on_one_rank(alone, shared):
    assert distance(weights(shared), weights(alone)) < 1e-5
    for key in COUNTED:
        assert values(shared, key) == values(alone, key)
    for key in ("loss", "eval_loss", "grad_norm"):
        assert values(shared, key) == pytest.approx(values(alone, key), rel=1e-5)


def test_a_run_resumes_on_one_rank_from_a_checkpoint_of_two_that_shared_sequences(start, shared):
    checkpoint = shared / "checkpoints/step-00000002"
    resumed = start("resumed", 1, f"resume={checkpoint}")
    assert values(resumed, "step")[0] == 3
    assert values(resumed, "loss") == pytest.approx(values(shared, "loss", first_step=3), rel=1e-5)
    assert distance(weights(resumed), weights(shared)) < 1e-5


def test_a_checkpoint_does_not_depend_on_the_ranks_that_share_sequences(alone, shared):
    checkpoints = [folder / "checkpoints/step-00000004" for folder in (alone, shared)]
    assert len({frozenset(path.name for path in folder.iterdir()) for folder in checkpoints}) == 1
    expected, state = (read_json(folder / "state.json") for folder in checkpoints)
    for key in expected.keys() - {"fast_paths", "progress"}:
        assert state[key] == expected[key], key
    for key, value in expected["progress"].items():
        same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        assert state["progress"][key] == same, key


def test_a_rank_that_dies_in_an_exchange_ends_the_run_and_is_named(start):
    folder = start.folder / "killed"
    arguments = ("launch/train.py", start.folder / "run.yaml", f"output_dir={folder}")
    overrides = (
        "sequence_parallel_size=2", "max_steps=100000", "save_strategy=no", "eval_data=null",
    )  # fmt: skip
    with Command(*arguments, *overrides, ranks=2) as command:
        while "step 3/" not in command.output:
            assert command.is_running(), command.output
            time.sleep(0.05)
        os.kill(command.pids[1], signal.SIGKILL)
        codes = command.exit_codes(within_s=60)
    assert codes == [1, -signal.SIGKILL]
    status = read_json(folder / "status.json")
    assert status["state"] == "failed"
    assert_mentions(status["reason"], "rank 1")
