"""The command line of lm-evaluation-harness (package lm_eval), its results and its errors."""

import sys
from pathlib import Path

import pytest

from pipeline.errors import RankZeroError
from pipeline.evaluate import harness
from pipeline.evaluate.model_specs import ModelSpec
from tests.messages import refused
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor


@pytest.fixture
def spec(tiny_model):
    """The adapter of a QLoRA run."""
    settings = make_plan(tiny_model, load_in_4bit=True).settings
    return ModelSpec(
        name="runs/a adapter", settings=settings, folder=tiny_model, adapter=Path("run/adapter"),
        is_adapter_used=True,
    )  # fmt: skip


def model_arguments(spec, tasks="arc_easy"):
    """The key=value pairs that the command line of lm_eval has after --model_args, as a dict."""
    words = harness.harness_command(spec, tasks, Path("out"))
    pairs = words[words.index("--model_args") + 1].split(",")
    return dict(pair.split("=", 1) for pair in pairs)


def test_without_lm_eval_the_message_has_the_command_that_installs_it(monkeypatch, spec):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with refused("--tasks", "pip install"):
        harness.run_harness([spec], "arc_easy", Path("score.json"))


def test_lm_eval_quantises_the_base_as_training_did(tiny_model, spec):
    arguments = model_arguments(spec)
    assert arguments["pretrained"] == str(tiny_model)
    assert arguments["peft"] == "run/adapter"
    assert arguments["load_in_4bit"] == "True"
    assert arguments["bnb_4bit_quant_type"] == "nf4"
    assert arguments["bnb_4bit_use_double_quant"] == "True"
    assert arguments["bnb_4bit_compute_dtype"] == "float32"  # the training dtype


def test_the_command_runs_lm_eval_with_the_given_tasks(spec):
    words = harness.harness_command(spec, "a,b.yaml", Path("out"))
    assert words[:3] == [sys.executable, "-m", "lm_eval"]
    assert words[words.index("--tasks") + 1] == "a,b.yaml"


def test_base_adapter_and_merged_model_have_their_own_tokenizers_if_there_are_new_tokens(
    tiny_model,
):
    settings = make_plan(tiny_model, new_tokens=["<a>"]).settings
    adapter, merged = Path("run/adapter"), Path("run/merged")
    specs_by_tokenizer_folder = {
        tiny_model: ModelSpec(name="base", settings=settings, folder=tiny_model, adapter=adapter),
        adapter: ModelSpec(
            name="adapter", settings=settings, folder=tiny_model, adapter=adapter,
            is_adapter_used=True,
        ),
        merged: ModelSpec(name="merged", settings=settings, folder=merged, is_merged=True),
    }  # fmt: skip
    for folder, spec in specs_by_tokenizer_folder.items():
        assert model_arguments(spec)["tokenizer"] == str(folder)


def replace_lm_eval(monkeypatch, *, exit_code):
    """Replace lm_eval by a script that prints its result folder and ends with the exit code."""
    script = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"

    def command(spec, tasks, folder):
        return [sys.executable, "-c", script, str(folder), str(exit_code)]

    monkeypatch.setattr(harness, "find_spec", lambda name: name)  # as if it were installed
    monkeypatch.setattr(harness, "harness_command", command)


def test_the_results_of_a_model_are_in_a_folder_next_to_the_score_file(
    monkeypatch, tmp_path, spec, capfd
):
    replace_lm_eval(monkeypatch, exit_code=0)
    harness.run_harness([spec], "arc_easy", tmp_path / "score.json")
    assert str(tmp_path / "score-tasks/runs_a-adapter") in capfd.readouterr().out


def test_a_failure_of_lm_eval_is_reported_with_its_exit_code_and_the_model(
    monkeypatch, tmp_path, spec
):
    replace_lm_eval(monkeypatch, exit_code=3)
    with refused("lm_eval", "3", "runs/a adapter", error=RankZeroError):
        harness.run_harness([spec], "arc_easy", tmp_path / "score.json")
