"""The documented commands on two CPU ranks: once as a user starts them, else as forks."""

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
    """A folder with the data of all runs here."""
    folder = tmp_path_factory.mktemp("e2e")
    make_rows(folder / "train.jsonl")
    make_rows(folder / "heldout.jsonl", 5)
    return folder


@pytest.fixture(scope="module")
def run_file(workspace, tiny_model):
    """Write the run file of 2 x 6 steps on 24 rows, whose run folder is of the same name."""

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
def straight(run_file, workspace) -> Path:
    """The folder of a run that nothing interrupts."""
    code, output = train(run_file("straight"))
    assert code == 0, output
    return workspace / "straight"


def launched(run_file: Path) -> tuple[int, str]:
    """Exit code and output under DeepSpeed's launcher."""
    ended = subprocess.run(
        [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()),
         "launch/train.py", run_file],
        cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, text=True, check=False, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return ended.returncode, ended.stdout


def two_ranks(run_file: Path, *more: str) -> Command:
    return Command("launch/train.py", run_file, *more, ranks=2)


def train(run_file: Path, *more: str) -> tuple[int, str]:
    return run("launch/train.py", run_file, *more, ranks=2)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_the_whole_road(run_file, workspace):
    """Train on two ranks at ZeRO-3, merge, score, report; then start again."""
    path = run_file("road", zero_stage=3, preset="conservative", trackers=["tensorboard"])
    folder = workspace / "road"
    code, output = launched(path)
    assert code == 0, output
    assert status(folder)["state"] == "done"
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["peak_bytes"] is not None for line in steps[:3]] == [True, True, False]
    for line in steps[:2]:  # watched on a CPU, beside what was predicted for these batches
        assert line["predicted_bytes"] == pytest.approx(line["peak_bytes"], rel=0.1)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12]
    assert "step 12/12" in output
    assert output.count("step 12/12") == 1  # rank 0 alone speaks
    tracked = json.loads((folder / "tracking/tensorboard.json").read_text())["steps"]
    assert tracked == {"train": 12, "eval": 12}
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7
    assert all(w.any() for w in weights.values())
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
    # The loss that training measured over two ranks is the one of the published adapter.
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


def test_packs_bring_every_token_once(run_file, workspace):
    """At ZeRO-3 with recomputed blocks; what is measured on packs is what is published."""
    keys = {"packing": True, "max_length": 256, "global_batch_size": 2, "epochs": 1}
    path, folder = run_file("packed", zero_stage=3, **keys), workspace / "packed"
    code, output = train(path, "gradient_checkpointing=true")
    assert code == 0, output
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    trained = json.loads((folder / "data/index.json").read_text())["train"]
    assert len(steps) < trained["documents"] / 2
    assert sum(line["tokens"] for line in steps) == trained["tokens"]
    assert sum(line["supervised_tokens"] for line in steps) == trained["supervised_tokens"]
    for line in steps[:2]:
        assert line["predicted_bytes"] == pytest.approx(line["peak_bytes"], rel=0.1)
    # Well under 1 % where nothing else is at work; a busy machine may take the CPU away in between.
    assert 0 < median(line["waiting_share"] for line in steps) < 0.05
    code, output = run("launch/score.py", folder)
    assert code == 0, output
    scored = json.loads((folder / "score.json").read_text())["models"]["adapter"]["loss"]
    assert scored == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)


def test_stopped_by_its_file_and_resumed_is_bitwise_the_same(run_file, workspace, straight):
    path, folder = run_file("touched", dataloader_num_workers=1), workspace / "touched"
    with two_ranks(path) as command:
        wait_for_step(folder, 4, command)
        (folder / "stop").touch()
        require_stopped(folder, *command.end())
    # Whether a worker builds the batches or the rank itself changes nothing.
    require_resumed_as(straight, path, folder, "dataloader_num_workers=0")


def test_stopped_by_a_signal_and_resumed_is_bitwise_the_same(run_file, workspace, straight):
    path, folder = run_file("signalled"), workspace / "signalled"
    with two_ranks(path) as command:
        wait_for_step(folder, 4, command)
        for pid in command.pids:
            os.kill(pid, signal.SIGTERM)
        require_stopped(folder, *command.end())
    require_resumed_as(straight, path, folder)


