"""Detection of this node's accelerators without torch, and environment variables for libraries."""

import ctypes
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster.host_memory import host_memory
from pipeline.cluster.placement import Placement, from_environment
from pipeline.errors import UserError
from pipeline.plan.given.catalogue import cpu_of, gpu_like, gpu_named, rates_of
from pipeline.plan.given.hardware import Hardware
from pipeline.plan.given.torch_process import package_version

# CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED (cuda.h)
_VIRTUAL_MEMORY_ATTRIBUTE = 102


@dataclass(frozen=True)
class _UnsupportedAccelerator:
    """An accelerator that is not supported, and the signs by which it is detected without torch.

    `files`: glob patterns of its device files, relative to the root folder. `torch_label`: part of
    the local label of torch's version, such as rocm in 2.9.0+rocm6.4. `package`: name of its plugin
    for torch. `variables`: environment variables that assign its devices.
    """

    name: str
    files: tuple[str, ...] = ()
    torch_label: str = ""
    package: str = ""
    variables: tuple[str, ...] = ()


_UNSUPPORTED = (
    _UnsupportedAccelerator(
        "AMD GPUs (ROCm)", ("dev/kfd",), "rocm",
        variables=("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
    ),
    _UnsupportedAccelerator(
        "Intel Gaudi", ("sys/bus/pci/drivers/habanalabs/*:*", "dev/hl[0-9]*"),
        package="habana-torch-plugin",
        variables=("HABANA_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES"),
    ),
    _UnsupportedAccelerator(
        "Huawei Ascend", ("dev/davinci[0-9]*",), package="torch-npu",
        variables=("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"),
    ),
    # GPUs integrated in a CPU are on PCI bus 00. The patterns match all other buses.
    _UnsupportedAccelerator(
        "Intel GPUs (XPU)",
        (
            "sys/bus/pci/drivers/i915/*:[!0]?:*", "sys/bus/pci/drivers/i915/*:?[!0]:*",
            "sys/bus/pci/drivers/xe/*:[!0]?:*", "sys/bus/pci/drivers/xe/*:?[!0]:*",
        ),
        "xpu",
        variables=("ZE_AFFINITY_MASK",),
    ),
    _UnsupportedAccelerator(
        "Cambricon MLU", ("dev/cambricon_dev[0-9]*",), package="torch-mlu",
        variables=("MLU_VISIBLE_DEVICES",),
    ),
    _UnsupportedAccelerator(
        "AWS Neuron", ("dev/neuron[0-9]*",), package="torch-neuronx",
        variables=("NEURON_RT_VISIBLE_CORES",),
    ),
)  # fmt: skip


def detect_hardware() -> Hardware:
    """The NVIDIA GPUs of this node that CUDA_VISIBLE_DEVICES makes visible, else its CPU.

    Raises UserError if the node has accelerators of another vendor and DS_ACCELERATOR=cpu is not
    set.
    """
    requested = os.environ.get("DS_ACCELERATOR", "")
    if requested != "cpu":
        if (gpus := _nvidia_gpus()) is not None and requested in ("", "cuda"):
            return gpus
        if requested:
            other_accelerator: str | None = f"DS_ACCELERATOR={requested}"
        else:
            other_accelerator = unsupported_accelerator(os.environ, Path("/"))
        if other_accelerator is not None:
            raise UserError(
                f"accelerator: {other_accelerator}, but the NVIDIA driver detects no GPU, and only "
                "NVIDIA GPUs and CPUs are supported; use a node with NVIDIA GPUs, or set "
                "DS_ACCELERATOR=cpu to train on the CPU"
            )
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    return replace(
        cpu_of(len(os.sched_getaffinity(0)), host_memory().total),
        is_slow_in_bf16=is_slow_in_bf16(text),
    )


def is_slow_in_bf16(cpuinfo: str) -> bool:
    """Whether a CPU multiplies matrices faster in fp32 than in bf16, by the text of /proc/cpuinfo.

    Measured on Intel Xeons of model 207 whose AMX is hidden by the hypervisor (docs/log.md). Other
    CPUs without AMX that have bf16 instructions, such as AMD's, may be faster in bf16.
    """
    fields = dict(re.findall(r"^(\S.*?)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    flags = fields.get("flags", "").split()
    if "avx2" not in flags or "amx_bf16" in flags:
        return False
    return "avx512_bf16" not in flags or fields.get("vendor_id") == "GenuineIntel"


def unsupported_accelerator(env: Mapping[str, str], root: Path) -> str | None:
    """An accelerator of another vendor with the sign that shows it; None if there is none.

    Example: `Huawei Ascend (torch-npu 2.9.0)`.
    """
    torch = package_version("torch") or ""
    for accelerator in _UNSUPPORTED:
        signs = [str(path) for pattern in accelerator.files for path in root.glob(pattern)]
        if accelerator.torch_label and accelerator.torch_label in torch.partition("+")[2]:
            signs.append(f"torch {torch}")
        if accelerator.package and (plugin := package_version(accelerator.package)):
            signs.append(f"{accelerator.package} {plugin}")
        signs += [f"{name}={env[name]}" for name in accelerator.variables if env.get(name)]
        if signs:
            return f"{accelerator.name} ({signs[0]})"
    return None


def hardware_from_options(gpu: str | None, gib: float | None, tflops: float | None) -> Hardware:
    """The hardware that --gpu, or --gpu-memory-gib and --gpu-tflops, describe; else this node's.

    Raises UserError for a name that is not in the catalogue of GPUs and for contradictory options.
    """
    if gpu is not None and (gib is not None or tflops is not None):
        raise UserError("--gpu already names a GPU; leave --gpu-memory-gib and --gpu-tflops out")
    if tflops is not None and gib is None:
        raise UserError("--gpu-tflops also needs --gpu-memory-gib")
    if any(value is not None and not 0 < value < math.inf for value in (gib, tflops)):
        raise UserError("--gpu-memory-gib and --gpu-tflops must be numbers above 0")
    if gpu is not None:
        return gpu_named(gpu)
    return detect_hardware() if gib is None else gpu_like(gib, tflops)


def set_up_rank(
    env: Mapping[str, str], *, allow_single_process: bool = False
) -> tuple[Placement, Hardware, str | None]:
    """Detect this rank's placement and hardware, and set environment variables for libraries.

    The third result is that of `missing_gpus`. `allow_single_process`: see `from_environment`. Call
    this function before torch is imported.
    """
    placement = from_environment(env, allow_single_process=allow_single_process)
    hardware = detect_hardware()
    missing = missing_gpus(placement, hardware)
    set_environment(placement, hardware)
    return placement, hardware, missing


def set_environment(placement: Placement, hardware: Hardware) -> None:
    """Set the environment variables that torch and DeepSpeed read when they are imported."""
    os.environ.update(placement.variables())
    os.environ.setdefault("OMP_NUM_THREADS", str(_num_threads(placement)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # training downloads nothing
    if hardware.kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Expandable segments reduce fragmentation with varying sequence lengths (PyTorch docs,
    # "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF"). torch 2.13 reads both names, and
    # prefers PYTORCH_CUDA_ALLOC_CONF.
    elif "PYTORCH_ALLOC_CONF" not in os.environ and has_virtual_memory():
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def has_virtual_memory() -> bool:
    """Whether every visible GPU supports CUDA's virtual memory management; some vGPUs do not.

    Expandable segments need this feature. These calls of the driver create no CUDA context.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return False
    for device in range(count.value):
        error = cuda.cuDeviceGetAttribute(ctypes.byref(value), _VIRTUAL_MEMORY_ATTRIBUTE, device)
        if error or value.value != 1:
            return False
    return count.value > 0


def missing_gpus(placement: Placement, hardware: Hardware) -> str | None:
    """The variable that assigns GPUs to this process, if the driver detects none; else None.

    A user who sets DS_ACCELERATOR=cpu wants to train on the CPU, so the result is then None. Call
    this function before `set_environment`, which may set that variable itself.
    """
    if hardware.kind == "cuda" or os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    names = ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"]
    if placement.launcher != "deepspeed":  # DeepSpeed sets this variable for CPU ranks too
        names.append("CUDA_VISIBLE_DEVICES")
    for name in names:
        assigned = os.environ.get(name, "")
        if assigned[:1].isdigit() or assigned.startswith(("GPU-", "MIG-")):
            return f"{name}={assigned}"
    return None


def _num_threads(placement: Placement) -> int:
    """Number of threads of this rank: srun's CPUs per task, or an equal share of the cores."""
    cores, per_task = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if placement.launcher == "srun" and per_task.isdigit():
        return max(1, min(cores, int(per_task)))
    return max(1, cores // placement.local_size)


def _nvidia_gpus() -> Hardware | None:
    """The visible NVIDIA GPUs of this node; None if there is no driver or no GPU is visible."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if not handles:
            return None
        name = str(pynvml.nvmlDeviceGetName(handles[0]))
        device_bytes = min(int(pynvml.nvmlDeviceGetMemoryInfo(h).total) for h in handles)
        return replace(
            rates_of(name, device_bytes),
            name=name,
            devices_per_node=len(handles),
            device_bytes=device_bytes,
            host_bytes=host_memory().total,
            compute_capability=compute_capability(pynvml, handles[0]),
        )
    finally:
        pynvml.nvmlShutdown()


def compute_capability(pynvml: Any, handle: Any) -> tuple[int, int]:
    """Compute capability of a GPU, or of the GPU of a MIG instance."""
    with suppress(pynvml.NVMLError):  # raised if the handle is not a MIG instance
        handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return int(major), int(minor)


def visible_handles(pynvml: Any, visible: str | None) -> list[Any]:
    """NVML handles of the devices that are visible to CUDA: GPUs, or one MIG instance.

    A MIG instance is a part of a GPU that acts as a separate device. `visible`: value of
    CUDA_VISIBLE_DEVICES. An entry is an index, or a unique prefix of the UUID of a GPU or MIG
    instance. The first invalid entry and all later entries are ignored. The index of a GPU with MIG
    selects its first instance, and a process sees at most one instance. CUDA has the same rules
    (CUDA Programming Guide, environment variables; NVIDIA MIG User Guide, device enumeration).
    """
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    entries = map(str, range(len(gpus))) if visible is None else map(str.strip, visible.split(","))
    handles: list[Any] = []
    for entry in entries:
        if entry.isdigit() and int(entry) < len(gpus):
            gpu = gpus[int(entry)]
            handle = next(iter(_mig_instances(pynvml, gpu)), gpu)
        else:
            handle = _device_with_uuid(pynvml, gpus, entry)
        if handle is None:
            break
        is_mig_instance = handle not in gpus
        if is_mig_instance:
            return handles or [handle]
        handles.append(handle)
    return handles


def _mig_instances(pynvml: Any, gpu: Any) -> list[Any]:
    """The MIG instances of a GPU; empty if MIG is off or the GPU does not support it."""
    instances = []
    with suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceGetMigMode(gpu)[0]:
            for i in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                with suppress(pynvml.NVMLError):  # raised if there is no instance at this index
                    instances.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i))
    return instances


def _device_with_uuid(pynvml: Any, gpus: list[Any], entry: str) -> Any | None:
    """The GPU or MIG instance that an entry of CUDA_VISIBLE_DEVICES names by its UUID.

    None if no device or more than one matches.
    """
    matches = []
    for gpu in gpus:
        for handle in (gpu, *_mig_instances(pynvml, gpu)):
            has_uuid = entry and str(pynvml.nvmlDeviceGetUUID(handle)).startswith(entry)
            is_instance = handle != gpu
            if has_uuid or (is_instance and _has_old_name(pynvml, gpu, handle, entry)):
                matches.append(handle)
    return matches[0] if len(matches) == 1 else None


def _has_old_name(pynvml: Any, gpu: Any, instance: Any, entry: str) -> bool:
    """Whether an entry names a MIG instance as old drivers do: MIG-GPU-<UUID>/<id>/<id>.

    The two ids are those of the GPU instance and of the compute instance.
    """
    gpu_uuid, *ids = entry.removeprefix("MIG-").split("/")
    if len(ids) != 2 or not str(pynvml.nvmlDeviceGetUUID(gpu)).startswith(gpu_uuid):
        return False
    return ids == [
        str(pynvml.nvmlDeviceGetGpuInstanceId(instance)),
        str(pynvml.nvmlDeviceGetComputeInstanceId(instance)),
    ]
