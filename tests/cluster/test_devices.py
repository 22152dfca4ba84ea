"""Accelerators of a node through a fake NVML, unsupported accelerators, and host memory."""

import ctypes
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster import devices
from pipeline.cluster.devices import (
    compute_capability,
    detect_hardware,
    is_slow_in_bf16,
    missing_gpus,
    set_environment,
    unsupported_accelerator,
    visible_handles,
)
from pipeline.cluster.host_memory import host_memory
from pipeline.cluster.placement import Placement
from pipeline.plan.given.catalogue import GPUS, cpu_of
from tests.messages import refused
from tests.nvml import Device, gpus, make_nvml
from tests.plans import CPU, H100S

pytestmark = pytest.mark.unit

# A node of two GPUs, and a node that also has a GPU with two MIG instances. `ids`: the numbers of
# GPU instance and compute instance.
INSTANCES = [
    Device(f"MIG-{i}a-b-c", gib=10, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", ids=(i, 0))
    for i in (7, 8)
]
GPUS_ONLY = [Device("GPU-8932f937-d72c-4106"), Device("GPU-46b38b21-2ab3-4a44")]
WITH_MIG = [Device("GPU-5c89852c-d268-c3f3", mig=INSTANCES), *GPUS_ONLY]


@pytest.fixture
def unset(monkeypatch):
    """`monkeypatch`, after all variables about accelerators are removed from the environment."""
    kinds = devices._UNSUPPORTED
    for name in (
        "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS",
        "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
        *(name for kind in kinds for name in kind.variables),
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-8932f937-d72c-4106", "GPU-46b38b21-2ab3-4a44"]),
        ("1", ["GPU-46b38b21-2ab3-4a44"]),
        ("GPU-46b38b21-2ab3-4a44", ["GPU-46b38b21-2ab3-4a44"]),
        ("GPU-46, GPU-8", ["GPU-46b38b21-2ab3-4a44", "GPU-8932f937-d72c-4106"]),
        ("GPU-", []),  # the start of both
        ("1,GPU-9,0", ["GPU-46b38b21-2ab3-4a44"]),  # CUDA stops at the first wrong entry
        ("0,-1,1", ["GPU-8932f937-d72c-4106"]),
        ("2", []),
        ("", []),
    ],
)
def test_gpus_are_selected_by_index_or_by_the_start_of_their_uuid(visible, uuids):
    assert [h.uuid for h in visible_handles(make_nvml(GPUS_ONLY), visible)] == uuids


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [
        ("MIG-8a-b-c", "MIG-8a-b-c"),
        ("MIG-8a", "MIG-8a-b-c"),
        ("MIG-GPU-5c89852c-d268-c3f3/8/0", "MIG-8a-b-c"),  # the name in drivers before R470
        ("MIG-GPU-5c89/7/0", "MIG-7a-b-c"),
        ("0", "MIG-7a-b-c"),
        (None, "MIG-7a-b-c"),
        ("MIG-7a-b-c,MIG-8a-b-c", "MIG-7a-b-c"),  # a process sees one instance only
    ],
)
def test_a_mig_instance_is_selected_by_uuid_old_name_or_gpu(visible, uuid):
    nvml = make_nvml(WITH_MIG)
    (handle,) = visible_handles(nvml, visible)
    assert handle.uuid == uuid
    assert compute_capability(nvml, handle) == (9, 0)


def test_instances_that_do_not_exist_are_not_visible():
    for name in ("MIG-9", "MIG-GPU-5c89/9/0", "MIG-"):
        assert visible_handles(make_nvml(WITH_MIG), name) == []


def test_a_detected_gpu_has_its_own_memory_and_the_rates_of_its_name(unset):
    # 81,559 MiB is what the driver reports for an H100; the smaller GPU of the two counts.
    pair = [Device("GPU-a", gib=81559 / 1024), Device("GPU-b", gib=81000 / 1024)]
    unset.setitem(sys.modules, "pynvml", make_nvml(pair))
    result = detect_hardware()
    assert result == replace(
        GPUS["h100-80gb"],
        devices_per_node=2,
        device_bytes=int(pair[1].gib * 2**30),
        host_bytes=host_memory().total,
    )
    unset.setenv("DS_ACCELERATOR", "cpu")  # the GPUs are ignored
    cpu = replace(detect_hardware(), is_slow_in_bf16=False)
    assert cpu == cpu_of(len(os.sched_getaffinity(0)), result.host_bytes)


