"""ds_configs/ has exactly the output of its generator, and no value of a particular machine.

Goldens: the generated DeepSpeed configs in that folder, one for each case of cases.yaml.
"""

import json
import re
import subprocess
import sys

import pytest
import yaml

from tests import ROOT

pytestmark = pytest.mark.unit

FOLDER = ROOT / "ds_configs"
GOLDENS = sorted(FOLDER.glob("*.json"))


def test_goldens_are_up_to_date():
    command = [sys.executable, "ds_configs/generate.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_every_case_has_its_file_and_the_stage_of_its_name():
    cases = yaml.safe_load((FOLDER / "cases.yaml").read_text(encoding="utf-8"))
    assert {path.stem for path in GOLDENS} == set(cases)
    for path in GOLDENS:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert "train_batch_size" not in config  # it would fix the number of ranks
        # A name without a stage means ZeRO-2.
        assert f"zero{config['zero_optimization']['stage']}" in f"{path.stem}-zero2"


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_no_value_is_auto_and_sizes_are_whole_numbers(path):
    text = path.read_text(encoding="utf-8")
    assert '"auto"' not in text
    for key, value in json.loads(text)["zero_optimization"].items():
        assert not isinstance(value, float), key


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_the_readme_explains_every_key(path):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    keys = re.findall(r'"(\w+)":', path.read_text(encoding="utf-8"))
    assert keys
    assert not {key for key in keys if f"`{key}`" not in readme}
    assert f"`{path.name}`" in readme
