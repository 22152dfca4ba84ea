"""A fake pynvml, NVIDIA's Python binding of NVML: it shows the GPUs and MIG instances of a list.

A MIG instance is a part of a GPU that programs use like a GPU.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

from pipeline.plan.given.hardware import GIB


@dataclass(eq=False)
class Device:
    """A GPU with its MIG instances in `mig`, or a MIG instance.

    `ids`: None for a GPU; NVML's ids of the GPU instance and compute instance for a MIG instance.
    """

    uuid: str
    gib: float = 80
    name: str = "NVIDIA H100 80GB HBM3"
    mig: list["Device"] = field(default_factory=list)
    ids: tuple[int, int] | None = None


def gpus(count: int) -> list[Device]:
    return [Device(f"GPU-{i}") for i in range(count)]


def make_nvml(devices: list[Device]) -> SimpleNamespace:
    """The functions of pynvml that the project calls, for these GPUs.

    A function fails for the same arguments as in pynvml, with OSError in place of NVMLError. One
    process with id 77 uses 1 GiB of each GPU.
    """

    def parent(handle: Device) -> Device:
        parents = [device for device in devices if handle in device.mig]
        if not parents:
            raise OSError("Invalid Argument")
        return parents[0]

    def capability(handle: Device) -> tuple[int, int]:
        if handle.ids is not None:
            raise OSError("Not Supported")
        return 9, 0

    def instance(gpu: Device, index: int) -> Device:
        if index >= len(gpu.mig):
            raise OSError("Not Found")
        return gpu.mig[index]

    def index(handle: Device) -> int:
        if handle.ids is not None:
            raise OSError("Invalid Argument")
        return devices.index(handle)

    return SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(devices),
        nvmlDeviceGetHandleByIndex=lambda number: devices[number],
        nvmlDeviceGetIndex=index,
        nvmlDeviceGetName=lambda handle: handle.name,
        nvmlDeviceGetUUID=lambda handle: handle.uuid,
        nvmlDeviceGetCudaComputeCapability=capability,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
            total=int(handle.gib * GIB), free=int((handle.gib - 1) * GIB)
        ),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=77)],
        nvmlDeviceGetMigMode=lambda gpu: (int(bool(gpu.mig)), 0),
        nvmlDeviceGetMaxMigDeviceCount=lambda gpu: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=instance,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=parent,
        nvmlDeviceGetGpuInstanceId=lambda handle: handle.ids[0],
        nvmlDeviceGetComputeInstanceId=lambda handle: handle.ids[1],
        nvmlSystemGetDriverVersion=lambda: "580.65",
        nvmlSystemGetCudaDriverVersion=lambda: 13000,
    )