@pytest.mark.parametrize(
    ("vendor", "flags", "is_slow"),
    [
        ("GenuineIntel", "fma avx2", True),
        ("GenuineIntel", "fma avx2 avx512_bf16", True),
        ("GenuineIntel", "fma avx2 avx512_bf16 amx_bf16 amx_tile", False),
        ("AuthenticAMD", "fma avx2", True),
        ("AuthenticAMD", "fma avx2 avx512_bf16", False),
    ],
)
def test_a_cpu_is_slow_in_bf16_by_its_vendor_and_flags(vendor, flags, is_slow):
    cpuinfo = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel\t\t: 207\nflags\t\t: {flags}\n\n"
    assert is_slow_in_bf16(cpuinfo) == is_slow


def test_a_cpu_that_is_not_x86_is_not_slow_in_bf16():
    assert not is_slow_in_bf16("processor\t: 0\nFeatures\t: asimd bf16\n")
    assert not is_slow_in_bf16("")


def test_a_mig_instance_is_planned_for_with_its_own_memory(unset):
    unset.setitem(sys.modules, "pynvml", make_nvml(WITH_MIG))
    unset.setenv("CUDA_VISIBLE_DEVICES", "MIG-8")
    result = detect_hardware()
    assert (result.devices_per_node, result.device_bytes) == (1, 10 * 2**30)


# Accelerators of other vendors


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("dev/kfd", "ROCm"),
        ("dev/davinci0", "Ascend"),
        ("sys/bus/pci/drivers/habanalabs/0000:19:00.0", "Gaudi"),
        ("sys/bus/pci/drivers/xe/0000:29:00.0", "XPU"),
        ("sys/bus/pci/drivers/i915/0000:10:00.0", "XPU"),
    ],
)
def test_devices_of_other_vendors_are_detected(tmp_path, path, kind):
    assert unsupported_accelerator({}, tmp_path) is None
    (tmp_path / path).mkdir(parents=True)
    assert kind in unsupported_accelerator({}, tmp_path)


def test_integrated_graphics_are_not_an_accelerator(tmp_path):
    (tmp_path / "sys/bus/pci/drivers/i915/0000:00:02.0").mkdir(parents=True)
    assert unsupported_accelerator({}, tmp_path) is None


@pytest.mark.parametrize(
    ("versions", "env", "kind"),
    [
        ({"torch": "2.13.0+rocm7.1"}, {}, "ROCm"),
        ({"torch": "2.13.0+xpu"}, {}, "XPU"),
        ({"torch": "2.13.0+cpu", "torch-npu": "2.13.0"}, {}, "Ascend"),
        ({"torch": "2.13.0+cpu", "habana-torch-plugin": "1.24"}, {}, "Gaudi"),
        ({"torch": "2.13.0+cpu"}, {"ROCR_VISIBLE_DEVICES": "0"}, "ROCm"),  # set by Slurm
    ],
)
def test_libraries_and_variables_of_other_vendors_are_detected(
    monkeypatch, tmp_path, versions, env, kind
):
    monkeypatch.setattr(devices, "package_version", versions.get)
    assert kind in unsupported_accelerator(env, tmp_path)


@pytest.mark.parametrize(
    ("version", "env"),
    [("2.13.0+cu130", {}), ("2.13.0", {"ROCR_VISIBLE_DEVICES": ""})],
)
def test_torch_for_cuda_is_not_a_sign_of_another_vendor(monkeypatch, tmp_path, version, env):
    monkeypatch.setattr(devices, "package_version", {"torch": version}.get)
    assert unsupported_accelerator(env, tmp_path) is None


def without_gpus(patch) -> None:
    """Replace pynvml, so that NVML finds no driver."""

    def fails() -> None:
        raise OSError("no driver")

    patch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=OSError, nvmlInit=fails))


def test_with_an_accelerator_of_another_vendor_a_cpu_run_must_be_requested(unset):
    without_gpus(unset)
    unset.setenv("HIP_VISIBLE_DEVICES", "0,1")
    with refused("ROCm", "HIP_VISIBLE_DEVICES=0,1", "NVIDIA GPUs", "CPU", "DS_ACCELERATOR=cpu"):
        detect_hardware()
    unset.setenv("DS_ACCELERATOR", "cpu")
    assert detect_hardware().kind == "cpu"
    unset.delenv("DS_ACCELERATOR")
    unset.setitem(sys.modules, "pynvml", make_nvml(gpus(2)))
    assert detect_hardware().devices_per_node == 2  # a variable left in the shell of a GPU node


@pytest.mark.parametrize("name", ["xpu", "npu", "hpu", "mps", "cuda"])
def test_a_requested_accelerator_that_is_missing_is_refused(unset, name):
    without_gpus(unset)
    unset.setenv("DS_ACCELERATOR", name)
    with refused(f"DS_ACCELERATOR={name}", "NVIDIA GPUs", "CPU"):
        detect_hardware()


