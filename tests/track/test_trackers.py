"""Runs sent to the library of each tracker, which writes local files; `make test-trackers`."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.settings import RunSettings
from pipeline.track.facts import RunFacts
from pipeline.track.follow import SentRecord, send_run, sent_path
from pipeline.track.process import TrackerProcesses, tracker_environment
from tests import ROOT
from tests.messages import assert_mentions

pytestmark = pytest.mark.tensor
# Where a secret is -> the secret: the command line, an environment variable, a comment or setting
# of the run file, a row of the data, a folder, and the value of a setting that looks like a token.
SECRETS = {
    "argv": "argv-4e1f", "environment": "env-77aa", "comment": "comment-91b3", "row": "row-c0de",
    "path": "home-of-anna", "value": "hf_abcdefghijklmnopqrstuvwxyz",
}  # fmt: skip


def needs(library: str) -> pytest.MarkDecorator:
    """Skip a test if the library is not installed."""
    is_installed = importlib.util.find_spec(library) is not None
    return pytest.mark.skipif(not is_installed, reason=f"no {library} here: make test-trackers")


each_tracker = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs(name))
        for name in ("wandb", "tensorboard", "mlflow", "trackio")
    ],
)


def train_line(step: int) -> dict:
    """A line of metrics.jsonl; the loss is 2 / step."""
    return {"step": step, "epoch": step / 10, "loss": 2.0 / step, "lr": 1e-4, "grad_norm": None,
            "was_applied": True}  # fmt: skip


def write_metrics(folder: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder of four steps and an evaluation, with secrets that no tracker may receive."""
    for name in ("WANDB_MODE", "WANDB_SILENT", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_API_TOKEN", SECRETS["environment"])
    folder = tmp_path / SECRETS["path"] / "bakery"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    values = {
        "model": f"/models/{SECRETS['path']}/tiny", "train_data": f"/d/{SECRETS['path']}/t.jsonl",
        "output_dir": str(folder), "run_group": "sweep-1", "tracker_uploads": ["adapter"],
        "chat_template_kwargs": {"key": SECRETS["comment"]},
        "lora_target_modules": SECRETS["value"], "trackers": [],
    }  # fmt: skip
    settings = RunSettings.model_validate(values)
    text = json.dumps(settings.model_dump(mode="json"))
    (folder / "run.yaml").write_text(f"# {SECRETS['comment']}\n{text}\n")
    plan = {
        "choice": {"zero_stage": 2, "why": {"a": "b"}}, "hardware": {"name": "CPU", "ranks": 2},
        "model": {"parameters": 100, "folder": f"/models/{SECRETS['path']}"},
        "memory": {"peak_bytes": 5}, "speed": {"seconds_per_step": 0.5},
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "data").mkdir()
    (folder / "data/rows.jsonl").write_text(SECRETS["row"])
    answers = [{"prompt": SECRETS["row"], "expected": "x", "base": "y", "adapter": "x"}]
    scores = {"models": {"base": {"loss": 2.5, "exact_match": 0.0}}, "answers": answers}
    (folder / "score.json").write_text(json.dumps(scores))
    evaluation = {"step": 2, "eval_loss": 1.5, "eval_tokens": 9}
    write_metrics(folder, [*map(train_line, (1, 2)), evaluation, *map(train_line, (3, 4))])
    return folder


def track(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `rankzero track` with a secret in its command line."""
    code = f"from pipeline.cli.track import main; main()  # {SECRETS['argv']}"
    command = [sys.executable, "-c", code, str(folder), "--tracker", name, *words]
    environment = tracker_environment(name, os.environ) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=110
    )


@each_tracker
def test_a_run_is_sent_once_and_a_resumed_run_continues(run, name):
    first = track(run, name)
    assert first.returncode == 0, first.stderr
    assert received_points(run, name, "train/loss") == expected_losses(range(1, 5))
    assert received_points(run, name, "eval/loss") == [(2, 1.5)]
    assert received_points(run, name, "score/base/loss") == [(4, 2.5)]
    run_id = SentRecord.load(sent_path(run, name)).run_id
    # Resumed from step 2: steps 3 and 4 are trained again, to the same numbers.
    write_metrics(run, [train_line(step) for step in range(1, 7)])
    again = track(run, name)
    assert again.returncode == 0, again.stderr
    assert received_points(run, name, "train/loss") == expected_losses(range(1, 7))
    assert SentRecord.load(sent_path(run, name)).run_id == run_id


def expected_losses(steps) -> list[tuple[int, float]]:
    return [(step, pytest.approx(2.0 / step)) for step in steps]


@each_tracker
def test_every_setting_and_choice_of_the_plan_is_sent(run, name):
    plan = json.loads((run / "plan.json").read_text())
    plan["choice"] |= {f"choice-{number}": number for number in range(50)}
    (run / "plan.json").write_text(json.dumps(plan))
    assert track(run, name).returncode == 0
    files = [path for path in (run / "tracking").rglob("*") if path.is_file()]
    data = b"".join(path.read_bytes() for path in files)
    config = RunFacts.load(run).config
    assert len(config) > 100  # MLflow accepts at most 100 in one call
    assert [key for key in config if key.encode() not in data] == []


@needs("mlflow")
def test_mlflow_gets_the_name_and_the_group_of_the_run(run):
    assert track(run, "mlflow").returncode == 0
    with sqlite3.connect(run / "tracking/mlflow.db") as database:
        assert database.execute("select name from runs").fetchall() == [("bakery",)]
        assert database.execute("select value from tags where key = 'group'").fetchall() == [
            ("sweep-1",)
        ]


@each_tracker
def test_no_secret_no_path_and_no_row_reaches_a_tracker(run, name):
    assert track(run, name).returncode == 0
    files = [path for path in (run / "tracking").rglob("*") if path.is_file()]
    never_sent = {"debug.log", "debug-internal.log"}  # logs of W&B for this machine
    sent_files = [path for path in files if path.name not in never_sent]
    assert sent_files
    for path in sent_files:
        # MLflow's database has the path of the artifact folder, which is local in this test.
        kinds = SECRETS.keys() - ({"path"} if path.name.startswith("mlflow.db") else set())
        data = path.read_bytes()
        assert not [kind for kind in kinds if SECRETS[kind].encode() in data], path


@each_tracker
def test_answers_are_sent_if_the_settings_request_them(run, name):
    settings = json.loads((run / "run.yaml").read_text().split("\n")[1])
    settings["tracker_uploads"] = ["adapter", "answers"]
    (run / "run.yaml").write_text(json.dumps(settings))
    assert track(run, name).returncode == 0
    files = [path for path in (run / "tracking").rglob("*") if path.is_file()]
    assert any(SECRETS["row"].encode() in path.read_bytes() for path in files)


def received_points(folder: Path, name: str, metric: str) -> list[tuple[int, float]]:
    """Steps and values of a metric in the files that the tracker's library has written."""
    local = folder / "tracking"
    if name == "mlflow":
        query = "select step, value from metrics where key = ? order by step"
        with sqlite3.connect(local / "mlflow.db") as database:
            return database.execute(query, [metric]).fetchall()
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(local / "tensorboard")).Reload()
        if metric not in events.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in events.Scalars(metric)]
    if name == "trackio":
        (path,) = (local / "trackio").glob("*.db")
        with sqlite3.connect(path) as database:
            rows = database.execute("select step, metrics from metrics").fetchall()
        logged = [(step, json.loads(text)) for step, text in rows]
        return [(step, values[metric]) for step, values in logged if metric in values]
    return wandb_points(local, metric)


