"""Do torch, NCCL and bitsandbytes work on the device? Imports them; before any model is loaded."""

from collections.abc import Iterable
from typing import Any

from pipeline.errors import UserError
from pipeline.preflight.check import Finding, ProbeResults, compare, fail, flat, ok
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import own_devices
from pipeline.preflight.rates import devices_of

# Mean absolute error in standard deviations of normal numbers in blocks of 64. Measured on a CPU,
# 2026-11-25, bitsandbytes 0.50.2: 0.0728 and 0.0965, with double quantisation 0.0001 more.
_TILE_ERRORS = {"nf4": 0.0728, "fp4": 0.0965}
_TOLERANCE = 0.2


def probe_torch(context: RankContext) -> dict[str, str]:
    """CUDA that torch was built with. Raises UserError where it shows no device or is too new."""
    import torch

    if context.hardware.kind == "cpu":
        return {"torch": torch.__version__, "cuda": "not used", "nccl": "not used"}
    built = torch.version.cuda
    if built is None:
        raise UserError(
            f"torch {torch.__version__} is built without CUDA, and this machine has GPUs; install "
            "the wheel for its driver (pytorch.org)"
        )
    _require_driver(built)
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} (CUDA {built}) shows no GPU where NVML does; "
            "look at CUDA_VISIBLE_DEVICES and at the driver (nvidia-smi)"
        )
    own_devices(context, torch.cuda.device_count())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": built, "nccl": nccl}


def _require_driver(built: str) -> None:
    """A driver runs every CUDA of its major version (NVIDIA, CUDA compatibility)."""
    import pynvml

    pynvml.nvmlInit()
    try:
        newest = int(pynvml.nvmlSystemGetCudaDriverVersion())
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    if int(built.split(".")[0]) > newest // 1000:
        raise UserError(
            f"torch is built with CUDA {built}, driver {driver} runs CUDA up to "
            f"{newest / 1000:.1f}; install a newer driver or torch for CUDA {newest // 1000}"
        )


def assess_torch(seen: ProbeResults) -> Iterable[Finding]:
    """The same everywhere."""
    first = next(iter(seen.answers.values()))
    said = f"torch {first['torch']}, CUDA {first['cuda']}, NCCL {first['nccl']}"
    return compare(seen, said, "install the same wheels on every machine (constraints.txt)")


def probe_group(context: RankContext) -> dict[str, str]:
    """Bring up the process group as training does. Collective."""
    context.session.start()
    return flat({"backend": "nccl" if context.hardware.kind == "cuda" else "gloo"})


def assess_group(seen: ProbeResults) -> Iterable[Finding]:
    """All ranks are in it."""
    first = next(iter(seen.answers.values()))
    yield ok(f"{len(seen.answers)} ranks over {first['backend']}")


def probe_tile(context: RankContext) -> dict[str, Any]:
    """Error of a tile in 4 bits on each device of this rank; none without `load_in_4bit`."""
    settings = context.known_settings
    if not settings.load_in_4bit:
        return {"errors": [], "kind": settings.bnb_4bit_quant_type}
    from pipeline.model.base import tile_error

    errors = [tile_error(settings, device) for device in devices_of(context)]
    return {"errors": errors, "kind": settings.bnb_4bit_quant_type}


def assess_tile(seen: ProbeResults) -> Iterable[Finding]:
    """As large as four bits make it, which shows that the kernels ran and did their work."""
    first = next(iter(seen.answers.values()))
    kind, most = first["kind"], _TILE_ERRORS[first["kind"]] * (1 + _TOLERANCE)
    least = _TILE_ERRORS[kind] * (1 - _TOLERANCE)
    if not first["errors"]:
        return
    wrong = [
        rank
        for rank, answer in seen.answers.items()
        if not all(least < error < most for error in answer["errors"])
    ]
    if wrong:
        errors = ", ".join(f"{e:.3g}" for rank in wrong for e in seen.answers[rank]["errors"])
        yield fail(
            f"{seen.where(wrong)}: a tile in {kind} and back is off by {errors} standard "
            f"deviations, expected {_TILE_ERRORS[kind]:.3g}",
            "install bitsandbytes for this CUDA (python -m bitsandbytes tells what it found)",
            wrong,
        )
    else:
        yield ok(
            f"{kind} and back: off by {first['errors'][0]:.3g} standard deviations, as it must be"
        )
