"""The command of lm-evaluation-harness, and the message if the package is missing."""

import sys
from pathlib import Path

import pytest

from pipeline.errors import RankZeroError
from pipeline.evaluate import harness
from pipeline.evaluate.subjects import Subject
from tests.messages import assert_mentions, refused
from tests.tiny import make_plan

pytestmark = pytest.mark.tensor


@pytest.fixture
def subject(tiny_model):
    settings = make_plan(tiny_model, load_in_4bit=True).settings
    return Subject(
        name="runs/a adapter", settings=settings, folder=tiny_model, adapter=Path("run/adapter"),
        is_adapter_used=True,
    )  # fmt: skip


def test_the_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, subject):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with refused("--tasks", "pip install"):
        harness.run_harness([subject], "arc_easy", Path("score.json"))


def test_the_adapter_is_handed_over_as_it_was_trained(tiny_model, subject):
    words = harness.harness_command(subject, "a,b.yaml", Path("out"))
    arguments = dict(
        word.split("=", 1) for word in words[words.index("--model_args") + 1].split(",")
    )
    assert words[:3] == [sys.executable, "-m", "lm_eval"]
    assert arguments["pretrained"] == str(tiny_model)
    assert (arguments["peft"], arguments["load_in_4bit"]) == ("run/adapter", "True")
    assert (arguments["bnb_4bit_quant_type"], arguments["bnb_4bit_use_double_quant"]) == (
        "nf4",
        "True",
    )
    assert arguments["bnb_4bit_compute_dtype"] == "float32"  # the training dtype
    assert words[words.index("--tasks") + 1] == "a,b.yaml"


def test_the_tokenizer_has_the_new_tokens_of_the_adapter(tiny_model):
    settings = make_plan(tiny_model, new_tokens=["<a>"]).settings
    adapter, merged = Path("run/adapter"), Path("run/merged")
    subjects = {
        tiny_model: Subject(name="base", settings=settings, folder=tiny_model, adapter=adapter),
        adapter: Subject(
            name="adapter", settings=settings, folder=tiny_model, adapter=adapter,
            is_adapter_used=True,
        ),
        merged: Subject(name="merged", settings=settings, folder=merged, is_merged=True),
    }  # fmt: skip
    for folder, each in subjects.items():
        words = harness.harness_command(each, "t", Path("out"))
        assert f"tokenizer={folder}" in words[words.index("--model_args") + 1].split(",")


def test_the_results_of_each_model_are_beside_the_score(monkeypatch, tmp_path, subject, capfd):
    monkeypatch.setattr(harness, "find_spec", lambda name: name)
    script = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"
    for code in (0, 3):
        monkeypatch.setattr(
            harness, "harness_command",
            lambda subject, tasks, folder, code=code: [
                sys.executable, "-c", script, str(folder), str(code)
            ],
        )  # fmt: skip
        if code == 0:
            harness.run_harness([subject], "t", tmp_path / "score.json")
        else:
            with pytest.raises(RankZeroError) as error:
                harness.run_harness([subject], "t", tmp_path / "score.json")
            assert_mentions(str(error.value), "lm_eval", "3", "runs/a adapter")
    assert str(tmp_path / "score-tasks/runs_a-adapter") in capfd.readouterr().out
