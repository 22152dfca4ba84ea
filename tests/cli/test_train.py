"""The documented commands, started as a user starts them, on two CPU ranks."""

import json
import os
import socket
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
    code, output = deepspeed(run_file("straight"))
    assert code == 0, output
    return workspace / "straight"


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=clean | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command: str | Path) -> tuple[int, str]:
    process = start(*command)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def launcher() -> tuple[str | Path, ...]:
    """DeepSpeed's command for two ranks, at a port that no other run has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return (BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port)


def deepspeed(run_file: Path, *more: str) -> tuple[int, str]:
    return run(*launcher(), "launch/train.py", run_file, *more)


def python(script: str, *more: str | Path) -> tuple[int, str]:
    return run(sys.executable, f"launch/{script}.py", *more)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_the_whole_road(run_file, workspace):
    """Train on two ranks at ZeRO-3, merge, score, report; then start again."""
    path, folder = run_file("road", zero_stage=3, preset="conservative"), workspace / "road"
    code, output = deepspeed(path)
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
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7
    assert all(w.any() for w in weights.values())
    resolved = yaml.safe_load((folder / "run.yaml").read_text())
    assert (resolved["lora_r"], resolved["global_batch_size"]) == (4, 4)
    zero = json.loads((folder / "ds_config.json").read_text())["zero_optimization"]
    assert zero["stage"] == 3

    for script in ("merge", "score", "report"):
        code, output = python(script, folder)
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
    code, output = python("train", path)
    assert (code, "nothing to do" in output) == (0, True), output
    code, output = python("train", path, "lr=1e-4")
    assert code == 2, output
    assert "lr: 0.005 -> 0.0001" in output
    assert "Traceback" not in output
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == before


def test_packs_bring_every_token_once(run_file, workspace):
    """At ZeRO-3 with recomputed blocks; what is measured on packs is what is published."""
    keys = {"packing": True, "max_length": 256, "global_batch_size": 2, "epochs": 1}
    path, folder = run_file("packed", zero_stage=3, **keys), workspace / "packed"
    code, output = deepspeed(path, "gradient_checkpointing=true")
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
    code, output = python("score", folder)
    assert code == 0, output
    scored = json.loads((folder / "score.json").read_text())["models"]["adapter"]["loss"]
    assert scored == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("how", ["stop file", "SIGTERM to every rank"])
def test_stopped_and_started_again_is_bitwise_the_same(run_file, workspace, straight, how):
    name = how.split()[0]
    workers = 1 if how == "stop file" else 0  # who builds the batches changes nothing
    broken, folder = run_file(name, dataloader_num_workers=workers), workspace / name
    process = start(*launcher(), "launch/train.py", broken)
    wait_for_step(folder, 4, process)
    if how == "stop file":
        (folder / "stop").touch()
    else:
        for pid in ranks_of(broken):
            os.kill(pid, 15)
    output, _ = process.communicate(timeout=120)
    said = status(folder)
    assert (said["state"], said["exit_code"]) == ("stopped", 75), output
    assert process.returncode == 75, output
    assert 4 <= said["step"] < 12
    assert not (folder / "adapter").exists()
    code, output = deepspeed(broken)
    assert code == 0, output
    assert f"resuming from step {said['step']}" in output
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
    process = start(*launcher(), "launch/train.py", path)
    wait_for_step(folder, 8, process)  # after the checkpoints of steps 3 and 6
    for pid in ranks_of(path):
        os.kill(pid, 9)
    process.communicate(timeout=120)
    assert status(folder)["state"] == "running"  # nobody was left to say otherwise
    newest = max((folder / "checkpoints").glob("step-*"))
    weights = newest / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # and the newest checkpoint is damaged
    code, output = deepspeed(path)
    assert code == 0, output
    assert f"{newest} is skipped: adapter.safetensors" in output
    assert "resuming from step" in output
    assert same_adapter(folder, straight)


def test_another_run_starts_from_a_named_checkpoint(run_file, workspace, straight):
    named = straight / "checkpoints/step-00000009"
    path, folder = run_file("descendant", resume=str(named)), workspace / "descendant"
    code, output = deepspeed(path)
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
    code, output = python("train", path)
    assert code == 0, output
    folder = workspace / "best"
    losses = [m["eval_loss"] for m in read_metrics(folder / "metrics.jsonl") if "eval_loss" in m]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 24  # two evaluations later it ended
    assert f"early stop: no lower held-out loss since step {best}" in output
    assert f"adapter of step {best}:" in output
    code, output = python("score", folder)
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
    code, output = deepspeed(run_file("wrong", **change))
    assert code == 2, output
    assert output.count(part) == 1, output
    assert "Traceback" not in output
    assert not (workspace / "wrong").exists()


def test_debug_needs_no_launcher_and_is_beside_the_run(run_file, workspace):
    path = run_file("quick", load_in_4bit=True)
    code, output = python("train", path, "--debug")
    assert code == 0, output
    assert_mentions(output, "debug", "frozen weight")
    assert status(workspace / "quick-debug")["state"] == "done"
    assert not (workspace / "quick").exists()
    assert python("train", path, "--debug")[0] == 0  # replaced, not refused


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(read_metrics(folder / "metrics.jsonl")) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"{folder}: no step {step}")


def ranks_of(run_file: Path) -> list[int]:
    """The ranks' own processes: those that DeepSpeed's node launcher started."""
    import psutil

    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(run_file) in (line := process.info["cmdline"] or [])
        and any(part.startswith("--local_rank=") for part in line)
        and "deepspeed.launcher.launch" not in line
    ]


def same_adapter(one: Path, other: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_that_diverges_ends_with_its_checkpoints_untouched(run_file, workspace):
    """Not a number in three steps in a row, of which none came into the adapter."""
    path, folder = run_file("diverged", lr=1e30, save_steps=1), workspace / "diverged"
    code, output = deepspeed(path)
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
    code, output = deepspeed(path)
    assert f"resuming from step {int(newest.name[5:])} ({newest})" in output
    assert code == 1, output
