"""An adapter records hub name, revision and content of its base; other bases are refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from pipeline.adapter.products import is_merged_from, mark_outdated
from pipeline.adapter.publish import publish_adapter
from pipeline.adapter.trained_on import (
    QUANTISED,
    TRAINED_ON,
    adapter_sha256,
    require_corrected_base,
    require_same_base,
)
from pipeline.config.settings import RunSettings
from pipeline.files import read_json
from pipeline.model.adapter import expected_shapes
from pipeline.model.fingerprint import base_fingerprint, sampled_fingerprint
from tests.adapter.merged import make_adapter
from tests.messages import assert_mentions, refused
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
assert any("lora_" in name for name, _ in model.named_parameters())
"""


@pytest.fixture
def base(pair):
    return pair / "base"


def make_cache(home, model):
    """Write a hub cache with one model, in the layout of `hf download`."""
    repository = home / "hub" / "models--org--tiny-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(model, repository / "snapshots" / COMMIT)


def test_an_adapter_of_a_hub_model_loads_with_another_hub_cache(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model")
    for home in ("here", "there"):
        make_cache(tmp_path / home, model)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "here"))
    settings = {"model": "org/tiny-model", "model_revision": COMMIT}
    plan = make_plan(model, **settings)
    base = base_fingerprint(plan.settings.model_folder)
    tensors = {key: torch.ones(shape) for key, shape in expected_shapes(plan).items()}
    folder = tmp_path / "adapter"
    publish_adapter(plan, tensors, folder, step=1, base=base)
    config = read_json(folder / "adapter_config.json")
    record = read_json(folder / TRAINED_ON)
    assert config["base_model_name_or_path"] == record["base"] == "org/tiny-model"
    assert config["revision"] == record["revision"] == COMMIT
    card = (folder / "README.md").read_text()
    assert card.count("base_model: org/tiny-model\n") == 1
    assert_mentions(card, COMMIT, "org/tiny-model")
    for path in folder.glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    shutil.rmtree(tmp_path / "here")
    shutil.rmtree(model)
    environment = os.environ | {"HF_HOME": str(tmp_path / "there"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_base_given_as_a_path_is_recorded_as_a_path(tiny_model, tmp_path):
    plan = make_plan(tiny_model)
    tensors = {key: torch.ones(shape) for key, shape in expected_shapes(plan).items()}
    publish_adapter(plan, tensors, tmp_path / "a", step=1, base=base_fingerprint(tiny_model))
    assert read_json(tmp_path / "a" / TRAINED_ON)["base"] == str(tiny_model)
    config = read_json(tmp_path / "a" / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny_model), None)


def test_a_base_that_differs_in_one_byte_is_refused_with_the_tensor(base, tmp_path):
    record = {"base": "org/name", "fingerprint": base_fingerprint(base).as_json()}
    (tmp_path / TRAINED_ON).write_text(json.dumps(record))
    require_same_base(base, tmp_path)
    shard = min(base.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with refused(base, "1 of", "model.", "--base"):
        require_same_base(base, tmp_path)


def test_an_adapter_of_the_first_release_is_compared_by_samples(base, tmp_path, caplog):
    record = {"base": str(base), "fingerprint": sampled_fingerprint(base)}
    (tmp_path / TRAINED_ON).write_text(json.dumps(record))
    require_same_base(base, tmp_path)
    assert_mentions(caplog.text, "samples")
    (base / "config.json").write_text("{}")
    with refused(base, "--base"):
        require_same_base(base, tmp_path)


def test_an_adapter_without_a_record_is_accepted(base, tmp_path):
    require_same_base(base, tmp_path)


def test_a_corrected_base_with_options_that_no_setting_has_is_refused(tmp_path):
    settings = RunSettings(model="m", train_data="t", output_dir="o", load_in_4bit=True)
    options = {"load_in_4bit": True, "quant_block": 32}
    (tmp_path / TRAINED_ON).write_text(json.dumps({QUANTISED: options}))
    with refused(str(tmp_path), "quant_block: 32", "use its run"):
        require_corrected_base(tmp_path, settings, "use its run")


def test_products_of_an_earlier_adapter_are_marked_as_outdated(pair, tmp_path):
    from pipeline.adapter.merge_output import MARKER
    from tests.adapter.merged import merge_adapter

    run = tmp_path / "run"
    shutil.copytree(pair / "adapter", run / "adapter")
    assert is_merged_from(run) is None  # nothing is merged yet
    merge_adapter(pair / "base", run / "adapter", run / "merged")
    score = {"rows": 1, "adapter_sha256": adapter_sha256(run / "adapter")}
    (run / "score.json").write_text(json.dumps(score))
    mark_outdated(run)  # the adapter is the same
    assert is_merged_from(run) is True
    assert "outdated" not in read_json(run / "score.json")
    make_adapter(pair / "base", run / "adapter", lora_alpha=5)
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (run / "report.html").write_text("<html>\n<body>\n<p>text</p></body>")
    mark_outdated(run)
    mark_outdated(run)
    assert is_merged_from(run) is False
    assert_mentions(read_json(run / "score.json")["outdated"], "earlier adapter", f"score {run}")
    assert_mentions(
        read_json(run / "merged" / MARKER)["outdated"], "earlier adapter", f"merge {run}"
    )
    page = (run / "report.html").read_text()
    assert page.count("Outdated") == 1
    assert_mentions(page, f"report {run}")
    merge_adapter(pair / "base", run / "adapter", run / "merged")
    assert "outdated" not in read_json(run / "merged" / MARKER)


def test_a_report_that_is_being_watched_is_not_outdated(pair, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair / "adapter", run / "adapter")
    page = '<html lang="en" data-refresh="5">\n<body>\n<p>text</p></body>'
    (run / "report.html").write_text(page)
    mark_outdated(run)
    assert (run / "report.html").read_text() == page