def require_stopped(folder: Path, code: int, output: str) -> None:
    reported = status(folder)
    assert (reported["state"], reported["exit_code"]) == ("stopped", 75), output
    assert code == 75, output
    assert 4 <= reported["step"] < 12
    assert not (folder / "adapter").exists()


def require_resumed_as(straight: Path, run_file: Path, folder: Path, *changes: str) -> None:
    step = status(folder)["step"]
    code, output = train(run_file, *changes)
    assert code == 0, output
    assert f"resuming from step {step}" in output
    assert same_adapter(folder, straight)
    losses = [
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (folder, straight)
    ]
    assert losses[0] == losses[1]


def test_killed_in_the_middle_goes_on_from_the_newest_intact_checkpoint(
    run_file, workspace, straight
):
    path, folder = run_file("killed"), workspace / "killed"
    with two_ranks(path) as command:
        wait_for_step(folder, 8, command)  # after the checkpoints of steps 3 and 6
        command.kill()
    assert status(folder)["state"] == "running"  # nobody was left to say otherwise
    newest = max((folder / "checkpoints").glob("step-*"))
    weights = newest / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # and the newest checkpoint is damaged
    code, output = train(path)
    assert code == 0, output
    assert f"{newest} is skipped: adapter.safetensors" in output
    assert "resuming from step" in output
    assert same_adapter(folder, straight)


def test_another_run_starts_from_a_named_checkpoint(run_file, workspace, straight):
    named = straight / "checkpoints/step-00000009"
    path, folder = run_file("descendant", resume=str(named)), workspace / "descendant"
    code, output = train(path)
    assert code == 0, output
    assert f"resuming from step 9 ({named})" in output
    assert same_adapter(folder, straight)
    state = json.loads((folder / "checkpoints/step-00000012/state.json").read_text())
    assert state["origin"] == str(named)
    assert state["progress"]["step"] == state["schedule"]["total_steps"] == 12
    assert state["progress"]["documents"] == 24


def test_the_best_adapter_is_exported_and_patience_ends_the_run(run_file, workspace):
    path = run_file(
        "best",
        lr=1.0,  # soon too much
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
    assert len(losses) == best + 2 < 24  # two evaluations later it ended
    assert f"early stop: no lower held-out loss since step {best}" in output
    assert f"adapter of step {best}:" in output
    code, output = run("launch/score.py", folder)
    assert code == 0, output
    scored = json.loads((folder / "score.json").read_text())["models"]
    assert scored["adapter"]["loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"lora_rnk": 8}, "lora_rnk: "),
        ({"global_batch_size": 3}, "2 or 4 would work"),
        ({"train_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"lora_target_modules": ["c_attn"]}, "'c_attn' matches no linear layer"),
    ],
)
def test_wrong_input_is_said_once_by_two_ranks(run_file, workspace, change, part):
    require_refused(workspace, part, *train(run_file("wrong", **change)))


def test_wrong_input_is_said_once_under_the_launcher(run_file, workspace):
    require_refused(workspace, "lora_rnk: ", *launched(run_file("wrong", lora_rnk=8)))


def require_refused(workspace: Path, part: str, code: int, output: str) -> None:
    assert code == 2, output
    assert output.count(part) == 1, output
    assert "Traceback" not in output
    assert not (workspace / "wrong").exists()


def test_debug_needs_no_launcher_and_is_beside_the_run(run_file, workspace):
    path = run_file("quick", load_in_4bit=True)
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
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_that_diverges_ends_with_its_checkpoints_untouched(run_file, workspace):
    """Not a number in three steps in a row, of which none came into the adapter."""
    path, folder = run_file("diverged", lr=1e30, save_steps=1), workspace / "diverged"
    code, output = train(path)
    assert code == 1, output
    said = status(folder)
    assert (said["state"], said["exit_code"]) == ("failed", 1)
    assert "not finite in 3 steps in a row" in said["reason"]
    assert said["reason"] in output
    assert "Traceback" not in output
    assert not (folder / "adapter").exists()
    newest = max((folder / "checkpoints").glob("step-*"))
    saved = load_file(newest / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    code, output = train(path)
    assert f"resuming from step {int(newest.name[5:])} ({newest})" in output
    assert code == 1, output
