"""Whole runs of the commands on two CPU ranks: DeepSpeed's launcher, or forked processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.train.metrics import read_metrics
from tests import ROOT
from tests.commands import Command, free_port, run
from tests.messages import assert_mentions
from tests.tiny import make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
BIN = Path(sys.executable).parent
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "lr": 5e-3, "epochs": 2, "global_batch_size": 4,
    "batch_size": 1, "max_length": 128, "save_steps": 3, "logging_steps": 1, "bf16": False,
    "fp16": False, "packing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with the data of all runs of this file."""
    folder = tmp_path_factory.mktemp("e2e")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 5)
    return folder


@pytest.fixture(scope="module")
def run_file(workspace, tiny_model):
    """A function that writes NAME.yaml, a run file of 2 epochs of 6 steps with run folder NAME."""

    def write(name: str, **settings) -> Path:
        paths = {
            "model": str(tiny_model),
            "train_data": str(workspace / "train.jsonl"),
            "eval_data": str(workspace / "heldout.jsonl"),
            "output_dir": str(workspace / name),
        }
        path = workspace / f"{name}.yaml"
        path.write_text(yaml.safe_dump(paths | SETTINGS | settings))
        return path

    return write


@pytest.fixture(scope="module")
def uninterrupted(run_file, workspace) -> Path:
    """The folder of an uninterrupted run."""
    code, output = train(run_file("uninterrupted"))
    assert code == 0, output
    return workspace / "uninterrupted"


def run_with_launcher(run_file: Path) -> tuple[int, str]:
    """Exit code and output of a run on two ranks that DeepSpeed's launcher starts."""
    process = subprocess.run(
        [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()),
         "launch/train.py", run_file],
        cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, text=True, check=False, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process.returncode, process.stdout


def start_two_ranks(run_file: Path) -> Command:
    """Start a run on two ranks without waiting for its end."""
    return Command("launch/train.py", run_file, ranks=2)


