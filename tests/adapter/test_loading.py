"""The published adapter is in safetensors; other libraries load it by path, hub name or merged."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.adapter.publish import publish_adapter
from pipeline.model.adapter import expected_shapes
from pipeline.model.fingerprint import base_fingerprint
from tests.adapter.merged import merge_adapter
from tests.tiny import make_model, make_plan

pytestmark = pytest.mark.tensor

IDS = torch.arange(3, 35).reshape(2, 16)  # token ids of two sequences, whose logits are compared


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A base and an adapter with random weights, published in the same folder."""
    folder = tmp_path_factory.mktemp("published")
    base = make_model(folder / "base")
    plan = make_plan(base, 1, 40)
    torch.manual_seed(2)
    weights = {key: torch.randn(shape) * 0.1 for key, shape in expected_shapes(plan).items()}
    publish_adapter(plan, weights, folder / "adapter", step=1, base=base_fingerprint(base))
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def base_of(published):
    return AutoModelForCausalLM.from_pretrained(published / "base", dtype=torch.float32)


@pytest.fixture
def by_path(published):
    """Logits of plain peft with the adapter's folder."""
    return logits(PeftModel.from_pretrained(base_of(published), published / "adapter"))


def test_peft_loads_the_adapter_by_its_hub_name_from_the_cache(
    published, by_path, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    shutil.copytree(published / "adapter", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = PeftModel.from_pretrained(base_of(published), "org/name", cache_dir=tmp_path)
    assert torch.equal(logits(model), by_path)


def test_load_adapter_of_transformers_reads_the_adapter(published, by_path):
    model = base_of(published)
    before = logits(model)
    model.load_adapter(str(published / "adapter"))
    assert torch.allclose(logits(model), by_path, atol=1e-6)
    assert not torch.allclose(before, by_path, atol=1e-2)


def test_transformers_loads_the_merged_model_without_peft(published, by_path, tmp_path):
    merge_adapter(published / "base", published / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(model), by_path, atol=1e-4)


def test_the_weights_are_only_in_safetensors(published):
    suffixes = {path.suffix for path in (published / "adapter").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jinja", ".md"}
