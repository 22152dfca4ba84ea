"""Every damage that an adapter can have is named, in memory and in a written file."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapter.verify import verify_adapter_file, verify_tensors
from pipeline.errors import RankZeroError

pytestmark = pytest.mark.tensor

PREFIX = "base_model.model.model.layers.0.self_attn"
A, B = f"{PREFIX}.q_proj.lora_A.weight", f"{PREFIX}.q_proj.lora_B.weight"
OTHER = f"{PREFIX}.v_proj.lora_B.weight"
EXPECTED = {A: (2, 8), B: (6, 2), OTHER: (4, 2)}


def good():
    return {key: torch.ones(shape) for key, shape in EXPECTED.items()}


def with_value(value):
    tensor = torch.ones(EXPECTED[B])
    tensor[3, 1] = value
    return {B: tensor}


DAMAGES = {
    "missing": ({B: None}, f"{B} is missing"),
    "extra": ({f"{PREFIX}.k_proj.lora_A.weight": torch.ones(2, 8)}, "k_proj.*does not belong"),
    "empty": ({A: torch.empty(0)}, "ZeRO-3"),
    "shape": ({A: torch.ones(8, 2)}, r"has shape \(8, 2\) for \(2, 8\)"),
    "nan": (with_value(float("nan")), f"{B} holds 1 of 12 values that are not finite"),
    "inf": (with_value(float("inf")), f"{B} holds 1 of 12 values that are not finite"),
    "zero": ({B: torch.zeros(6, 2)}, f"1 of 2 lora_B matrices are zero.*did not learn.*{B}"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_named(name, tmp_path):
    damage, message = DAMAGES[name]
    tensors = {key: tensor for key, tensor in (good() | damage).items() if tensor is not None}
    with pytest.raises(RankZeroError, match=message) as caught:
        verify_tensors(tensors, EXPECTED, trained=True)
    assert caught.value.exit_code == 1
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RankZeroError, match=message):
        verify_adapter_file(tmp_path / "a.safetensors", EXPECTED, trained=True)


def test_a_good_adapter_passes_and_a_fresh_one_may_be_zero(tmp_path):
    verify_tensors(good(), EXPECTED, trained=True)
    fresh = good() | {B: torch.zeros(6, 2), OTHER: torch.zeros(4, 2)}
    verify_tensors(fresh, EXPECTED, trained=False)
    save_file(fresh, tmp_path / "a.safetensors")
    verify_adapter_file(tmp_path / "a.safetensors", EXPECTED, trained=False)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_file_that_is_cut_off_cannot_be_read_back(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    save_file(good(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RankZeroError, match="cannot be read back"):
        verify_adapter_file(path, EXPECTED, trained=True)


def test_many_damages_are_counted_and_few_are_named():
    with pytest.raises(RankZeroError, match=r"5 tensors are wrong.*and 2 more") as caught:
        verify_tensors({}, {f"k{i}": (1,) for i in range(5)}, trained=True)
    assert str(caught.value).count("is missing") == 3
