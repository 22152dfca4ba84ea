"""The data that a tracker receives: names without folders, metrics, and environment variables."""

import json

import pytest

from pipeline.track.facts import _redact, _remove_folders
from pipeline.track.lines import LineReader, parse_metrics
from pipeline.track.process import tracker_environment

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("/home/anna/models/tiny", "tiny"), ("~/tiny/", "tiny"), ("$SCRATCH/run", "run"),
        ("./data/t.jsonl", "t.jsonl"), ("org/name", "org/name"),
        ("org/name@main:train", "org/name@main:train"),
        (["/a/b/c", {"path": "/x/y/z", "weight": 2.0}], ["c", {"path": "z", "weight": 2.0}]),
        (0.05, 0.05),
    ],
)  # fmt: skip
def test_only_the_last_part_of_a_path_is_sent_and_hub_names_are_kept(value, sent):
    assert _remove_folders(value) == sent


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 10, "sk-proj-" + "a1" * 10, "ghp_" + "aB3d" * 9, "github_pat_11ABC",
        "xoxb-123-abc", "AKIA" + "A1B2C3D4" * 2, "eyJhbGci.eyJzdWIi.c2ln", "0a1b" * 10,
    ],
)  # fmt: skip
def test_a_secret_in_the_value_of_a_setting_is_not_sent(secret):
    for value in (secret, [f"text {secret}"], {"key": secret}):
        assert secret not in _redact(value)


def test_the_password_in_an_address_is_not_sent_and_other_values_are():
    assert _redact("https://anna:pw@host/x") == "https://***host/x"
    values = ["org/name", "q_proj", 0.5, True, "1e-4"]
    assert [_redact(value) for value in values] == values


def test_only_the_variables_of_the_tracker_reach_its_process():
    env = {"PATH": "/bin", "WANDB_API_KEY": "w", "MLFLOW_TRACKING_URI": "m", "HF_TOKEN": "h",
           "AWS_SECRET_ACCESS_KEY": "a", "LC_ALL": "C", "MY_TOKEN": "t"}  # fmt: skip
    assert tracker_environment("wandb", env).keys() == {"PATH", "LC_ALL", "WANDB_API_KEY"}
    assert tracker_environment("tensorboard", env).keys() == {"PATH", "LC_ALL"}


def test_each_complete_line_is_read_once_and_a_replaced_file_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = LineReader(path)
    assert reader.new_lines() == []
    path.write_text('{"step": 1}\n{"step"')
    assert [line["step"] for line in reader.new_lines()] == [1]
    with path.open("a") as file:
        file.write(': 2}\nnot json\n{"step": 3}\n')
    assert [line["step"] for line in reader.new_lines()] == [2, 3]
    assert reader.new_lines() == []
    new_file = tmp_path / "new"
    new_file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(9)))
    new_file.replace(path)  # as a resumed run does
    assert [line["step"] for line in reader.new_lines()] == list(range(9))


def test_names_of_metrics_start_with_their_kind_and_null_values_are_left_out():
    line = {"step": 3, "loss": 1.0, "grad_norm": None, "was_applied": True}
    assert parse_metrics(line) == ("train", {"train/loss": 1.0, "train/was_applied": 1.0})
    assert parse_metrics({"step": 3, "eval_loss": 2.0}) == ("eval", {"eval/loss": 2.0})
