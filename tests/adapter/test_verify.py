"""Every kind of damage to an adapter is refused with its tensor, in memory and in a file."""

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapter.verify import verify_adapter_file, verify_tensors
from pipeline.errors import RankZeroError
from tests.messages import refused

pytestmark = pytest.mark.tensor

PREFIX = "base_model.model.model.layers.0.self_attn"
A, B = f"{PREFIX}.q_proj.lora_A.weight", f"{PREFIX}.q_proj.lora_B.weight"
K = f"{PREFIX}.k_proj.lora_A.weight"
OTHER = f"{PREFIX}.v_proj.lora_B.weight"
EXPECTED = {A: (2, 8), B: (6, 2), OTHER: (4, 2)}


def good():
    return {key: torch.ones(shape) for key, shape in EXPECTED.items()}


def with_value(value):
    tensor = torch.ones(EXPECTED[B])
    tensor[3, 1] = value
    return {B: tensor}


# Name -> tensors that replace good ones (None removes a tensor), and facts of the message.
KINDS_OF_DAMAGE = {
    "missing": ({B: None}, [B, "missing"]),
    "extra": (
        {K: torch.ones(2, 8)},
        [f"{PREFIX}.k_proj.lora_A.weight"],
    ),
    "empty": ({A: torch.empty(0)}, [A, "ZeRO-3"]),
    "shape": ({A: torch.ones(8, 2)}, [A, (8, 2), (2, 8)]),
    "nan": (with_value(float("nan")), [B, "1 of 12", "not finite"]),
    "inf": (with_value(float("inf")), [B, "1 of 12", "not finite"]),
    "zero": ({B: torch.zeros(6, 2)}, ["1 of 2", "zero", B]),
}


@pytest.mark.parametrize("name", KINDS_OF_DAMAGE)
def test_a_damaged_adapter_is_refused_with_the_tensor(name, tmp_path):
    damage, facts = KINDS_OF_DAMAGE[name]
    tensors = {key: tensor for key, tensor in (good() | damage).items() if tensor is not None}
    with refused(*facts, error=RankZeroError):
        verify_tensors(tensors, EXPECTED, is_trained=True)
    save_file(tensors, tmp_path / "a.safetensors")
    with refused(*facts, "a.safetensors", error=RankZeroError):
        verify_adapter_file(tmp_path / "a.safetensors", EXPECTED, is_trained=True)


def test_a_good_adapter_passes_and_an_untrained_one_may_be_zero(tmp_path):
    verify_tensors(good(), EXPECTED, is_trained=True)
    fresh = good() | {B: torch.zeros(6, 2), OTHER: torch.zeros(4, 2)}
    verify_tensors(fresh, EXPECTED, is_trained=False)
    save_file(fresh, tmp_path / "a.safetensors")
    verify_adapter_file(tmp_path / "a.safetensors", EXPECTED, is_trained=False)


@pytest.mark.parametrize("end", [0, 4, 60, -1])  # of the remaining bytes
def test_a_truncated_file_is_refused(tmp_path, end):
    path = tmp_path / "a.safetensors"
    save_file(good(), path)
    path.write_bytes(path.read_bytes()[:end])
    with refused(path, error=RankZeroError):
        verify_adapter_file(path, EXPECTED, is_trained=True)


def test_only_the_first_of_many_missing_tensors_are_named():
    with refused("k0", "k1", "k2", "5", "2 more", error=RankZeroError):
        verify_tensors({}, {f"k{i}": (1,) for i in range(5)}, is_trained=True)