def test_a_node_without_accelerators_trains_on_its_cpu(unset, monkeypatch):
    without_gpus(unset)
    monkeypatch.setattr(devices, "unsupported_accelerator", lambda env, root: None)
    assert detect_hardware().kind == "cpu"


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_JOB_GPUS", "0-3"), ("SLURM_STEP_GPUS", "0-3"), ("CUDA_VISIBLE_DEVICES", "0,1")],
)
def test_granted_gpus_that_the_driver_does_not_show_are_missing(unset, name, value):
    unset.setenv(name, value)
    assert missing_gpus(Placement(), CPU).startswith(f"{name}=0")
    assert missing_gpus(Placement(), H100S) is None
    unset.setenv("DS_ACCELERATOR", "cpu")
    assert missing_gpus(Placement(), CPU) is None


def test_cuda_visible_devices_of_deepspeed_on_a_cpu_do_not_count_as_granted(unset):
    unset.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert missing_gpus(Placement(launcher="deepspeed"), CPU) is None
    unset.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert missing_gpus(Placement(), CPU) is None


# The environment of the libraries


class Driver:
    """A fake libcuda; `has_virtual_memory`: whether each GPU has virtual memory management."""

    def __init__(self, *has_virtual_memory: bool) -> None:
        self._has_virtual_memory = has_virtual_memory

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the name in libcuda
        return 0

    def cuDeviceGetCount(self, count) -> int:  # noqa: N802
        count._obj.value = len(self._has_virtual_memory)
        return 0

    def cuDeviceGetAttribute(self, value, attribute: int, device: int) -> int:  # noqa: N802
        # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        assert attribute == 102
        value._obj.value = int(self._has_virtual_memory[device])
        return 0


@pytest.mark.parametrize(
    ("has_virtual_memory", "hardware", "set_by_user", "value"),
    [
        ((True, True), H100S, {}, "expandable_segments:True"),
        ((True, False), H100S, {}, None),  # a vGPU
        ((), H100S, {}, None),
        ((True,), CPU, {}, None),
        # torch ignores PYTORCH_CUDA_ALLOC_CONF if PYTORCH_ALLOC_CONF is set
        ((True,), H100S, {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
        ((True,), H100S, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_expandable_segments_are_set_only_if_all_gpus_have_them(
    unset, has_virtual_memory, hardware, set_by_user, value
):
    unset.setattr(os, "environ", dict(os.environ) | set_by_user)
    unset.setattr(ctypes, "CDLL", lambda name: Driver(*has_virtual_memory))
    set_environment(Placement(), hardware)
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == value


def test_without_a_driver_there_is_no_virtual_memory(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not devices.has_virtual_memory()


# Host memory


def cgroup(root: Path, lines: str, **files: str) -> None:
    """Write the cgroup of a process (`lines`) and files of cgroups below a root folder.

    In the names of files, `__` stands for a slash and `_dot_` for a dot.
    """
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_memory_limit_of_a_parent_cgroup_applies(tmp_path):
    """Slurm with cgroup version 2: the limit is on the job, and the process is in a task of it."""
    cgroup(
        tmp_path,
        "0::/slurm/job_7/step_0/task_0\n",
        slurm__memory_dot_max="max\n",
        slurm__job_7__memory_dot_max=f"{2**30}\n",
        slurm__job_7__memory_dot_current=f"{2**29}\n",
        slurm__job_7__memory_dot_stat=f"anon 1\ninactive_file {2**28}\n",
        slurm__job_7__step_0__memory_dot_max="max\n",
    )
    result = host_memory(tmp_path)
    assert result.total == 2**30
    assert result.free == 2**30 - 2**29 + 2**28  # page cache is reclaimed
    assert result.limited_by.endswith("slurm/job_7")


def test_the_memory_limit_of_cgroup_version_1_applies(tmp_path):
    cgroup(
        tmp_path,
        "5:cpuset:/x\n4:memory,hugetlb:/docker/abc\n",
        memory__memory_dot_limit_in_bytes=f"{2**30}\n",  # in a container, its own group is the root
        memory__memory_dot_usage_in_bytes=f"{2**29}\n",
        cpuset__memory_dot_limit_in_bytes="1\n",
    )
    result = host_memory(tmp_path)
    assert (result.total, result.free) == (2**30, 2**29)


@pytest.mark.parametrize("lines", ["0::/\n", "4:memory:/\n", ""])
def test_without_a_limit_the_memory_of_the_node_applies(tmp_path, lines):
    cgroup(tmp_path, lines, memory__memory_dot_limit_in_bytes=f"{2**63 - 4096}\n")
    result = host_memory(tmp_path)
    assert result.total == host_memory(tmp_path / "nowhere").total
    assert 0 < result.free <= result.total
    assert result.limited_by == ""
