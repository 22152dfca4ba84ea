"""The JSON schema of run files accepts valid settings and refuses every wrong single key."""

import re

import jsonschema
import pytest

from pipeline.config.located import read_located
from pipeline.config.schema import run_file_schema
from pipeline.config.settings import RunSettings
from tests import ROOT

pytestmark = pytest.mark.unit
RUN_FILES = sorted((ROOT / "launch/runs").glob("*.yaml"))
REQUIRED = {"model": "m", "train_data": "d.jsonl", "output_dir": "o"}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = run_file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_shipped_run_files_are_valid_and_name_the_schema_in_their_first_line(validator, path):
    validator.validate(dict(read_located(path, "YAML").values))
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert (path.parent / "schema.json").is_file()


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_the_first_comment_of_a_run_file_has_machine_memory_time_and_its_own_command(path):
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]  # first lines with #
    assert "\n#   Machine    " in header
    assert re.search(r"\d GiB per rank", header)
    assert re.search(r"\d (s per step|min for the \d+ steps)", header)
    assert re.search(rf"\n#   Command    .*launch/runs/{re.escape(path.name)}", header)


def test_the_defaults_are_valid_and_every_setting_is_described(validator):
    settings = RunSettings.model_validate(REQUIRED)
    validator.validate(settings.model_dump(mode="json"))
    properties = validator.schema["properties"]
    assert properties.keys() == RunSettings.model_fields.keys()
    assert all(setting["description"] for setting in properties.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 1e-4},
        {"lora_r": 0},
        {"lora_r": "8"},
        {"lora_dropout": 1.0},
        {"preset": "huge"},
        {"zero_stage": 4},
        {"train_data": [{"path": "a", "share": 1}]},
        {"lr_scheduler_type": "constant_with_warmup"},
    ],
    ids=str,
)
def test_a_wrong_key_or_value_is_invalid(validator, wrong):
    assert not validator.is_valid(REQUIRED | wrong)


def test_a_missing_required_setting_is_invalid(validator):
    assert not validator.is_valid({"model": "m", "train_data": "d"})