def wandb_points(local: Path, metric: str) -> list[tuple[int, float]]:
    from wandb.proto import wandb_internal_pb2

    points = []
    for path in sorted(local.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:]):  # after the header: ":W&B" and 3 bytes
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            if metric in items:
                points.append((items["train/step"], items[metric]))
    return points


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB of fragments with 7-byte headers."""
    header, block = 7, 32 * 1024
    file_header = 7  # of W&B, is not in `data`, but counts in the blocks
    position, record = 0, b""
    while position + header <= len(data):
        remaining = block - (position + file_header) % block
        if remaining < header:  # padding at the end of a block
            position += remaining
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        record += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a complete record, or its last fragment
            yield record
            record = b""


@needs("tensorboard")
def test_metrics_are_sent_during_training_and_completely_at_its_end(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with TrackerProcesses() as trackers:
        trackers.start(run, ["tensorboard"])
        wait_for(lambda: SentRecord.load(sent_path(run, "tensorboard")).steps.get("train") == 4)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(train_line(5)) + "\n")
    assert (5, pytest.approx(2.0 / 5)) in received_points(run, "tensorboard", "train/loss")


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tracker_process_gets_no_secret_of_the_environment(run, monkeypatch):
    recording_python = run.parent / "python"
    recording_python.write_text(f"#!/bin/bash\nenv > '{run.parent}/variables'\n")
    recording_python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(recording_python))
    with TrackerProcesses() as trackers:
        trackers.start(run, ["mlflow"])
    variables = (run.parent / "variables").read_text()
    assert "PATH=" in variables
    assert SECRETS["environment"] not in variables


def test_a_tracker_that_hangs_is_killed_and_the_missing_steps_are_named(run, monkeypatch, caplog):
    hanging_python = run.parent / "python"
    hanging_python.write_text("#!/bin/bash\nexec sleep 600\n")
    hanging_python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging_python))
    monkeypatch.setattr("pipeline.track.process.FINAL_SEND_S", 0.2)
    start = time.monotonic()
    with caplog.at_level("WARNING"), TrackerProcesses() as trackers:
        trackers.start(run, ["mlflow"])
    assert time.monotonic() - start < 10  # not the 600 s of the process
    assert_mentions(caplog.text, "mlflow", "step 0 of 4", "rankzero track", "not affected")


def test_a_failed_tracker_gives_one_message_and_training_continues(run, monkeypatch, capfd, caplog):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (run / "plan.json").write_text("{")  # the tracker process cannot read it
    with caplog.at_level("WARNING"), TrackerProcesses() as trackers:
        trackers.start(run, ["mlflow"])
    messages = [line for line in capfd.readouterr().err.splitlines() if "mlflow" in line]
    assert len(messages) == 1, messages
    assert_mentions(messages[0], "training continues")
    assert_mentions(caplog.text, "mlflow", "rankzero track")


def test_a_failed_upload_is_continued_by_the_next_call(run, monkeypatch):
    logged_steps: list[int] = []

    class FailingTracker:
        """At its first start it fails after step 2; at the second start it does not fail."""

        run_id = "7"

        def __init__(self, facts, run_id):
            self.last_step = 2 if run_id is None else 100

        def log(self, metrics, step):
            if step > self.last_step:
                raise OSError("no route to host")
            logged_steps.append(step)

        def artifact(self, name, folder):
            pass

        def finish(self):
            pass

    monkeypatch.setattr("pipeline.track.follow.TRACKERS", {"mlflow": FailingTracker})

    def wait(seconds):
        return True  # training has ended

    with pytest.raises(OSError):  # noqa: PT011 - raised above
        send_run(run, "mlflow", wait)
    assert logged_steps == [1, 2, 2]  # steps 1 and 2, and the evaluation of step 2
    send_run(run, "mlflow", wait)
    assert logged_steps[3:] == [3, 4, 4]  # steps 3 and 4, and the scores