def train(run_file: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of a run on two ranks, after it has ended."""
    return run("launch/train.py", run_file, *overrides, ranks=2)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_a_run_can_be_merged_scored_and_reported_and_a_second_start_changes_nothing(
    run_file, workspace
):
    """Trains on two ranks at ZeRO-3, so the base is sharded."""
    path = run_file(
        "whole",
        zero_stage=3,
        preset="conservative",
        trackers=["tensorboard"],
        eval_generate=5,
    )
    folder = workspace / "whole"
    code, output = run_with_launcher(path)
    assert code == 0, output
    assert status(folder)["state"] == "done"
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    # On a CPU the peak is measured in the first two steps only.
    assert [line["peak_bytes"] is not None for line in steps[:3]] == [True, True, False]
    for line in steps[:2]:
        assert line["predicted_bytes"] == pytest.approx(line["peak_bytes"], rel=0.1)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert [line["eval_exact_match_rows"] for line in evaluations] == [5, 5]
    assert all(len(line["eval_exact_match_interval"]) == 2 for line in evaluations)
    assert all(line["eval_seconds"] > 0 for line in evaluations)
    assert all(line["eval_answers_seconds"] > 0 for line in evaluations)
    assert "step 12/12" in output
    assert output.count("step 12/12") == 1  # only rank 0 logs
    last_sent_steps = json.loads((folder / "tracking/tensorboard.json").read_text())["steps"]
    assert last_sent_steps == {"train": 12, "eval": 12}
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # A and B of 7 linear layers in each of 2 blocks
    assert all(weight.any() for weight in weights.values())  # not zero: B was trained
    resolved = yaml.safe_load((folder / "run.yaml").read_text())
    assert (resolved["lora_r"], resolved["global_batch_size"]) == (4, 4)
    zero = json.loads((folder / "ds_config.json").read_text())["zero_optimization"]
    assert zero["stage"] == 3

    for script in ("merge", "score", "report"):
        code, output = run(f"launch/{script}.py", folder)
        assert code == 0, output
    scored = json.loads((folder / "score.json").read_text())
    assert scored["models"].keys() == {"base", "adapter", "merged"}
    assert scored["models"]["adapter"]["loss"] < scored["models"]["base"]["loss"]
    assert scored["models"]["merged"]["loss"] == pytest.approx(
        scored["models"]["adapter"]["loss"], rel=1e-5
    )
    # The held-out loss of the last evaluation, on two ranks, is that of the adapter on one.
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert scored["models"]["adapter"]["loss"] == pytest.approx(evaluated[-1], rel=1e-5)
    assert (folder / "report.html").stat().st_size > 10_000

    before = (folder / "adapter/adapter_model.safetensors").read_bytes()
    code, output = run("launch/train.py", path)
    assert (code, "nothing to do" in output) == (0, True), output
    code, output = run("launch/train.py", path, "lr=1e-4")
    assert code == 2, output
    assert "lr: 0.005 -> 0.0001" in output
    assert "Traceback" not in output
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == before


def test_packed_training_uses_every_token_once_and_its_held_out_loss_equals_the_score(
    run_file, workspace
):
    """At ZeRO-3 with activation checkpointing."""
    keys = {"packing": True, "max_length": 256, "global_batch_size": 2, "epochs": 1}
    path, folder = run_file("packed", zero_stage=3, **keys), workspace / "packed"
    code, output = train(path, "gradient_checkpointing=true")
    assert code == 0, output
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    data = json.loads((folder / "data/index.json").read_text())["train"]
    assert len(steps) < data["documents"] / 2  # without packing, a step has 2 documents
    assert sum(line["tokens"] for line in steps) == data["tokens"]
    assert sum(line["supervised_tokens"] for line in steps) == data["supervised_tokens"]
    for line in steps[:2]:
        assert line["predicted_bytes"] == pytest.approx(line["peak_bytes"], rel=0.1)
    # On an idle machine the share is less than 1 %; other load may delay the rank.
    assert 0 < median(line["waiting_share"] for line in steps) < 0.05
    code, output = run("launch/score.py", folder)
    assert code == 0, output
    scored = json.loads((folder / "score.json").read_text())["models"]["adapter"]["loss"]
    assert scored == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)


def test_a_run_stopped_by_its_stop_file_and_resumed_is_bitwise_equal(
    run_file, workspace, uninterrupted
):
    path, folder = run_file("stop-file", dataloader_num_workers=1), workspace / "stop-file"
    with start_two_ranks(path) as command:
        wait_for_step(folder, 4, command)
        (folder / "stop").touch()
        assert_stopped(folder, *command.wait_for_end())
    # The result is the same whether a worker or the rank builds the batches.
    assert_resumed_as(uninterrupted, path, folder, "dataloader_num_workers=0")


def test_a_run_stopped_by_a_signal_and_resumed_is_bitwise_equal(run_file, workspace, uninterrupted):
    path, folder = run_file("signalled"), workspace / "signalled"
    with start_two_ranks(path) as command:
        wait_for_step(folder, 4, command)
        for pid in command.pids:
            os.kill(pid, signal.SIGTERM)
        assert_stopped(folder, *command.wait_for_end())
    assert_resumed_as(uninterrupted, path, folder)


def assert_stopped(folder: Path, code: int, output: str) -> None:
    """Assert that a run was stopped (exit code 75) between steps 4 and 12, its last."""
    final = status(folder)
    assert (final["state"], final["exit_code"]) == ("stopped", 75), output
    assert code == 75, output
    assert 4 <= final["step"] < 12
    assert not (folder / "adapter").exists()


def assert_resumed_as(uninterrupted: Path, run_file: Path, folder: Path, *overrides: str) -> None:
    """Resume a stopped run, and assert that adapter and losses equal those of `uninterrupted`."""
    step = status(folder)["step"]
    code, output = train(run_file, *overrides)
    assert code == 0, output
    assert f"resuming from step {step}" in output
    assert same_adapter(folder, uninterrupted)
    losses = [
        [line["loss"] for line in read_metrics(path / "metrics.jsonl") if "loss" in line]
        for path in (folder, uninterrupted)
    ]
    assert losses[0] == losses[1]


def test_a_killed_run_resumes_from_the_newest_intact_checkpoint(run_file, workspace, uninterrupted):
    path, folder = run_file("killed"), workspace / "killed"
    with start_two_ranks(path) as command:
        wait_for_step(folder, 8, command)  # after the checkpoints of steps 3 and 6
        command.kill()
    assert status(folder)["state"] == "running"  # the killed processes could not change it
    newest = max((folder / "checkpoints").glob("step-*"))
    weights = newest / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # damages the newest checkpoint
    code, output = train(path)
    assert code == 0, output
    assert f"{newest} is skipped: adapter.safetensors" in output
    assert "resuming from step" in output
    assert same_adapter(folder, uninterrupted)


def test_a_run_can_start_from_a_checkpoint_of_another_run(run_file, workspace, uninterrupted):
    checkpoint = uninterrupted / "checkpoints/step-00000009"
    path, folder = run_file("continued", resume=str(checkpoint)), workspace / "continued"
    code, output = train(path)
    assert code == 0, output
    assert f"resuming from step 9 ({checkpoint})" in output
    assert same_adapter(folder, uninterrupted)
    state = json.loads((folder / "checkpoints/step-00000012/state.json").read_text())
    assert state["origin"] == str(checkpoint)
    assert state["progress"]["step"] == state["schedule"]["total_steps"] == 12
    assert state["progress"]["documents"] == 24  # all, in the second epoch


def test_the_best_adapter_is_published_and_patience_ends_the_run(run_file, workspace):
    path = run_file(
        "best",
        lr=1.0,  # too high: the loss soon rises
        lr_scheduler_type="constant",
        evaluation_strategy="steps",
        eval_steps=1,
        keep_best=True,
        early_stopping_patience=2,
        epochs=4,
    )
    code, output = run("launch/train.py", path)
    assert code == 0, output
    folder = workspace / "best"
    losses = [m["eval_loss"] for m in read_metrics(folder / "metrics.jsonl") if "eval_loss" in m]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 24  # patience 2; the run file has 24 steps
    assert f"early stop: no lower held-out loss since step {best}" in output
    assert f"adapter of step {best}:" in output
    code, output = run("launch/score.py", folder)
    assert code == 0, output
    scored = json.loads((folder / "score.json").read_text())["models"]
    assert scored["adapter"]["loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"lora_rnk": 8}, "lora_rnk: "),
        ({"global_batch_size": 3}, "2 or 4 would work"),
        ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"lora_target_modules": ["c_attn"]}, "'c_attn' matches no linear layer"),
    ],
)
def test_wrong_input_gives_one_message_from_two_ranks(run_file, workspace, change, fact):
    assert_refused_once(workspace, fact, *train(run_file("wrong", **change)))


def test_wrong_input_gives_one_message_with_the_launcher(run_file, workspace):
    assert_refused_once(workspace, "lora_rnk: ", *run_with_launcher(run_file("wrong", lora_rnk=8)))


def assert_refused_once(workspace: Path, fact: str, code: int, output: str) -> None:
    """Assert exit code 2 of the run `wrong`, and one message with this fact from all ranks."""
    assert code == 2, output
    assert output.count(fact) == 1, output
    assert "Traceback" not in output
    assert not (workspace / "wrong").exists()


def test_debug_needs_no_launcher_and_has_its_own_folder(run_file, workspace):
    """The run file is for sequence parallelism on two ranks; --debug runs in one process."""
    path = run_file("quick", load_in_4bit=True, sequence_parallel_size=2)
    code, output = run("launch/train.py", path, "--debug")
    assert code == 0, output
    assert_mentions(output, "debug", "frozen weight")
    assert status(workspace / "quick-debug")["state"] == "done"
    assert not (workspace / "quick").exists()
    assert run("launch/train.py", path, "--debug")[0] == 0  # replaced, not refused


def wait_for_step(folder: Path, step: int, command: Command) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) < step:
        assert command.is_running(), command.output
        assert time.monotonic() < deadline, f"{folder}: no step {step}"
        time.sleep(0.005)


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two run folders have bitwise equal adapters."""
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_that_diverges_ends_with_its_checkpoints_untouched(run_file, workspace):
    """Gradients are NaN in three consecutive steps, and none of them changes the adapter."""
    path, folder = run_file("diverged", lr=1e30, save_steps=1), workspace / "diverged"
    code, output = train(path)
    assert code == 1, output
    final = status(folder)
    assert (final["state"], final["exit_code"]) == ("failed", 1)
    assert_mentions(final["reason"], "not finite", "3 steps")
    assert final["reason"] in output
    assert "Traceback" not in output
    assert not (folder / "adapter").exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # Python writes NaN as NaN, which is not JSON; then parse_constant is called.
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    newest = max((folder / "checkpoints").glob("step-*"))
    saved = load_file(newest / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    code, output = train(path)
    assert f"resuming from step {int(newest.name.removeprefix('step-'))} ({newest})" in output
    assert code == 1, output
