"""The catalogue of GPU rates: lookup by key, by size, and by NVML's device name."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.given.catalogue import GPUS, cpu_of, gpu_like, gpu_named, rates_of
from pipeline.plan.given.hardware import GIB
from tests import ROOT
from tests.messages import refused

pytestmark = pytest.mark.unit

RATES = ("flops", "memory_bandwidth", "node_link", "network", "host_link")


@pytest.mark.parametrize("key", GPUS)
def test_the_memory_and_model_name_in_a_key_are_those_of_its_gpu(key):
    """A key is [series-]model-memory[-pcie], such as rtx-4090-24gb and h100-80gb-pcie."""
    gpu = GPUS[key]
    before_memory, gigabytes = re.match(r"(.+)-(\d+)gb", key).groups()
    # Makers give memory in units of 10^9 or 2^30 bytes, and reserve a part.
    assert float(gigabytes) * 1e9 * 0.95 < gpu.device_bytes < float(gigabytes) * GIB * 1.01
    model_name = before_memory.split("-")[-1]
    assert model_name.upper() in gpu.name.upper()


@pytest.mark.parametrize("key", GPUS)
def test_rates_of_a_gpu_are_positive_and_in_the_usual_order(key):
    gpu = GPUS[key]
    assert all(getattr(gpu, rate) > 0 for rate in RATES)
    assert gpu.network <= gpu.node_link <= gpu.memory_bandwidth < gpu.flops


@pytest.mark.parametrize(
    "oldest_to_newest",
    [
        ["v100-32gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb"],
        ["t4-16gb", "l4-24gb", "l40s-48gb"],
        ["rtx-3090-24gb", "rtx-4090-24gb"],
    ],
)
@pytest.mark.parametrize("rate", ["flops", "memory_bandwidth"])
def test_newer_gpus_of_a_series_are_not_slower(oldest_to_newest, rate):
    rates = [getattr(GPUS[key], rate) for key in oldest_to_newest]
    assert rates == sorted(rates)


def test_an_unknown_key_is_refused_with_a_similar_key_or_all_keys():
    assert gpu_named("h100-80gb") is GPUS["h100-80gb"]
    with refused("H100", "h100-80gb"):
        gpu_named("H100")
    with refused("zzzzzz", "t4-16gb"):
        gpu_named("zzzzzz")


@pytest.mark.parametrize(
    ("name", "mib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-80gb-pcie"),
        ("NVIDIA A100-SXM4-40GB", 40536, "a100-40gb"),  # an older driver's figure
        ("A100-SXM4-80GB", 81251, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
        ("NVIDIA A10", 23028, "a10-24gb"),  # neither A100 nor A10G
        ("NVIDIA A10G", 23028, "a10g-24gb"),
        ("NVIDIA T4", 15360, "t4-16gb"),
        ("Tesla V100-SXM2-16GB", 16160, "v100-16gb"),
        ("NVIDIA B200", 183359, "b200-180gb"),
    ],
)
def test_the_name_and_memory_that_nvml_reports_select_the_gpu(name, mib, key):
    assert rates_of(name, mib * 2**20) is GPUS[key]


@pytest.mark.parametrize(
    ("name", "device_bytes"), [("NVIDIA H100 80GB HBM3", 10 * GIB), ("NVIDIA X1", 80 * GIB)]
)
def test_a_mig_instance_or_unknown_gpu_gets_the_rates_of_a_gpu_of_its_size(name, device_bytes):
    rates = rates_of(name, device_bytes)
    assert rates == gpu_like(device_bytes / GIB)
    assert rates.flops < GPUS["h100-80gb"].flops
    assert rates.device_bytes == device_bytes


@given(gib=st.floats(1, 500), tflops=st.floats(1, 5000))
def test_a_gpu_described_by_memory_and_flops_has_both(gib, tflops):
    gpu = gpu_like(gib, tflops)
    assert gpu.device_bytes == int(gib * GIB)
    assert all(getattr(gpu, rate) > 0 for rate in RATES)
    assert gpu.flops == pytest.approx(tflops * 1e12)


@given(gib=st.floats(1, 500))
def test_a_gpu_described_by_memory_is_no_faster_than_the_gpu_of_the_catalogue_nearest_in_size(gib):
    gpu = gpu_like(gib)
    assert gpu.device_bytes == int(gib * GIB)
    assert all(getattr(gpu, rate) > 0 for rate in RATES)
    nearest = min(GPUS.values(), key=lambda other: abs(other.device_bytes - gpu.device_bytes))
    assert gpu.flops <= nearest.flops


def test_a_gpu_described_by_the_memory_and_tflops_of_an_a100_gets_its_other_rates():
    a100 = GPUS["a100-40gb"]
    assert gpu_like(40, 312) == replace(a100, name="GPU of 40 GiB", compute_capability=(8, 0))


def test_a_gpu_without_flops_is_refused():
    with refused("0 TFLOPS"):
        gpu_like(40, 0)


def test_ranks_of_a_node_share_a_cpu_and_have_a_gpu_each():
    cpu, gpu = cpu_of(num_cores=4, memory_bytes=64 * GIB), GPUS["h100-80gb"]
    assert cpu.usable_bytes(4) == cpu.usable_bytes(1) // 4
    assert gpu.usable_bytes(8) == gpu.usable_bytes(1) < gpu.device_bytes


def test_the_flops_of_a_cpu_grow_with_its_cores():
    assert cpu_of(8, 64 * GIB).flops == 2 * cpu_of(4, 64 * GIB).flops


def test_docs_speed_has_every_gpu_of_the_catalogue():
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in GPUS)
