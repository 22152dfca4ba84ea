"""Every verb of `rankzero VERB` refuses bad input with one message, and writes nothing."""

import shutil
import sys
from importlib import import_module

import pytest

from pipeline.cli.rankzero import VERBS
from pipeline.errors import UserError
from tests import ROOT
from tests.messages import assert_mentions

pytestmark = pytest.mark.unit

WITH_RUN_FILE = ("train", "plan", "prepare")  # not preflight, which lists all problems
WITH_RUN_FOLDER = ("merge", "export", "publish", "score", "talk", "report", "track")


@pytest.fixture
def refused_by(monkeypatch, tmp_path):
    """A function that calls a verb with bad input and returns the message of its refusal."""
    monkeypatch.chdir(tmp_path)

    def call(verb: str, *arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [verb, *map(str, arguments)])
        with pytest.raises(UserError) as error:
            getattr(import_module(f"pipeline.cli.{verb}"), verb)()
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


@pytest.fixture
def run_file(tmp_path):
    """A run file whose model and data do not exist."""
    path = tmp_path / "RUN.yaml"
    path.write_text("model: m\ntrain_data: t\noutput_dir: o\n")
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_missing_and_unknown_arguments_are_refused_by_name(refused_by, verb):
    # Name of the required argument, if it is not the usual one.
    names = {
        "plan": "RUN.yaml", "slurm": "folder", "convert": "config", "report": "run_folders",
        "merge": "run folder", "score": "RUN_FOLDER",
    }  # fmt: skip
    usual_name = "run_folder" if verb in WITH_RUN_FOLDER else "run_file"
    assert_mentions(refused_by(verb), names.get(verb, usual_name), "--help")
    assert "key=value" not in refused_by(verb)  # overrides are optional
    assert_mentions(refused_by(verb, "x", "--nonsense"), "--nonsense")


@pytest.mark.parametrize("verb", WITH_RUN_FILE)
@pytest.mark.parametrize("name", ["nothing.yaml", ".", "/dev/null"])
def test_a_path_that_is_not_a_run_file_is_refused(refused_by, verb, name):
    assert_mentions(refused_by(verb, name), name)


@pytest.mark.parametrize("verb", WITH_RUN_FILE)
@pytest.mark.parametrize("override", ["lr", "=5", "OTHER.yaml"])
def test_an_argument_that_is_not_an_override_is_refused(refused_by, run_file, verb, override):
    assert_mentions(refused_by(verb, run_file, override), override, "key=value")


@pytest.mark.parametrize("verb", WITH_RUN_FOLDER)
# A file name may have at most 255 bytes.
@pytest.mark.parametrize("name", ["nothing", ".", "/dev/null", "RUN.yaml", "n" * 300])
def test_a_path_that_is_not_a_run_folder_is_refused(refused_by, run_file, verb, name):
    assert_mentions(refused_by(verb, name), name, "output_dir")


@pytest.mark.parametrize("verb", ["merge", "export", "publish", "score", "talk"])
def test_a_run_without_an_adapter_is_refused(refused_by, tmp_path, verb):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text("model: m\ntrain_data: t\noutput_dir: o\n")
    assert_mentions(refused_by(verb, folder), folder, "no adapter")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["RUN.yaml"], ["RUN.yaml", "output_dir"]),
        (["org/absent"], ["org/absent", "cache"]),
        (["adapter"], ["adapter", "output_dir of the run"]),
        (["model"], ["model", "--data"]),
        (["lr=1"], ["run_folder", "--help"]),  # only a setting
        (["model", "--data", "x", "no_such=1"], ["no_such", "unknown setting"]),
        (["model", "--regex", "("], ["--regex", "("]),
        (["model", "--data", "x", "--out", "absent/x.json"], ["--out", "absent/x.json"]),
    ],
)
def test_a_score_without_usable_arguments_is_refused(
    refused_by, tmp_path, run_file, arguments, facts
):
    for name, file in (("adapter", "adapter_config.json"), ("model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"model_type": "llama"}')
    if "model" in arguments:
        shutil.copy(ROOT / "ds_configs/models/smollm2-135m/config.json", tmp_path / "model")
    assert_mentions(refused_by("score", *arguments), *facts)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        *(("score", ["--rows", value]) for value in ("0", "-1", "x", "1.5", "9" * 20, "²")),
        *(("plan", ["--nodes", value]) for value in ("0", "-1", "two")),
        *(("plan", ["--gpu-memory-gib", value]) for value in ("0", "-1", "nan", "inf", "many")),
        ("prepare", ["--show", "x"]),
    ],
)
def test_an_invalid_number_is_refused_with_its_option(refused_by, verb, arguments):
    """The longest is greater than any count can be; ² is a digit to Python's str.isdigit."""
    option, value = arguments
    assert_mentions(refused_by(verb, "x", f"{option}={value}"), option, value)


def test_an_abbreviated_option_is_refused(refused_by, run_file):
    # argparse would take --gpus as --gpus-per-node.
    assert_mentions(refused_by("plan", run_file, "--gpus", "3"), "--gpus")


def test_data_is_not_prepared_in_a_folder_of_other_files(refused_by, tmp_path, run_file):
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert_mentions(refused_by("prepare", run_file, f"output_dir={model}"), model, "config.json")
