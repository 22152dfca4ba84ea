"""What this machine has -> Hardware, and the environment that libraries must find. No torch."""

import logging
import math
import os
import warnings
from dataclasses import replace
from typing import Any

from pipeline.cluster.host_memory import host_memory
from pipeline.cluster.placement import Placement
from pipeline.errors import UserError
from pipeline.plan.given.catalogue import cpu_of, gpu_like, gpu_named, rates_of
from pipeline.plan.given.hardware import Hardware


def detect_hardware() -> Hardware:
    """This machine's CUDA devices as NVML and CUDA_VISIBLE_DEVICES show them, else its CPU."""
    return _cuda_devices() or cpu_of(len(os.sched_getaffinity(0)), host_memory().total)


def machine(gpu: str | None, gib: float | None, tflops: float | None) -> Hardware:
    """The GPU that is named or described, else what this machine has.

    Raises UserError for a name that is not in the catalogue and for options that contradict.
    """
    if gpu is not None and (gib is not None or tflops is not None):
        raise UserError("--gpu names the GPU; leave --gpu-memory-gib and --gpu-tflops out")
    if tflops is not None and gib is None:
        raise UserError("--gpu-tflops needs --gpu-memory-gib beside it")
    if any(value is not None and not 0 < value < math.inf for value in (gib, tflops)):
        raise UserError("--gpu-memory-gib and --gpu-tflops must be numbers above 0")
    if gpu is not None:
        return gpu_named(gpu)
    return detect_hardware() if gib is None else gpu_like(gib, tflops)


def set_environment(placement: Placement, hardware: Hardware) -> None:
    """Set what torch and DeepSpeed read when they are imported; call before that."""
    os.environ.update(placement.variables())
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(placement)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # training fetches nothing
    if hardware.kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _quiet_libraries()
    # CUDA's caching allocator fragments less so with sequences of many lengths (PyTorch docs,
    # "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF").
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def missing_gpus(placement: Placement, hardware: Hardware) -> str | None:
    """What granted GPUs to this process where the driver shows none of them; else None.

    Before `set_environment`: a user who says DS_ACCELERATOR=cpu means it.
    """
    if hardware.kind == "cuda" or os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    names = ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"]
    if placement.launcher != "deepspeed":  # which numbers CPU ranks in it as well
        names.append("CUDA_VISIBLE_DEVICES")
    for name in names:
        granted = os.environ.get(name, "")
        if granted[:1].isdigit() or granted.startswith(("GPU-", "MIG-")):
            return f"{name}={granted}"
    return None


def _threads(placement: Placement) -> int:
    """This rank's share of the machine's cores, or what srun gave each task."""
    cores, of_task = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if placement.launcher == "srun" and of_task.isdigit():
        return max(1, min(cores, int(of_task)))
    return max(1, cores // placement.local_size)


def _quiet_libraries() -> None:
    """Keep libraries' notes to their developers out of every rank's terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    libraries = r"(torch|transformers|peft|deepspeed|bitsandbytes)\b"
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)


def _cuda_devices() -> Hardware | None:
    import pynvml

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if not handles:
            return None
        handle = handles[0]
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        name = str(pynvml.nvmlDeviceGetName(handle))
        device_bytes = min(int(pynvml.nvmlDeviceGetMemoryInfo(h).total) for h in handles)
        return replace(
            rates_of(name, device_bytes),
            name=name,
            devices_per_node=len(handles),
            device_bytes=device_bytes,
            host_bytes=host_memory().total,
            compute_capability=(int(major), int(minor)),
        )
    finally:
        pynvml.nvmlShutdown()


def visible_handles(pynvml: Any, visible: str | None) -> list[Any]:
    """NVML's handles of what CUDA shows: numbers, or UUIDs of GPUs and MIG slices, up to a -1."""
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    handles = []
    for entry in (entry.strip() for entry in visible.split(",")):
        try:
            if entry.isdigit():
                handles.append(pynvml.nvmlDeviceGetHandleByIndex(int(entry)))
            else:
                handles.append(pynvml.nvmlDeviceGetHandleByUUID(entry))
        except pynvml.NVMLError:
            break  # as CUDA does: what follows a wrong entry is not visible
    return handles
