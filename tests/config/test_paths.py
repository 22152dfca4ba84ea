"""Expansion of `~` and `$NAME` in every path of a run file."""

import os

import pytest

from pipeline.config.load import dump_settings, load_settings
from pipeline.config.paths import expand
from pipeline.config.settings import path_settings
from tests.messages import refused

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in {
        "HOME": "/home/me", "SCRATCH": "/scratch/me", "EMPTY": "", "HF_TOKEN": "hf_abc",
        "AWS_SECRET_ACCESS": "abc", "api_key": "abc", "DOLLAR": "/a$b",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


@pytest.fixture
def load(tmp_path):
    """Function that writes a run file with these settings and loads it; output_dir is line 3."""

    def write_and_load(**values):
        settings = {"model": "m", "train_data": "t", "output_dir": "o"} | values
        path = tmp_path / "RUN.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        return load_settings(path)

    return write_and_load


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs", "/home/me/runs"),
        ("~", "/home/me"),
        ("runs/~", "runs/~"),
        ("./~x", "./~x"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("${SCRATCH}x", "/scratch/mex"),
        ("~/$SCRATCH/${SCRATCH}", "/home/me//scratch/me//scratch/me"),
        ("$$SCRATCH", "$SCRATCH"),
        ("a$$$$b", "a$$b"),
        ("$DOLLAR", "/a$b"),  # the value of a variable is not expanded again
        ("org/name@main:train", "org/name@main:train"),
    ],
)
def test_home_and_variables_are_expanded(text, path):
    assert expand(text) == path


@pytest.mark.parametrize(
    "text", ["$UNSET/x", "${UNSET}", "$EMPTY/x", "a$", "$/x", "${", "$1", "${a-b}"]
)
def test_a_path_that_cannot_be_expanded_is_refused(load, text):
    with refused("RUN.yaml:3", "output_dir", "$$"):  # the remedy: $$ is a literal $
        load(output_dir=f"'{text}'")


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS", "api_key"])
def test_a_variable_with_a_secret_is_neither_expanded_nor_shown(load, name):
    with refused("output_dir", name) as error:
        load(output_dir=f"runs/${name}")
    value = os.environ[name].removeprefix("hf_")
    assert value not in str(error.value)


def test_the_home_of_an_unknown_user_is_refused(load):
    with refused("RUN.yaml:3", "~nobody-of-that-name"):
        load(output_dir="~nobody-of-that-name/x")


def test_every_path_is_expanded_for_the_run_and_dumped_unexpanded(load, tmp_path, monkeypatch):
    text = {
        "model": "$SCRATCH/model",
        "train_data": "[{path: $SCRATCH/a, weight: 2}, ~/b]",
        "eval_data": "{path: $SCRATCH/c}",
        "output_dir": "$SCRATCH/$$run",
        "resume": "~/old",
        "deepspeed_json": "~/ds.json",
    }
    settings = load(**text)
    assert settings.model == "/scratch/me/model"
    assert [source.path for source in settings.train_sources] == ["/scratch/me/a", "/home/me/b"]
    assert settings.eval_sources[0].path == "/scratch/me/c"
    assert settings.output_dir == "/scratch/me/$run"
    assert (settings.resume, settings.deepspeed_json) == ("/home/me/old", "/home/me/ds.json")
    assert text.keys() <= set(path_settings())

    (tmp_path / "run.yaml").write_text(dump_settings(settings))
    assert "/scratch/me" not in (tmp_path / "run.yaml").read_text()
    assert load_settings(tmp_path / "run.yaml") == settings
    monkeypatch.setenv("SCRATCH", "/elsewhere")
    moved = load_settings(tmp_path / "run.yaml")
    assert moved.output_dir == "/elsewhere/$run"
    assert moved.dump_unexpanded() == settings.dump_unexpanded()


def test_a_path_that_was_replaced_after_loading_is_dumped_with_the_new_value(load):
    settings = load(output_dir="$SCRATCH/x").model_copy(update={"output_dir": "/other"})
    assert settings.dump_unexpanded()["output_dir"] == "/other"


# Linux allows 255 bytes for a name (é has 2 bytes) and 4095 for a path.
@pytest.mark.parametrize("text", ["a/" + "b" * 256, "é" * 128, "a/" * 3000])
def test_a_path_longer_than_the_file_system_allows_is_refused(load, text):
    with refused("RUN.yaml:3", "output_dir", "bytes"):
        load(output_dir=text)
