"""`make bench-gpu` runs to its end with a tiny shape, so that a GPU is not rented for a mistake."""

import json

import pytest

from tests.bench import gpu, gpu_rates
from tests.bench.step_profile import KINDS, kind_of
from tests.commands import run


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_every_part_is_measured_with_a_tiny_shape(tmp_path):
    code, output = run("-m", "tests.bench.gpu", "--tiny", "--out", tmp_path)
    assert code == 0, output
    results = json.loads((tmp_path / "gpu.json").read_text())
    unmeasured = [n for n, part in results["parts"].items() if part.keys() & {"failed", "skipped"}]
    assert not unmeasured, results
    for name in gpu.CELLS:
        assert results["parts"][name]["tokens_per_second"] > 0
    fast_paths = results["parts"]["8B LoRA, loss by autograd"]["fast_paths"]
    assert fast_paths["loss_gradient_in_forward"] == "off"
    assert fast_paths["joint_lora"] == "on"
    profile = results["parts"]["profile of 8B LoRA"]
    assert sum(profile[kind] for kind in KINDS) == pytest.approx(1)
    assert profile["base products"] > 0
    assert profile["LoRA products"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert all(name in text for name in results["parts"])


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_every_long_sequence_is_measured_with_a_tiny_shape(tmp_path):
    code, output = run("-m", "tests.bench.gpu", "--tiny", "--long", "--out", tmp_path)
    assert code == 0, output
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts.keys() == gpu.LONG_CELLS.keys()
    assert all(part["tokens_per_second"] > 0 for part in parts.values()), parts
    assert all(len(part["step_seconds"]) == 2 for part in parts.values())


@pytest.mark.unit
def test_a_part_that_fails_is_recorded_and_a_missing_feature_is_named():
    def fails():
        raise RuntimeError("no kernel")

    def misses():
        raise gpu_rates.Missing("varlen_attn")

    assert "no kernel" in gpu.run_part(fails)["failed"]
    assert gpu.run_part(misses) == {"skipped": "varlen_attn"}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[512, 4096], [4096, 14336]], "base products"),
        ("aten::mm", [[512, 4096], [4096, 16]], "LoRA products"),
        ("aten::mm", [[512, 4096], [4096, 128256]], "head and loss"),
        ("aten::_scaled_dot_product_flash_attention", [[1, 32, 512, 128]], "attention"),
        ("bitsandbytes::dequantize_4bit", [[100, 1]], "dequantisation"),
        ("aten::mul", [[512, 4096]], "elementwise"),
        ("c10d::allreduce_", [], "collectives"),
    ],
)
def test_operators_are_classified_by_name_and_shapes(name, shapes, kind):
    assert (
        kind_of(name, shapes, is_optimizer=False, lora_sizes={16, 32, 48}, vocab_size=128256)
        == kind
    )
